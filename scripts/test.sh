#!/usr/bin/env bash
# All checks: environment, ruff, pytest. Arguments go to pytest:  bash scripts/test.sh [-m "not slow"] [-k NAME] ...
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
