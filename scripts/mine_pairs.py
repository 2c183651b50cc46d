#!/usr/bin/env python3
r"""Find candidate pairs among sentences: near ones by words and by a bi-encoder, less near ones, and random ones.

accelerate launch scripts/mine_pairs.py --encoders runs/bert/contrastive --sentences sentences.txt \
    --output pairs.parquet

A mix of your own: --mix lexical:1-10=1 nearest:1-3=2 nearest:4-20=1 random=0.5
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "mine_pairs"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.config.parsing import parse_stage
from transencoder.data.pools import input_files, read_sentence_pool
from transencoder.data.scores import check_output, is_made
from transencoder.errors import one_line_errors
from transencoder.model_checks import check_bi_encoder
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import end, log, log_next, start
from transencoder.runtime.records import identity
from transencoder.search.mining import mine_to_file
from transencoder.search.mix import Sides, parse_mix, wanted_pairs


@one_line_errors
def main(words: list[str] | None = None) -> None:
    arguments = parse_stage(STAGE, __doc__, words)
    output, metadata = Path(arguments.output), identity(arguments, input_files(arguments))
    sources = parse_mix(arguments.mix)
    check_output(output)
    if not arguments.overwrite and is_made(output, metadata, "pairs"):
        return log(f"{output} is complete already")
    accelerator = start(arguments)

    for name in arguments.encoders:
        check_bi_encoder(name, model_options(arguments))
    first = read_sentence_pool(arguments.sentences, arguments.data_dir, arguments.columns)
    second = first
    if arguments.sentences_b:
        second = read_sentence_pool(arguments.sentences_b, arguments.data_dir, arguments.columns)
    sides = Sides(first, second)
    wanted = wanted_pairs(sources, arguments.num_pairs, sides)
    log(f"{len(first)} sentences{'' if sides.single else f' and {len(second)}'}, {sum(wanted)} pairs wanted")

    mine_to_file(arguments, sides, accelerator, metadata)
    log_next(f"score_pairs.py --encoders DIR --pairs {shlex.quote(arguments.output)} --output FILE.parquet")
    end(accelerator)


if __name__ == "__main__":
    main()
