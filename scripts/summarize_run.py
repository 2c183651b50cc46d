#!/usr/bin/env python3
"""Put the best models of a run into `best/`, and write results.md and progress.png: the driver's last step.

python scripts/summarize_run.py runs/quickstart
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.arguments import StageParser
from transencoder.errors import one_line_errors
from transencoder.files import write_text
from transencoder.summary import collect_rounds, keep_best, plot_progress, summary_table

NOTES = """
Spearman's rho or AUC, x 100; a title ending in `.dev` is the set that checkpoints were chosen on. If the test pairs
were, without their labels, among the training pairs, as in the paper, these figures are *transductive*.
"""


def parse() -> argparse.Namespace:
    parser = StageParser((), __doc__)
    parser.add_argument("run", type=Path, help="folder that run_transencoder.sh filled")
    return parser.parse_args()


@one_line_errors
def main() -> None:
    run = parse().run
    rounds = collect_rounds(run)
    plot_progress(run / "progress.png", rounds)
    table, best = summary_table(rounds), keep_best(run, rounds)
    write_text(
        run / "results.md", f"# {run.name}\n\n{table}{NOTES}\n" + "\n".join(f"- {line}" for line in best) + "\n"
    )
    print(table)
    print("\n".join(best))
    print(f"Written: {run}/results.md, {run}/progress.png, {run}/best/")


if __name__ == "__main__":
    main()
