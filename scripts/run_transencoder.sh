#!/usr/bin/env bash
# The whole method: contrastive start, then cycles of bi -> cross -> bi, then the best models, a table and a plot.
#
#   bash scripts/run_transencoder.sh --recipe recipes/quickstart.yaml --output_dir runs/quickstart
#
#   --recipe FILE       what to train on what; the other recipes are good places to start from
#   --output_dir DIR    the run; the same command again goes on where it stopped
#   --launcher CMD      how a stage is started (default: "accelerate launch"); its words are split at spaces
#   --plm [NAME=]MODEL  a language model in place of the recipe's: Hub id or folder; NAME is the student, where there are several
#   --bi_encoder [NAME=]MODEL    the same for a ready bi-encoder
#   --data_dir DIR      the folder of tasks and pools in place of the recipe's
#   --seed N            a seed in place of the recipe's
#   --seeds N N ...     a run for each seed, in DIR/seed-N; their mean and standard deviation in DIR/results.md
#   --push_to_hub NAME  ORG/NAME: push each cycle's models to ORG/NAME-bi and ORG/NAME-cross, beside the work (--seeds: to
#                       ORG/NAME-seed-N-bi, ...); with --hub_public for everybody to see; --hub_license ID and
#                       --hub_language CODE say in the cards what the base model's card does not
#   --student NAME      of several students train only this one (name, or number from 0); the same command with each of the
#                       others, on other machines, does the rest; they meet at the scores, which the first one makes
#   --patience SECONDS  how long to wait for the others (default: 86400, a day)
#   --dry_run           print the commands, run nothing
#
# Cost, with the time of one training of the cross-encoder (step 2) as the unit: step 1 is about 0.1 to 1, and each cycle
# 1 for the cross-encoder, 1 to 2 for the bi-encoder and 0.3 for labelling, times the number of students.
set -euo pipefail

# PyTorch's threads wait for one another by spinning, by default so long that on a machine with other work they take the
# processor from the very thread they wait for: training of a tiny model is then ten times slower. So short a spin costs an idle
# machine next to nothing.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-10000}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launcher="accelerate launch" recipe="" run="" dry="" push="" pusher="" student="" patience=86400 plan_flags=() seed=() seeds=()

fail() { echo "run_transencoder.sh: error: $1" >&2; exit 2; }

# ended CODE WHAT: exit as a step of this script's own did. One that a signal ended has not said so itself.
ended() {
  (($1 < 128)) || echo "run_transencoder.sh: $2 was ended by signal $(($1 - 128)). The same command again goes on from here." >&2
  exit "$1"
}
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry_run) dry=1; plan_flags+=(--dry_run); shift; continue ;;
    --hub_public) plan_flags+=(--hub_public); shift; continue ;;
    --seeds) shift; while (($#)) && [[ $1 != --* ]]; do seeds+=("$1"); shift; done
      ((${#seeds[@]} > 1)) || fail "--seeds needs two or more numbers"
      continue ;;
    --recipe | --output_dir | --launcher | --plm | --bi_encoder | --data_dir | --seed | --push_to_hub | --hub_license | \
      --hub_language | --student | --patience) (($# > 1)) || fail "$1 needs a value" ;;
    *) fail "unknown argument $1 (see --help)" ;;
  esac
  case $1 in
    --recipe) recipe=$2 ;;
    --output_dir) run=${2%/} ;;
    --launcher) launcher=$2 ;;
    --plm | --bi_encoder | --data_dir | --hub_license | --hub_language) plan_flags+=("$1" "$2") ;;
    --push_to_hub) push=$2 ;;
    --student) student=$2 ;;
    --patience) patience=$2 ;;
    --seed) plan_flags+=(--seed "$2") seed=(--seed "$2") ;;
  esac
  shift 2
done
[[ $recipe && $run ]] || fail "give --recipe FILE and --output_dir DIR (see --help)"
[[ $patience =~ ^[0-9]+$ ]] || fail "--patience $patience: must be a number of seconds"

# Several seeds: this script once for each, and the table of all.
if ((${#seeds[@]})); then
  ((${#seed[@]} == 0)) || fail "--seed and --seeds exclude one another"
  [[ ! $student ]] || fail "--student and --seeds exclude one another"
  [[ ! -e $run/recipe.yaml ]] || fail "--output_dir $run: holds a run of one seed; choose another folder"
  for number in "${seeds[@]}"; do
    [[ $dry ]] || echo "Seed $number" >&2
    bash "${BASH_SOURCE[0]}" --recipe "$recipe" --output_dir "$run/seed-$number" --launcher "$launcher" --seed "$number" \
      ${push:+--push_to_hub "$push-seed-$number"} ${plan_flags[@]+"${plan_flags[@]}"} || exit $?
  done
  [[ $dry ]] || python "$here/summarize_run.py" "${seeds[@]/#/$run/seed-}" --output "$run/results.md"
  exit
fi
read -ra launcher <<<"$launcher"

python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("accelerate"))' &>/dev/null ||
  fail "$(command -v python || echo python) has not the packages of requirements.txt; activate the environment that has: source .venv/bin/activate"

# Checks the recipe and everything it names, and defines CYCLES, NAMES, PAIRS, ... (one array element for each student).
plan=$(python "$here/plan_run.py" --recipe "$recipe" --output_dir "$run" ${push:+--hub_model_id "$push"} \
  ${plan_flags[@]+"${plan_flags[@]}"}) || ended $? "checking the recipe"
eval "$plan"
# Without a GPU: all cores for the one process, to which accelerate would give one.
[[ ! $THREADS || ${launcher[*]} != "accelerate launch" ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS-$THREADS}
[[ $dry ]] || recipe=$run/recipe.yaml

# Which student this is: its place among them, or nothing where one script trains all.
if [[ $student ]]; then
  for i in "${!NAMES[@]}"; do [[ ${NAMES[i]} != "$student" ]] || student=$i; done
  [[ $student =~ ^[0-9]+$ ]] && ((student < ${#NAMES[@]})) || fail "--student $student: $recipe has the students ${NAMES[*]}"
  [[ $dry ]] || rm -f "$run/.failed-${NAMES[student]}"
fi
stopped=""
trap 'stopped=1' USR1  # the stage that runs gets one of its own, and ends

students=${#NAMES[@]} done_count=0 redone="" mined=0
total=$((1 + CYCLES * (ALTERNATE ? 3 + 2 * students : 2 + students)))
((${#TASKS[@]})) || total=$((total - 1 - CYCLES))
((${#PAIRS[@]})) || total=$((total + (REMINE ? CYCLES : 1)))
for ready in "${READY_BI[@]}"; do [[ $ready ]] || total=$((total + 1)); done

# A Parquet file appears when it is whole; a folder says so in run.json, to its last brace, and holds what the stage makes.
is_complete() {
  if [[ $1 == *.parquet ]]; then
    [[ -f $1 ]]
  else
    grep -qs '"status": "complete"' "$1/run.json" && [[ $(tail -n 1 "$1/run.json") == "}" ]] &&
      { compgen -G "$1/model*.safetensors" || [[ -f $1/results.json ]]; } >/dev/null
  fi
}

# Ends this script where it was asked to stop.
stop_if_asked() {
  [[ ! $stopped ]] || { echo "run_transencoder.sh: stopped by a signal. The same command again goes on from here." >&2; exit 75; }
}

# await OWNER TITLE OUTPUT: wait for what another student makes.
await() {
  local name=${NAMES[$1]} since=$SECONDS
  is_complete "$3" || echo "[$done_count/$total] $2: waiting for $name" >&2
  until is_complete "$3"; do
    stop_if_asked
    [[ ! -e $run/.failed-$name ]] || { echo "run_transencoder.sh: '$2' failed at $name; start both again" >&2; exit 1; }
    ((SECONDS - since < patience)) || { echo "run_transencoder.sh: no '$2' from $name in $patience s (--patience)" >&2; exit 1; }
    sleep 2
  done
}

# measure TITLE FOLDER ENCODER...: the tables of some encoders, where the recipe names anything to measure them on.
measure() {
  local title=$1 folder=$2
  shift 2
  ((${#TASKS[@]})) || return 0
  stage 0 "$title" "$folder" evaluate_encoders.py --encoders "$@" --tasks "${TASKS[@]}" "${DATA[@]}" "${ENSEMBLES[@]}" \
    --output_dir "$folder"
}

# stage OWNER TITLE OUTPUT SCRIPT ARGUMENT...: run a script unless its output is complete. OWNER is the student whose stage it
# is; what all share is the first one's.
stage() {
  local owner=$1 title=$2 output=$3 script=$4
  shift 4
  done_count=$((done_count + 1))
  if [[ $student && ! $dry ]] && ((owner != student)); then
    [[ $script == evaluate_encoders.py ]] || await "$owner" "$title" "$output"  # nothing is made from a table
    return
  fi
  stop_if_asked
  local command=("${launcher[@]}" "$here/$script" --recipe "$recipe" "$@" ${seed[@]+"${seed[@]}"})
  if [[ $dry ]]; then
    printf '%q ' "${command[@]}"; echo
    return
  fi
  if [[ ! $redone ]] && is_complete "$output"; then
    echo "[$done_count/$total] $title: done before" >&2
    rm -rf "$output/checkpoints" "${output%/*}/.${output##*/}".{parts,lock}  # where a kill came before these were removed
    return
  fi
  [[ $redone && -e $output ]] && command+=(--overwrite)
  redone=1  # what comes after was made from what is now made anew
  echo "[$done_count/$total] $title" >&2
  local started=$SECONDS
  TRANSENCODER_RUN=$run "${command[@]}" || {
    stop_if_asked
    [[ ! $student ]] || touch "$run/.failed-${NAMES[student]}"
    echo "run_transencoder.sh: '$title' failed (see above). The same command again goes on from here." >&2
    exit 1
  }
  echo "[$done_count/$total] $title: $((SECONDS - started)) s" >&2
}

# adds_nothing CYCLE: whether its labels are, but for the recipe's stop_at, those of the cycle before.
adds_nothing() {
  [[ $STOP_AT && ! $dry ]] && (($1 > 1)) || return
  local agreement
  agreement=$(python "$here/compare_scores.py" "$run/cycle-$(($1 - 1))/bi-scores.parquet" "$run/cycle-$1/bi-scores.parquet") || exit $?
  awk -v a="$agreement" -v b="$STOP_AT" 'BEGIN { exit !(a >= b) }' || return
  echo "The labels of cycle $1 agree with those of cycle $(($1 - 1)) by $agreement (stop_at $STOP_AT): the loop ends." >&2
}

# Pushes what is finished, in a process of its own, so that neither a slow nor a broken network costs the run anything. What
# one push leaves out the next makes up for; only the last one is waited for.
push() {
  if [[ ! $push || $dry ]] || ((${student:-0})) || { [[ $pusher ]] && kill -0 "$pusher" 2>/dev/null; }; then return; fi
  python "$here/push_to_hub.py" "$run" </dev/null &
  pusher=$!
}

# Step 1: one bi-encoder for each student, unless the recipe names a ready one.
bi=()
for i in "${!NAMES[@]}"; do
  if [[ ${READY_BI[i]} ]]; then
    bi+=("${READY_BI[i]}")
    continue
  fi
  eval "options=(${STEP1_OPTIONS[i]})"
  bi+=("$run/contrastive/${NAMES[i]}")
  stage "$i" "contrastive start of ${NAMES[i]}" "${bi[i]}" train_contrastive.py --model_name_or_path "${STEP1_PLMS[i]}" \
    --sentences "${SENTENCES[@]}" "${DEV[@]}" --output_dir "${bi[i]}" "${options[@]}"
done
start=("${bi[@]}")
# What the students of the next cycle begin with.
bi_from=("${start[@]}") cross_from=("${CROSS_PLMS[@]}") carry=()
measure "measure the start" "$run/start" "${start[@]}"
push

for ((cycle = 1; cycle <= CYCLES; cycle++)); do
  folder=$run/cycle-$cycle cross=()

  # Without pairs of its own the recipe's sentences are mined: once, with the start, or again with each better bi-encoder.
  if ((${#PAIRS[@]} == 0 || mined)) && ((cycle == 1 || REMINE)); then
    mined=1 PAIRS=("$folder/pairs.parquet")
    stage 0 "cycle $cycle: mine pairs" "${PAIRS[0]}" mine_pairs.py --encoders "${bi[@]}" "${SIDES[@]}" "${DATA[@]}" --output "${PAIRS[0]}"
  fi

  # Step 2: the bi-encoders' mean score labels the pairs; each student's cross-encoder starts from its raw language model.
  # Plain self-distillation leaves the cross-encoder out.
  stage 0 "cycle $cycle: label with the bi-encoder" "$folder/bi-scores.parquet" score_pairs.py --encoders "${bi[@]}" \
    --pairs "${PAIRS[@]}" --drop_duplicates --output "$folder/bi-scores.parquet"
  adds_nothing "$cycle" && break
  labels=$folder/bi-scores.parquet
  if [[ $ALTERNATE ]]; then
    for i in "${!NAMES[@]}"; do
      eval "options=(${CROSS_OPTIONS[i]})"
      cross+=("$folder/cross-encoder/${NAMES[i]}")
      stage "$i" "cycle $cycle: cross-encoder of ${NAMES[i]}" "${cross[i]}" distill_bi2cross.py "${DEV[@]}" "${carry[@]}" \
        --model_name_or_path "${cross_from[i]}" --scores "$labels" --output_dir "${cross[i]}" "${options[@]}"
    done
    labels=$folder/cross-scores.parquet
    stage 0 "cycle $cycle: label with the cross-encoder" "$labels" score_pairs.py --encoders "${cross[@]}" \
      --pairs "${PAIRS[@]}" --drop_duplicates --output "$labels"
  fi

  # Step 3: the cross-encoders' mean score labels the pairs; each student's bi-encoder starts from its step-1 checkpoint.
  for i in "${!NAMES[@]}"; do
    eval "options=(${BI_OPTIONS[i]})"
    bi[i]=$folder/bi-encoder/${NAMES[i]}
    stage "$i" "cycle $cycle: bi-encoder of ${NAMES[i]}" "${bi[i]}" distill_cross2bi.py "${DEV[@]}" \
      --model_name_or_path "${bi_from[i]}" --scores "$labels" --output_dir "${bi[i]}" "${options[@]}"
  done
  if [[ $CARRY_OVER ]]; then bi_from=("${bi[@]}") cross_from=("${cross[@]}") carry=(--carry_over=True); fi

  measure "cycle $cycle: measure" "$folder" "${cross[@]}" "${bi[@]}"
  push
done

((${student:-0} == 0)) || exit 0
[[ $dry ]] || python "$here/summarize_run.py" "$run" || ended $? "the summary"
[[ ! $pusher ]] || wait "$pusher" || true
push
[[ ! $pusher ]] || wait "$pusher" || true  # it has said what went wrong, and how to push later
