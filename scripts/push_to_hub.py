#!/usr/bin/env python3
"""Push what a run or a training stage made, and is not there yet, to the Hub; run twice, it changes nothing.

python scripts/push_to_hub.py runs/quickstart --hub_model_id ORG/NAME

A run goes to ORG/NAME-bi and ORG/NAME-cross (with several students, ORG/NAME-STUDENT-bi and so on): a commit and a tag
`cycle-N` for each cycle, and `main` at the best, if it is no worse than its start. A stage's output goes to ORG/NAME.
A folder that was pushed before knows where its models go. The token is the one of `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.options import RunTarget
from transencoder.config.parsing import StageParser
from transencoder.errors import InputError, one_line_errors
from transencoder.hub.push import Repository, check_target, push, recall, remember, stage_repository
from transencoder.hub.releases import run_repositories
from transencoder.run.layout import Layout
from transencoder.runtime.accelerator import quiet_libraries
from transencoder.runtime.records import RUN_FILE


def parse() -> tuple[RunTarget, argparse.Namespace]:
    parser = StageParser(RunTarget, __doc__)
    parser.add_argument("folder", type=Path, help="what run_transencoder.sh or a training stage filled")
    return parser.parse_args_into_dataclasses()


def repositories_of(folder: Path, target: RunTarget) -> list[Repository]:
    if Layout(folder).recipe.is_file():
        return run_repositories(folder, target)
    if (folder / RUN_FILE).is_file():
        return [stage_repository(folder, target)]
    raise InputError(f"{folder}: neither a run of run_transencoder.sh nor a training stage's output")


@one_line_errors
def main() -> None:
    target, words = parse()
    quiet_libraries()
    folder = words.folder
    if target.hub_model_id is None:
        target = recall(folder)
    if target is None:
        raise InputError(f"{folder}: was not pushed before; say where to: --hub_model_id ORG/NAME")
    check_target(target)
    repositories = repositories_of(folder, target)
    remember(folder, target)
    if not push(folder, repositories, target):
        sys.exit(1)


if __name__ == "__main__":
    main()
