#!/usr/bin/env python3
r"""Step 3: train a bi-encoder, from its step-1 checkpoint, on a cross-encoder's scores.

accelerate launch scripts/distill_cross2bi.py --model_name_or_path runs/bert/contrastive \
    --scores cross-scores.parquet --output_dir runs/bert/cycle-1/bi-encoder
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "distill_cross2bi"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.batches import SentencePairs
from transencoder.encoders import load_bi_encoder
from transencoder.errors import one_line_errors
from transencoder.hub import push
from transencoder.labels import StudentPairs
from transencoder.losses import CosineLoss
from transencoder.model_checks import check_bi_encoder
from transencoder.stage import TrainingStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = TrainingStage(STAGE, __doc__, words, push)
    arguments = stage.arguments

    check_bi_encoder(arguments.model_name_or_path, stage.options)
    pairs = StudentPairs(arguments, stage.dev)
    stage.begin(pairs.to_train_on, f"{len(pairs)} pairs, {pairs.to_train_on} examples")

    labels, held_out = pairs.labels(stage.inference)
    encoder = load_bi_encoder(arguments.model_name_or_path, stage.options, arguments.dropout)
    encoder.compare_by_cosine()
    share, above = arguments.contrastive_share, arguments.contrastive_above
    rows = SentencePairs(labels, encoder, arguments.max_length, arguments.loss == "listwise", known=share > 0)
    loss_of = CosineLoss(arguments.loss, arguments.temperature, share, above)
    encoder.head = loss_of.head()

    stage.train(encoder, rows, loss_of, held_out)


if __name__ == "__main__":
    main()
