#!/usr/bin/env python3
"""Score pairs with one or more encoders, bi or cross: pseudo-labels for a student, or simply the scores of a file.

accelerate launch scripts/score_pairs.py --encoders runs/bert/contrastive --pairs pairs.tsv --output bi-scores.parquet
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "score_pairs"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.config.parsing import parse_stage
from transencoder.data.pools import check_both_orders, is_ordered, read_pool
from transencoder.errors import one_line_errors
from transencoder.labels import check_output, score_to_file, scores_are_there
from transencoder.model_files import check_encoders
from transencoder.runtime.accelerator import end, log, log_next, start
from transencoder.runtime.records import identity
from transencoder.scoring import Teachers


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments = parse_stage(STAGE, __doc__, words)
    output, facts = Path(arguments.output), identity(arguments)
    ordered = is_ordered(arguments.pairs, arguments.extra_pairs)
    facts |= {"ordered": True} if ordered else {}
    check_both_orders(arguments.both_orders, ordered)
    check_output(output)
    if not arguments.overwrite and scores_are_there(output, facts):
        return log(f"{output} is complete already")
    accelerator = start(arguments)

    check_encoders(arguments.encoders, arguments.pooling)
    pairs = read_pool(arguments, arguments.drop_duplicates)
    log(f"{len(pairs)} pairs")

    teachers = Teachers(
        arguments.encoders,
        arguments.teacher_weights,
        arguments.pooling,
        arguments.both_orders,
        arguments.lexical_weight,
    )
    batch_tokens, shard_rows = arguments.eval_batch_tokens, arguments.shard_rows
    scores = score_to_file(teachers, pairs, output, accelerator, batch_tokens, shard_rows, facts)
    log(f"{output}: {len(scores)} scores from {scores.min():.3f} to {scores.max():.3f}, mean {scores.mean():.3f}")
    log_next(f"distill_bi2cross.py, or distill_cross2bi.py, --scores {shlex.quote(arguments.output)}")
    end(accelerator)


if __name__ == "__main__":
    main()
