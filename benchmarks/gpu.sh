#!/usr/bin/env bash
# What a GPU brings, in two parts of at most five minutes each on one H100-class card. Nothing is downloaded.
#
#   bash benchmarks/gpu.sh speed OUT     steps 1 to 3 and scoring against sentence-transformers, and without CUDA graphs
#   bash benchmarks/gpu.sh recipe OUT    three cycles from the command to the results, with the seconds of every stage
#
#   OUT                 folder for the tables, and for JSON, which is there also where the time ran out
#   --base DIR          a language model of BERT-base's size; by default a random one, which is as fast
#   --bi_encoder DIR    a bi-encoder of that size, with which the recipe begins; likewise
#   --small DIR         a bi-encoder of MiniLM's size, for speed; likewise
#   --pairs FILE        pairs of sentences, for all trainings and scorings; by default 27,000 (recipe: 37,000) random ones
#   --dev FILE          labelled pairs, for the recipe; by default 1,500 random ones
#   --smoke             the same with tiny models, on a CPU too, in a minute
set -euo pipefail
part=${1:?speed or recipe} out=${2:?folder for the results} here=$(dirname "${BASH_SOURCE[0]}") smoke=""
shift 2
declare -A given=()
while (($#)); do
  case $1 in
    --smoke) smoke=1; shift ;;
    --base | --bi_encoder | --small | --pairs | --dev) given[${1#--}]=${2:?a path after $1}; shift 2 ;;
    *) echo "gpu.sh: $1? See the head of $0" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

speed() {  # MINUTES SIZE [MODEL [BI_ENCODER]]: a table and JSON for models of a size
  local words=(--made "$2" --minutes "$1" --keep --repeats 3 --num_pairs 4800 --against peer "CUDA graphs")
  [[ ! $smoke ]] || words+=(--repeats 1 --num_pairs 256)
  [[ ! ${3:-} ]] || words+=(--plm "$3")
  [[ ! ${4:-} ]] || words+=(--bi_encoder "$4")
  [[ ! ${given[pairs]:-} ]] || words+=(--pairs "${given[pairs]}" --sentences "${given[pairs]}")
  words+=(--works "train cross-encoder (step 2)" "train bi-encoder (step 3)" "contrastive (step 1)" "score, bi-encoder")
  python "$here/compare.py" "${words[@]}" "score, cross-encoder" --json "$out/speed-$2.json" | tee "$out/speed-$2.md"
}

recipe() {  # the driver, its log and the seconds of its stages
  local models=$out/models run=$out/run began=$SECONDS size="bert-base 37000 1500 20000" epochs=10
  [[ ! $smoke ]] || size="tiny 300 100 100" epochs=1
  python - "$here" "$models" $size <<'PYTHON'
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/.."]
from compare import SIZES
from growth import make_models, make_pairs

folder, size = Path(sys.argv[2]), sys.argv[3]
make_models(folder, *SIZES[size])
for seed, (name, rows) in enumerate(zip(("pairs", "dev", "test"), map(int, sys.argv[4:]))):
    make_pairs(folder / f"{name}.parquet", rows, 3 * rows // 2, seed)
PYTHON
  cat >"$out/recipe.yaml" <<YAML
run_transencoder:
  students: [{name: bert, plm: ${given[base]:-$models/plm}, bi_encoder: ${given[bi_encoder]:-$models/bi}}]
  pairs: ${given[pairs]:-$models/pairs.parquet}
  dev: dev=${given[dev]:-$models/dev.parquet}
  tasks: [test=$models/test.parquet]
  cycles: 3
distill_cross2bi: {num_epochs: $epochs}
YAML
  rm -rf "$run"
  began=$SECONDS
  timeout -s TERM 300 bash "$here/../scripts/run_transencoder.sh" --recipe "$out/recipe.yaml" --output_dir "$run" 2>&1 |
    tee "$out/recipe.log" || echo "gpu.sh: not all of it is done"
  python - "$out" $((SECONDS - began)) <<'PYTHON' | tee "$out/recipe.md"
import json, re, sys
from pathlib import Path

folder, total = Path(sys.argv[1]), int(sys.argv[2])
found = re.findall(r"^\[\d+/\d+\] (.*): (\d+) s$", (folder / "recipe.log").read_text(), re.M)
stages = [{"stage": stage, "seconds": int(seconds)} for stage, seconds in found]
complete = (folder / "run" / "results.md").exists()
report = {"stages": stages, "total": total, "complete": complete}
(folder / "recipe.json").write_text(json.dumps(report, indent=1) + "\n")
print("| stage | seconds |\n| :--- | ---: |", *(f"| {entry['stage']} | {entry['seconds']} |" for entry in stages), sep="\n")
print(f"| all, from the command to the {'results' if complete else 'end of the time'} | {total} |")
PYTHON
}

case $part in
  speed)
    if [[ $smoke ]]; then
      speed 30 tiny
    else
      speed 3 bert-base "${given[base]:-}" "${given[bi_encoder]:-}"
      speed 1.5 minilm "${given[small]:-}" "${given[small]:-}"
    fi
    ;;
  recipe) recipe ;;
  *) echo "gpu.sh: speed or recipe, not $part" >&2; exit 2 ;;
esac
