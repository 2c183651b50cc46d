#!/usr/bin/env bash
# One cycle of the method by hand: what run_transencoder.sh does, command by command, on the bundled questions.
#
#   bash examples/steps.sh MODEL RUN [OPTION ...]      # such as bert-base-uncased runs/steps; options: of the trainings
set -euo pipefail

model=$1 run=$2
shift 2
here=$(dirname "${BASH_SOURCE[0]}")
stage() { accelerate launch "$here/../scripts/$1.py" "${@:2}"; }
dev=(--dev "questions.dev=$here/pairs.dev.tsv")
tasks=(--tasks "questions.dev=$here/pairs.dev.tsv" "questions=$here/pairs.test.tsv")

# Step 1: sentences -> bi-encoder.
stage train_contrastive --model_name_or_path "$model" --sentences "$here/sentences.txt" "${dev[@]}" \
  --output_dir "$run/start" --pooling mean "$@"
# Candidate pairs, where there are none, and the bi-encoder's scores of them.
stage mine_pairs --encoders "$run/start" --sentences "$here/sentences.txt" --output "$run/pairs.parquet"
stage score_pairs --encoders "$run/start" --pairs "$run/pairs.parquet" --output "$run/bi-scores.parquet"
# Step 2: those scores and the raw language model -> cross-encoder, which scores the pairs anew.
stage distill_bi2cross --model_name_or_path "$model" --scores "$run/bi-scores.parquet" "${dev[@]}" \
  --output_dir "$run/cross-encoder" "$@"
stage score_pairs --encoders "$run/cross-encoder" --pairs "$run/pairs.parquet" --output "$run/cross-scores.parquet"
# Step 3: those scores and the bi-encoder of step 1 -> a better bi-encoder. The next cycle begins with it.
stage distill_cross2bi --model_name_or_path "$run/start" --scores "$run/cross-scores.parquet" "${dev[@]}" \
  --output_dir "$run/bi-encoder" "$@"
stage evaluate_encoders --encoders "$run/start" "$run/cross-encoder" "$run/bi-encoder" "${tasks[@]}" \
  --output_dir "$run/results"
