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

from transencoder.contrastive import load_start, read_sentences, views_of
from transencoder.errors import one_line_errors
from transencoder.hub import push
from transencoder.losses import InfoNCE
from transencoder.model_checks import check_language_model
from transencoder.stage import TrainingStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = TrainingStage(STAGE, __doc__, words, push)
    arguments = stage.arguments

    # Everything that can be wrong with the input, before any weights are loaded.
    check_language_model(arguments.model_name_or_path)
    sentences = read_sentences(arguments)
    stage.begin(len(sentences), f"{len(sentences)} distinct sentences")

    encoder = load_start(arguments, stage.options)
    rows = views_of(sentences, encoder, arguments)
    stage.train(encoder, rows, InfoNCE(arguments.temperature))


if __name__ == "__main__":
    main()
