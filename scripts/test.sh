#!/usr/bin/env bash
# All checks: environment, ruff, pytest. Arguments go to pytest:  bash scripts/test.sh [-m "not slow"] [-k NAME] ...
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
# One file of tests after another in each of a few processes; with more threads than that they would wait for one another.
export OMP_NUM_THREADS=1
python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20 "$@"
