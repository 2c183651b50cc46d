#!/usr/bin/env bash
# From a fresh checkout to two trained models: makes .venv, installs, and trains on the bundled questions, without a GPU.
#
#   bash scripts/quickstart.sh [--plm MODEL] [--output_dir DIR]
#
#   --plm MODEL         a language model in place of BERT-tiny: Hub id or folder
#   --output_dir DIR    default: runs/quickstart, in the checkout
#
# Cost: some minutes of installation once, then about 6 minutes on two cores. The same command again goes on where it stopped.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
plm="" run=$checkout/runs/quickstart
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --plm | --output_dir) (($# > 1)) || { echo "quickstart.sh: error: $1 needs a value" >&2; exit 2; } ;;
    *) echo "quickstart.sh: error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  if [[ $1 == --output_dir ]]; then
    run=$(realpath -m "$2")
  elif [[ -e $2 ]]; then
    plm=$(realpath "$2")
  else
    plm=$2
  fi
  shift 2
done

cd "$checkout"
source scripts/environment.sh requirements.txt
[[ $plm ]] || plm=$(python scripts/bert_tiny_without_hub.py .models)
# Physical cores, or fewer where this process may not use them all.
cores=$(python -c 'import os, psutil; print(min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))))')
bash scripts/run_transencoder.sh --recipe recipes/quickstart.yaml --output_dir "${run#"$checkout/"}" --plm "$plm" \
  --launcher "accelerate launch --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $cores"
