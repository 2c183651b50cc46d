#!/usr/bin/env bash
# What each switch brings at full size: all recipes of recipes/study/gpu/ side by side on one GPU, and one table of them.
#
#   bash benchmarks/gpu_studies.sh MINILM BERT OUT
#
#   MINILM, BERT   folders or Hub ids of all-MiniLM-L6-v2 and of a raw BERT-base
#   OUT            folder for the runs and for table.md
#
# data/ must hold the sets that the recipes name. Each is meant to take less than 8 minutes on an H100-class card. The same command
# again goes on where it stopped. What a run prints is in OUT/NAME.log.
set -euo pipefail
(($# == 3)) || { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
minilm=$1 bert=$2 out=$(realpath -m "$3")
[[ ! -e $minilm ]] || minilm=$(realpath "$minilm")
[[ ! -e $bert ]] || bert=$(realpath "$bert")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
runs=() failed=0
for recipe in recipes/study/gpu/*.yaml; do
  name=$(basename "$recipe" .yaml)
  models=(--plm "$bert")
  [[ $name == sts-* ]] || models+=(--bi_encoder "$minilm")
  bash scripts/run_transencoder.sh --recipe "$recipe" --output_dir "$out/$name" "${models[@]}" >"$out/$name.log" 2>&1 &
  runs+=("$!:$name")
done
for run in "${runs[@]}"; do wait "${run%%:*}" || failed=1; done
for run in "${runs[@]}"; do
  printf '\n## %s\n\n' "${run#*:}"
  cat "$out/${run#*:}/results.md" 2>/dev/null || echo "no results; see $out/${run#*:}.log"
done | tee "$out/table.md"
exit "$failed"
