#!/usr/bin/env python3
r"""Step 1: tune a pretrained language model into a bi-encoder on unlabelled sentences (SimCSE or Mirror-BERT).

accelerate launch scripts/train_contrastive.py --model_name_or_path bert-base-uncased --sentences sentences.txt \
    --output_dir runs/bert/contrastive
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "train_contrastive"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.contrastive import DropoutViews, MaskedViews, MLPHead, add_drophead
from transencoder.data.pools import input_files, read_sentence_pool
from transencoder.data.tables import sample
from transencoder.data.tasks import load_dev
from transencoder.encoders import load_bi_encoder
from transencoder.errors import one_line_errors
from transencoder.losses import InfoNCE
from transencoder.model_checks import check_language_model
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log
from transencoder.runtime.records import write_run
from transencoder.training import begin, finish, train


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments, accelerator = begin(STAGE, __doc__, words)

    # Everything that can be wrong with the input, before any weights are loaded.
    check_language_model(arguments.model_name_or_path)
    dev = load_dev(arguments)
    sentences = read_sentence_pool(arguments.sentences, arguments.data_dir, arguments.columns)
    sentences = sample(sentences, arguments.num_sentences, arguments.seed)
    arguments.count_micro_batches(len(sentences), accelerator.num_processes)
    log(f"{len(sentences)} distinct sentences")
    write_run(arguments, STAGE, "running", input_files(arguments))

    # Drophead takes the place of dropout (Mirror-BERT, section 3).
    dropout = 0.0 if arguments.drophead and arguments.dropout is None else arguments.dropout
    encoder = load_bi_encoder(arguments.model_name_or_path, model_options(arguments), dropout)
    if arguments.mlp_head:
        encoder.head = MLPHead(encoder.width)
    if arguments.drophead:
        add_drophead(encoder, arguments.drophead)
    if arguments.method == "mirror":
        rows = MaskedViews(sentences, encoder, arguments.max_length, arguments.mask_characters, arguments.seed)
    else:
        rows = DropoutViews(sentences, encoder, arguments.max_length)

    facts = train(accelerator, encoder, rows, InfoNCE(arguments.temperature), arguments, dev)
    finish(accelerator, arguments, STAGE, facts)


if __name__ == "__main__":
    main()
