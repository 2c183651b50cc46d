#!/usr/bin/env python3
r"""Step 2: train a cross-encoder, from a raw language model, on a bi-encoder's scores.

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

from accelerate.utils import set_seed
from torch import Tensor, nn

from transencoder.batches import PairInputs
from transencoder.data.pools import input_files, swap_of
from transencoder.data.tasks import load_dev
from transencoder.encoders import load_cross_encoder
from transencoder.errors import one_line_errors
from transencoder.labels import order_matters, pseudo_labels, read_label_pairs
from transencoder.losses import CROSS_LOSSES, bce_targets
from transencoder.model_checks import check_cross_encoder, check_language_model
from transencoder.runtime.accelerator import log
from transencoder.runtime.records import write_run
from transencoder.selection import hold_out, training_rows
from transencoder.training import Batch, begin, finish, train


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments, accelerator = begin(STAGE, __doc__, words)

    if arguments.carry_over:
        check_cross_encoder(arguments.model_name_or_path, "--carry_over")
    else:
        check_language_model(arguments.model_name_or_path)
    dev = load_dev(arguments)
    pairs = read_label_pairs(arguments, dev)
    swap = swap_of(arguments.swap, order_matters(arguments))
    examples = training_rows(len(pairs), arguments) * (2 if swap else 1)
    arguments.count_micro_batches(examples, accelerator.num_processes)
    log(f"{len(pairs)} pairs, {examples} examples")
    write_run(arguments, STAGE, "running", input_files(arguments))

    labels, held_out = hold_out(pseudo_labels(arguments, pairs, accelerator), arguments)
    set_seed(arguments.seed)  # again: the head is random, and teachers may have drawn numbers
    encoder = load_cross_encoder(arguments.model_name_or_path, dropout=arguments.dropout)
    rows = PairInputs(labels, encoder, arguments.max_length, swap)
    rows.scores = bce_targets(rows.scores, arguments.rescale, arguments.negatives)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return CROSS_LOSSES[arguments.loss].function(model(**batch["inputs"]), batch["scores"])

    facts = train(accelerator, encoder, rows, loss_of, arguments, dev, held_out)
    finish(accelerator, arguments, STAGE, {**facts, "swap": swap})


if __name__ == "__main__":
    main()
