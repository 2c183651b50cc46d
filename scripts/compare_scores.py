#!/usr/bin/env python3
"""Print how far two files of scores of the same pairs agree: Spearman's rho, -1 to 1.

python scripts/compare_scores.py runs/bert/cycle-1/bi-scores.parquet runs/bert/cycle-2/bi-scores.parquet

Where a cycle's labels are nearly those of the cycle before, it adds nothing; the driver stops there (`stop_at`).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import StageParser
from transencoder.errors import one_line_errors
from transencoder.selection import agreement


def parse() -> argparse.Namespace:
    parser = StageParser((), __doc__)
    parser.add_argument("first", type=Path, help="scores, as score_pairs.py writes them")
    parser.add_argument("second", type=Path, help="scores of the same pairs")
    return parser.parse_args()


@one_line_errors
def main() -> None:
    arguments = parse()
    print(agreement(arguments.first, arguments.second))


if __name__ == "__main__":
    main()
