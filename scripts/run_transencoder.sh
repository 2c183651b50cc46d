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
#                       --hub_language CODE say in the cards what the base model's card does not; --push_worse publishes
#                       a bi-encoder that was measured to be worse than its start, too
#   --student NAME      of several students train only this one (name, or number from 0); the same command with each of the
#                       others, on other machines, does the rest; they meet at the scores, which the first one makes
#   --patience SECONDS  how long to wait for the others (default: 86400, a day)
#   --dry_run           say what there is to train on and roughly what it takes, print the commands that do the same by
#                       hand, run nothing
#
# Cost, with the time of one training of the cross-encoder (step 2) as the unit: step 1 is about 0.1 to 1, and each cycle
# 1 for the cross-encoder, 1 to 2 for the bi-encoder and 0.3 for labelling, times the number of students.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}") stopped=""
[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0; }
say() { echo "run_transencoder.sh: $1" >&2; }
# ended CODE WHAT: exit as a step of this script's own did. One that a signal ended has not said so itself.
ended() { (($1 < 128)) || say "$2 was ended by signal $(($1 - 128)). The same command again goes on from here."; exit "$1"; }
python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("accelerate"))' &>/dev/null || {
  say "error: $(command -v python || echo python) has not the packages of requirements.txt; activate the environment that has: source .venv/bin/activate"
  exit 2
}
trap 'stopped=1' USR1 INT  # the stage that runs gets one of its own, and ends

# plan_run.py knows the options, and prints in lines: the launcher, OMP_NUM_THREADS where it should be set, words for
# run_stages.py, and for each run its folder and the file in which a launch says how it ended.
planned=$(python "$here/plan_run.py" "$@") || ended $? "checking the recipe"
[[ " $* " != *" --dry_run "* ]] || { echo "$planned"; exit 0; }
{ read -r launcher; read -r threads; read -r words; mapfile -t runs; } <<<"$planned"
[[ ! $threads ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS-$threads}
for ((i = 0; i < ${#runs[@]}; i += 2)); do
  run=${runs[i]} outcome=${runs[i + 1]} next="again 0"
  while [[ $next == again* ]]; do  # FSDP and DeepSpeed want a launch for each stage
    rm -f "$outcome"
    # The launcher's own exit code does not tell a stop from a failure.
    # Ctrl-C is for the stage, which saves; Accelerate's launcher would leave it behind, with a traceback.
    [[ $stopped ]] || (trap '' INT; TRANSENCODER_RUN=$run $launcher "$here/run_stages.py" "$run" --remade "${next#again }" $words) || true
    next=$(cat "$outcome" 2>/dev/null) || true
  done
  [[ ! $stopped && $next != stopped ]] || { say "stopped by a signal. The same command again goes on from here."; exit 75; }
  [[ $next ]] || { { echo failed >"$outcome"; } 2>/dev/null || true; say "the launch failed (see above). The same command again goes on from here."; }
  [[ $next == summarize || $next == nothing ]] || exit 1
  rm -f "$outcome"
  [[ $next == summarize ]] || continue
  python "$here/summarize_run.py" "$run" || ended $? "the summary"
  # What goes wrong there it says itself, and how to push later.
  [[ $words != *" --push" ]] || python "$here/push_to_hub.py" "$run" </dev/null || true
  [[ $words != *" --push" ]] || sed -n '1p' "$run/results.md"  # the verdict is the last line all the same
  table+=("$run")
done
((${#runs[@]} < 4)) || python "$here/summarize_run.py" "${table[@]}" --output "$(dirname "$run")/results.md"
