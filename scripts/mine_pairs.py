#!/usr/bin/env python3
r"""Find candidate pairs among sentences: near ones by words and by a bi-encoder, less near ones, and random ones.

accelerate launch scripts/mine_pairs.py --encoders runs/bert/contrastive --sentences sentences.txt \
    --output pairs.parquet

A mix of your own: --mix lexical:1-10=1 nearest:1-3=2 nearest:4-20=1 random=0.5
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import answer_early

STAGE = "mine_pairs"
if __name__ == "__main__":
    answer_early(STAGE, __doc__)

from transencoder.errors import one_line_errors
from transencoder.search.mining import check_mining, mine_to_file
from transencoder.search.mix import parse_mix, read_sides, wanted_pairs
from transencoder.stage import FileStage


@one_line_errors
def main(words: list[str] | None = None) -> None:
    stage = FileStage(STAGE, __doc__, words)
    arguments = stage.arguments
    sources = parse_mix(arguments.mix)
    stage.start("pairs")
    check_mining(arguments)

    sides = read_sides(arguments.sentences, arguments.sentences_b, arguments.data_dir, arguments)
    wanted = wanted_pairs(sources, arguments.num_pairs, sides)
    sizes = f"{len(sides.first)} sentences" + ("" if sides.single else f" and {len(sides.second)}")
    stage.log(f"{sizes}, {sum(wanted)} pairs wanted")

    mine_to_file(arguments, sides, stage.accelerator, stage.metadata)
    stage.finish()


if __name__ == "__main__":
    main()
