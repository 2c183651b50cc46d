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
from transencoder.data.pools import check_both_orders, input_files, is_ordered, read_pool
from transencoder.data.scores import check_output, is_made
from transencoder.errors import one_line_errors
from transencoder.inference import Inference
from transencoder.labels import score_to_file
from transencoder.model_checks import check_encoders
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import end, log, log_next, start
from transencoder.runtime.records import identity
from transencoder.scoring import Teachers


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments = parse_stage(STAGE, __doc__, words)
    output, metadata = Path(arguments.output), identity(arguments, input_files(arguments))
    ordered = is_ordered(arguments.pairs, arguments.extra_pairs)
    metadata |= {"ordered": True} if ordered else {}
    check_both_orders(arguments.both_orders, ordered)
    check_output(output)
    if not arguments.overwrite and is_made(output, metadata):
        return log(f"{output} is complete already")
    accelerator = start(arguments)

    options = model_options(arguments)
    check_encoders(arguments.encoders, options)
    pairs = read_pool(arguments, arguments.drop_duplicates)
    log(f"{len(pairs)} pairs")

    teachers = Teachers(
        arguments.encoders,
        arguments.teacher_weights,
        options,
        arguments.both_orders,
        arguments.lexical_weight,
    )
    inference = Inference(accelerator, arguments.eval_batch_tokens)
    scores = score_to_file(teachers, pairs, output, inference, arguments.shard_rows, metadata)
    log(f"{output}: {len(scores)} scores from {scores.min():.3f} to {scores.max():.3f}, mean {scores.mean():.3f}")
    log_next(f"distill_bi2cross.py, or distill_cross2bi.py, --scores {shlex.quote(arguments.output)}")
    end(accelerator)


if __name__ == "__main__":
    main()
