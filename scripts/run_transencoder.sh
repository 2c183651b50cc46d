#!/usr/bin/env bash
# The whole method: contrastive start, then cycles of bi -> cross -> bi, then the best models, a table and a plot.
#
#   bash scripts/run_transencoder.sh --recipe recipes/quickstart.yaml --output_dir runs/quickstart
#
#   --recipe FILE       what to train on what; the other recipes are good places to start from
#   --output_dir DIR    the run; the same command again goes on where it stopped
#   --launcher CMD      how the run is started (default: "accelerate launch"); its words are split at spaces
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
#   --dry_run           print the commands that do the same by hand, run nothing
#
# Cost, with the time of one training of the cross-encoder (step 2) as the unit: step 1 is about 0.1 to 1, and each cycle
# 1 for the cross-encoder, 1 to 2 for the bi-encoder and 0.3 for labelling, times the number of students.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
launcher="accelerate launch" recipe="" run="" dry="" push="" seeds=() plan=() stages=() stopped="" outcome="" student="" threads=""
fail() { echo "run_transencoder.sh: error: $1" >&2; exit 2; }
while (($#)); do
  case $1 in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry_run) dry=1 plan+=("$1"); shift; continue ;;
    --hub_public) plan+=("$1"); shift; continue ;;
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
    --push_to_hub) push=$2 ;;
    --patience) stages+=("$1" "$2"); [[ $2 =~ ^[0-9]+$ ]] || fail "--patience $2: must be a number of seconds" ;;
    *) [[ $1 != --launcher ]] || launcher=$2
      plan+=("$1" "$2") ;;
  esac
  shift 2
done
[[ $recipe && $run ]] || fail "give --recipe FILE and --output_dir DIR (see --help)"

if ((${#seeds[@]})); then  # this script once for each, and the table of all
  [[ " ${plan[*]-} " != *" --seed "* ]] || fail "--seed and --seeds exclude one another"
  [[ " ${plan[*]-} " != *" --student "* ]] || fail "--student and --seeds exclude one another"
  [[ ! -e $run/recipe.yaml ]] || fail "--output_dir $run: holds a run of one seed; choose another folder"
  for seed in "${seeds[@]}"; do
    [[ $dry ]] || echo "Seed $seed" >&2
    bash "${BASH_SOURCE[0]}" --recipe "$recipe" --output_dir "$run/seed-$seed" --seed "$seed" \
      ${push:+--push_to_hub "$push-seed-$seed"} ${plan[@]+"${plan[@]}"} ${stages[@]+"${stages[@]}"} || exit $?
  done
  [[ $dry ]] || exec python "$here/summarize_run.py" "${seeds[@]/#/$run/seed-}" --output "$run/results.md"
  exit
fi

# ended CODE WHAT: exit as a step of this script's own did. One that a signal ended has not said so itself.
ended() {
  (($1 < 128)) || echo "run_transencoder.sh: $2 was ended by signal $(($1 - 128)). The same command again goes on from here." >&2
  exit "$1"
}
python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("accelerate"))' &>/dev/null ||
  fail "$(command -v python || echo python) has not the packages of requirements.txt; activate the environment that has: source .venv/bin/activate"
trap 'stopped=1' USR1  # the stage that runs gets one of its own, and ends

planned=$(python "$here/plan_run.py" --recipe "$recipe" --output_dir "$run" ${push:+--hub_model_id "$push"} \
  ${plan[@]+"${plan[@]}"}) || ended $? "checking the recipe"
[[ ! $dry ]] || { echo "$planned"; exit 0; }
# Where the launch says how it ended; the student's name, if it is for one; and threads: without a GPU all cores for the one
# process, to which accelerate would give one.
{ read -r outcome; read -r student; read -r threads; } <<<"$planned" || true
[[ ! $threads ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS-$threads}
[[ ! $student ]] || stages+=(--student "$student")

next="again 0"
while [[ $next == again* ]]; do
  rm -f "$outcome"
  # The launcher's own exit code does not tell a stop from a failure.
  [[ $stopped ]] || TRANSENCODER_RUN=$run $launcher "$here/run_stages.py" "$run" --remade "${next#again }" ${push:+--push} \
    ${stages[@]+"${stages[@]}"} || true
  next=$(cat "$outcome" 2>/dev/null) || true
done
if [[ $stopped || $next == stopped ]]; then
  echo "run_transencoder.sh: stopped by a signal. The same command again goes on from here." >&2
  exit 75
elif [[ ! $next ]]; then  # it was killed
  echo failed >"$outcome"
  echo "run_transencoder.sh: the launch failed (see above). The same command again goes on from here." >&2
fi
[[ $next == summarize || $next == nothing ]] || exit 1
rm -f "$outcome"
[[ $next == summarize ]] || exit 0
python "$here/summarize_run.py" "$run" || ended $? "the summary"
# What goes wrong there it says itself, and how to push later.
[[ ! $push ]] || python "$here/push_to_hub.py" "$run" </dev/null || true
