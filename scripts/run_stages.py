#!/usr/bin/env python3
"""Do what is not done yet of a run that plan_run.py planned: stage after stage, in one process group.

accelerate launch scripts/run_stages.py runs/quickstart
"""

import argparse
import gc
import importlib
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # the driver's launcher ignores it; here it ends the imports below
SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]  # runs from a checkout, without installation

from transencoder.config.parsing import StageParser
from transencoder.config.recipes import read_recipe
from transencoder.errors import one_line_errors
from transencoder.run.layout import Layout
from transencoder.run.plan import load_plan
from transencoder.run.runner import Runner
from transencoder.run.stages import Stage, read_stages
from transencoder.runtime.accelerator import quiet_libraries, share_process_group
from transencoder.runtime.backends import is_set_up_once


def parse() -> argparse.Namespace:
    parser = StageParser((), __doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--student", help="do this student's stages only, and wait for what the others make")
    parser.add_argument("--patience", type=int, default=86400, help="seconds to wait for the others")
    parser.add_argument("--push", action="store_true", help="push each cycle's models, beside the work")
    parser.add_argument("--remade", type=int, default=0, help="stages that the launch before this one left behind")
    return parser.parse_args()


def call(stage: Stage, words: list[str]) -> None:
    """Run a stage's script in this process, which goes by the script's name in what it says."""
    sys.argv = [str(SCRIPTS / stage.script), *words]
    importlib.import_module(Path(stage.script).stem).main(words)


@one_line_errors
def main() -> None:
    arguments = parse()
    layout = Layout(arguments.run)
    plan = load_plan(read_recipe(str(layout.recipe)), str(layout.recipe))
    stages = read_stages(layout.plan)
    quiet_libraries()
    state = share_process_group()
    gc.collect()
    gc.freeze()  # the libraries are never looked at again when a stage's memory is freed
    push = [sys.executable, str(SCRIPTS / "push_to_hub.py"), str(arguments.run)] if arguments.push else None
    student, patience, remade, once = arguments.student, arguments.patience, arguments.remade, is_set_up_once()
    Runner(arguments.run, stages, plan, call, state, student, patience, push, remade, once).run()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
