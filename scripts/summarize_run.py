#!/usr/bin/env python3
"""Put the best models of a run into `best/`, write results.md and progress.png, and end with the verdict.

Without a dev set the models are the last ones, in `last/`.

python scripts/summarize_run.py runs/quickstart

Of several runs that differ in their seed only, it prints means and standard deviations, which --output keeps.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.parsing import StageParser
from transencoder.errors import InputError, one_line_errors
from transencoder.evaluation import origin
from transencoder.run.layout import SEARCH_FILE, Layout
from transencoder.run.summary import (
    Round,
    below_start,
    collect_rounds,
    dev_of,
    keep_best,
    plot_progress,
    summary_table,
)
from transencoder.run.verdict import Verdict, judge, judge_on, judge_unlabelled
from transencoder.runtime.accelerator import log_next
from transencoder.runtime.files import write_json, write_text

NOTES = """
Spearman's rho or AUC, x 100; a title ending in `.dev` is the set that checkpoints were chosen on. If the test pairs
were, without their labels, among the training pairs, as in the paper, these figures are *transductive*.
"""


def parse() -> argparse.Namespace:
    parser = StageParser((), __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that run_transencoder.sh filled")
    parser.add_argument("--output", type=Path, help="Markdown file for the table of several runs")
    parser.add_argument("--tasks", nargs="+", help="labelled pairs for the verdict that the recipe does not name")
    return parser.parse_args()


def table_of(runs: list[list[Round]], judged: bool = False) -> tuple[str, str, str]:
    """One run's or several runs' table, what it shows, and what it was measured with."""
    if not runs[0][0].values:
        measured = "Only start and end were compared" if judged else "Nothing was measured"
        return f"{measured}: the recipe names neither `tasks` nor `dev`.\n", "", ""
    entries = [entry for rounds in runs for round_ in rounds for entry in round_.entries]
    return summary_table(runs), NOTES, origin(entries)


def verdict_of(run: Path, rounds: list[Round], tasks: list[str] | None) -> Verdict:
    if tasks:
        return judge_on(run, rounds, tasks)
    return judge(run, rounds) if rounds[0].values else judge_unlabelled(run, rounds)


def write_summary(run: Path, rounds: list[Round], tasks: list[str] | None) -> None:
    verdict = verdict_of(run, rounds, tasks)
    table, notes, made = table_of([rounds], bool(verdict.gains))
    best = keep_best(run, rounds)
    layout = Layout(run)
    models = layout.final(dev_of(rounds) is not None)
    below = below_start(rounds)
    lines = "\n".join(f"- {line}" for line in [*verdict.notes, *best, *below])
    write_text(layout.table, f"{verdict.line}\n\n# {run.name}\n\n{table}{notes}\n{lines}\n\n{made}")
    rows = [{name: value for name, value in vars(round_).items() if name != "entries"} for round_ in rounds]
    write_json(layout.summary, {**verdict.as_json(), "encoders": rows})
    if verdict.search:
        write_json(models / SEARCH_FILE, verdict.search)
    print(table)
    print("\n".join([*best, *below]))
    written = [f"{layout.table}", f"{layout.summary}", f"{models}/"]
    if rounds[0].values:  # last, as the library that draws may be missing
        plot_progress(layout.plot, rounds, verdict.gains)
        written.insert(2, f"{layout.plot}")
    print(f"Written: {', '.join(written)}")
    log_next("scripts/search.py and scripts/find_duplicates.py use them, scripts/push_to_hub.py publishes them")
    print("\n".join([*verdict.notes, verdict.line]), flush=True)


@one_line_errors
def main() -> None:
    arguments = parse()
    runs = arguments.runs
    if len({os.path.realpath(run) for run in runs}) < len(runs):
        raise InputError(f"{' '.join(map(str, runs))}: give each run once")
    collected = [collect_rounds(run) for run in runs]
    if len(runs) == 1:
        return write_summary(runs[0], collected[0], arguments.tasks)
    table, notes, made = table_of(collected)
    lines = [verdict_of(run, rounds, arguments.tasks).line for run, rounds in zip(runs, collected, strict=True)]
    verdicts = [f"{run.name}: {line}" for run, line in zip(runs, lines, strict=True)]
    print("\n".join([table, *verdicts]))
    if arguments.output:
        names = ", ".join(run.name for run in runs)
        heading = f"# {arguments.output.absolute().parent.name}\n\nMean ± standard deviation of {names}.\n\n"
        lines = "".join(f"- {verdict}\n" for verdict in verdicts)
        write_text(arguments.output, f"{heading}{table}{notes}\n{lines}\n{made}")
        print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
