#!/usr/bin/env python3
"""Score pairs with one or more encoders, bi or cross: pseudo-labels for a student, or simply the scores of a file.

accelerate launch scripts/score_pairs.py --encoders runs/bert/contrastive --pairs pairs.tsv --output bi-scores.parquet
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "score_pairs"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.data.pools import is_ordered, read_pool
from transencoder.errors import one_line_errors
from transencoder.labels import score_to_file, teachers_of
from transencoder.model_checks import check_encoders
from transencoder.stage import FileStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = FileStage(STAGE, __doc__, words)
    arguments = stage.arguments
    ordered = is_ordered(arguments.pairs, arguments.extra_pairs)
    stage.start("scores", **({"ordered": True} if ordered else {}))

    check_encoders(arguments.encoders, stage.options, arguments.averages(arguments.encoders))
    pairs = read_pool(arguments, arguments.drop_duplicates)
    stage.log(f"{len(pairs)} pairs")

    teachers = teachers_of(arguments, arguments.encoders, pairs, ordered)
    scores = score_to_file(teachers, pairs, stage.output, stage.inference, arguments.shard_rows, stage.metadata)
    bounds = f"from {scores.min():.3f} to {scores.max():.3f}, mean {scores.mean():.3f}"
    stage.log(f"{stage.output}: {len(scores)} scores {bounds}")
    stage.finish()


if __name__ == "__main__":
    main()
