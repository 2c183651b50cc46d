#!/usr/bin/env bash
# From a fresh checkout to two models: makes .venv, installs, and adapts all-MiniLM-L6-v2 to the bundled questions, without a GPU.
#
#   bash scripts/quickstart.sh [--bi_encoder MODEL] [--plm MODEL] [--output_dir DIR]
#
#   --bi_encoder MODEL  a sentence model in place of all-MiniLM-L6-v2: Hub id or folder
#   --plm MODEL         a language model in place of BERT-tiny, for the cross-encoder
#   --output_dir DIR    default: runs/quickstart, in the checkout
#
# Cost: some minutes of installation once, then about 8 minutes on two cores. The same command again goes on where it stopped.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
start="" plm="" run=$checkout/runs/quickstart
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --bi_encoder | --plm | --output_dir) (($# > 1)) || { echo "quickstart.sh: error: $1 needs a value" >&2; exit 2; } ;;
    *) echo "quickstart.sh: error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  value=$2
  [[ $1 == --output_dir ]] && value=$(realpath -m "$2")
  [[ $1 != --output_dir && -e $2 ]] && value=$(realpath "$2")
  case $1 in
    --bi_encoder) start=$value ;;
    --plm) plm=$value ;;
    --output_dir) run=$value ;;
  esac
  shift 2
done

cd "$checkout"
source scripts/environment.sh requirements.txt
[[ $start ]] || start=$(python scripts/model_without_hub.py all-MiniLM-L6-v2 .models)
[[ $plm ]] || plm=$(python scripts/model_without_hub.py bert-tiny .models)
# Physical cores, or fewer where this process may not use them all.
cores=$(python -c 'import os, psutil; print(min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0))))')
run=${run#"$checkout/"}
bash scripts/run_transencoder.sh --recipe recipes/quickstart.yaml --output_dir "$run" --bi_encoder "$start" --plm "$plm" \
  --launcher "accelerate launch --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process $cores"

search=(python scripts/search.py --index "$run/index" --bi_encoder "$run/best/bi-encoder")
"${search[@]}" --sentences examples/sentences.txt --query "where is my parcel" "I was charged twice" "reset my password" --top_k 3
echo "Next, ask for something else:  ${search[*]} --query 'your question'"
