#!/usr/bin/env python3
r"""Measure encoders, or an ensemble of them, on labelled pairs: Spearman and Pearson, or AUC, all x 100.

accelerate launch scripts/evaluate_encoders.py --encoders runs/bert/contrastive runs/bert/best/bi-encoder \
    --tasks stsb sts16 mine=pairs.test.tsv --data_dir data --output_dir runs/bert/evaluation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "evaluate_encoders"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.data.paper import check_setting
from transencoder.data.tasks import load_tasks
from transencoder.errors import one_line_errors
from transencoder.evaluation import write_results
from transencoder.model_checks import check_encoders
from transencoder.scoring import Teachers
from transencoder.stage import EvaluationStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = EvaluationStage(STAGE, __doc__, words)
    arguments = stage.arguments
    stage.start()

    check_encoders(arguments.encoders, stage.options)
    if arguments.paper:
        check_setting(arguments.paper, "--paper")
    tasks = load_tasks(arguments.tasks, arguments.data_dir, arguments)
    stage.begin()

    sets = [task.pairs for task in tasks]
    scores = [Teachers([name], options=stage.options).score(sets, stage.inference) for name in arguments.encoders]
    stage.start_trackers()
    write_results(arguments, tasks, scores, stage.accelerator)
    stage.finish()


if __name__ == "__main__":
    main()
