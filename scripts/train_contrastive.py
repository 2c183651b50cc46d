#!/usr/bin/env python3
r"""Step 1: tune a pretrained language model into a bi-encoder on unlabelled sentences (SimCSE, Mirror-BERT, or from a
teacher).

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

from transencoder.contrastive import load_start, read_sentences, task_of
from transencoder.errors import one_line_errors
from transencoder.hub import push
from transencoder.model_checks import check_language_model, check_step1_teacher
from transencoder.stage import TrainingStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = TrainingStage(STAGE, __doc__, words, push)
    arguments = stage.arguments

    # Everything that can be wrong with the input, before any weights are loaded.
    check_language_model(arguments.model_name_or_path)
    if arguments.teacher:
        check_step1_teacher(arguments.teacher)
    sentences = read_sentences(arguments)
    stage.begin(len(sentences), f"{len(sentences)} distinct sentences")

    encoder = load_start(arguments, stage.options)
    rows, loss_of = task_of(sentences, encoder, arguments, stage.inference)
    stage.train(encoder, rows, loss_of)


if __name__ == "__main__":
    main()
