#!/usr/bin/env python3
r"""Step 2: train a cross-encoder, from a language model or another cross-encoder, on a bi-encoder's scores.

accelerate launch scripts/distill_bi2cross.py --model_name_or_path bert-base-uncased --scores bi-scores.parquet \
    --output_dir runs/bert/cycle-1/cross-encoder
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "distill_bi2cross"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from typing import Any

from torch import Tensor, nn

from transencoder.batches import PairInputs
from transencoder.encoders import load_cross_encoder_start
from transencoder.errors import one_line_errors
from transencoder.hub import push
from transencoder.labels import StudentPairs
from transencoder.losses import CROSS_LOSSES
from transencoder.model_checks import check_cross_encoder_start
from transencoder.stage import TrainingStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = TrainingStage(STAGE, __doc__, words, push)
    arguments = stage.arguments

    check_cross_encoder_start(arguments.model_name_or_path)
    pairs = StudentPairs(arguments, stage.dev)
    examples = pairs.to_train_on * (2 if pairs.swap else 1)
    stage.begin(examples, f"{len(pairs)} pairs, {examples} examples")

    labels, held_out = pairs.labels(stage.inference)
    encoder = load_cross_encoder_start(arguments.model_name_or_path, arguments.dropout)
    targets = {"rescale": arguments.rescale, "negatives": arguments.negatives}
    rows = PairInputs(labels, encoder, arguments.max_length, pairs.swap, **targets)

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return CROSS_LOSSES[arguments.loss].function(model(**batch["inputs"]), batch["scores"])

    stage.train(encoder, rows, loss_of, held_out, swap=pairs.swap)


if __name__ == "__main__":
    main()
