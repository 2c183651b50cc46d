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

from torch import Tensor, nn

from transencoder.batches import SentencePairs
from transencoder.data.pools import input_files
from transencoder.data.tasks import load_dev
from transencoder.encoders import load_bi_encoder
from transencoder.errors import one_line_errors
from transencoder.labels import pseudo_labels, read_label_pairs
from transencoder.losses import BI_LOSSES
from transencoder.model_checks import check_bi_encoder
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log
from transencoder.runtime.records import write_run
from transencoder.selection import hold_out, training_rows
from transencoder.training import Batch, begin, finish, train


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments, accelerator = begin(STAGE, __doc__, words)

    check_bi_encoder(arguments.model_name_or_path, model_options(arguments))
    dev = load_dev(arguments)
    pairs = read_label_pairs(arguments, dev)
    examples = training_rows(len(pairs), arguments)
    arguments.count_micro_batches(examples, accelerator.num_processes)
    log(f"{len(pairs)} pairs, {examples} examples")
    write_run(arguments, STAGE, "running", input_files(arguments))

    labels, held_out = hold_out(pseudo_labels(arguments, pairs, accelerator), arguments)
    encoder = load_bi_encoder(arguments.model_name_or_path, model_options(arguments), arguments.dropout)
    encoder.compare_by_cosine()
    rows = SentencePairs(labels, encoder, arguments.max_length)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        first, second = model(**batch["inputs"]).chunk(2)
        return BI_LOSSES[arguments.loss].function(first, second, batch["scores"])

    facts = train(accelerator, encoder, rows, loss_of, arguments, dev, held_out)
    finish(accelerator, arguments, STAGE, facts)


if __name__ == "__main__":
    main()
