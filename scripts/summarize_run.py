#!/usr/bin/env python3
"""Put the best models of a run into `best/`, and write results.md and progress.png: the driver's last step.

python scripts/summarize_run.py runs/quickstart

Of several runs that differ in their seed only, it prints means and standard deviations, which --output keeps.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.errors import one_line_errors
from transencoder.evaluation import origin
from transencoder.files import write_text
from transencoder.parsing import StageParser
from transencoder.runtime import log_next
from transencoder.summary import Round, collect_rounds, keep_best, plot_progress, summary_table

NOTES = """
Spearman's rho or AUC, x 100; a title ending in `.dev` is the set that checkpoints were chosen on. If the test pairs
were, without their labels, among the training pairs, as in the paper, these figures are *transductive*.
"""


def parse() -> argparse.Namespace:
    parser = StageParser((), __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that run_transencoder.sh filled")
    parser.add_argument("--output", type=Path, help="Markdown file for the table of several runs")
    return parser.parse_args()


def write_summary(run: Path, rounds: list[Round]) -> None:
    measured, written = bool(rounds[0].values), [f"{run}/results.md", f"{run}/best/"]
    table, notes = "Nothing was measured: the recipe names neither `tasks` nor `dev`.\n", ""
    if measured:
        plot_progress(run / "progress.png", rounds)
        written.insert(1, f"{run}/progress.png")
        table, notes = summary_table([rounds]), NOTES
    best = keep_best(run, rounds)
    lines = "\n".join(f"- {line}" for line in best)
    made = origin([entry for round_ in rounds for entry in round_.entries]) if measured else ""
    write_text(run / "results.md", f"# {run.name}\n\n{table}{notes}\n{lines}\n\n{made}")
    print(table)
    print("\n".join(best))
    print(f"Written: {', '.join(written)}")
    log_next("scripts/search.py and scripts/find_duplicates.py use them, scripts/push_to_hub.py publishes them")


@one_line_errors
def main() -> None:
    arguments = parse()
    runs = arguments.runs
    collected = [collect_rounds(run) for run in runs]
    if len(runs) == 1:
        return write_summary(runs[0], collected[0])
    table = summary_table(collected)
    print(table)
    if arguments.output:
        names = ", ".join(run.name for run in runs)
        text = (
            f"# {arguments.output.absolute().parent.name}\n\nMean ± standard deviation of {names}.\n\n{table}{NOTES}\n"
        )
        text += origin([entry for rounds in collected for round_ in rounds for entry in round_.entries])
        write_text(arguments.output, text)
        print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
