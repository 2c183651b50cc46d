#!/usr/bin/env bash
# From a fresh checkout to two trained models: makes .venv, installs, and trains on the bundled questions, without a GPU.
#
#   bash scripts/quickstart.sh [--plm MODEL] [--output_dir DIR]
#
#   --plm MODEL         a language model in place of BERT-tiny: Hub id or folder
#   --output_dir DIR    default: runs/quickstart
#
# Cost: some minutes of installation once, then about 5 minutes on two cores. The same command again goes on where it stopped.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
plm="" run=runs/quickstart
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --plm | --output_dir) (($# > 1)) || { echo "quickstart.sh: error: $1 needs a value" >&2; exit 2; } ;;
    *) echo "quickstart.sh: error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  if [[ $1 == --plm ]]; then plm=$2; else run=$2; fi
  shift 2
done

source scripts/environment.sh requirements.txt
[[ $plm ]] || plm=$(python scripts/fetch_bert_tiny.py .models)
cores=$(python -c 'import psutil; print(psutil.cpu_count(logical=False) or 1)')
bash scripts/run_transencoder.sh --recipe recipes/quickstart.yaml --output_dir "$run" --plm "$plm" \
  --launcher "accelerate launch --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $cores"
