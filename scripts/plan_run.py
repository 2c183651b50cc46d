#!/usr/bin/env python3
"""Check a recipe and all that it names, and write the run's plan: the driver's first step.

python scripts/plan_run.py --recipe recipes/quickstart.yaml --output_dir runs/quickstart

It prints what the driver needs to launch the run: the file that will say how that ended, and OMP_NUM_THREADS where it
should be set. With --dry_run it prints the plan as commands.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.options import HubTarget
from transencoder.config.parsing import StageParser
from transencoder.config.recipes import read_recipe
from transencoder.errors import InputError, one_line_errors


def parse() -> tuple[HubTarget, argparse.Namespace]:
    parser = StageParser(HubTarget, __doc__)
    parser.add_argument("--recipe", required=True, help="YAML file")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the run")
    for key, what in (("plm", "language model"), ("bi_encoder", "ready bi-encoder")):
        parser.add_argument(
            f"--{key}", action="append", default=[], help=f"{what} in place of the recipe's: [NAME=]MODEL"
        )
    parser.add_argument("--data_dir", help="folder of the tasks in place of the recipe's")
    parser.add_argument("--seed", type=int, help="seed in place of the recipe's")
    parser.add_argument("--student", help="the only student to be trained: name, or number from 0")
    parser.add_argument("--launcher", default="accelerate launch", help="what starts a stage")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, write nothing")
    return parser.parse_args_into_dataclasses()


def student_name(given: str | None, names: list[str], recipe: str) -> str | None:
    """Return the name that `--student` stands for."""
    if given is None or given in names:
        return given
    if given.isdecimal() and int(given) < len(names):
        return names[int(given)]
    raise InputError(f"--student {given}: {recipe} has the students {' '.join(names)}")


@one_line_errors
def main() -> None:
    target, arguments = parse()
    read_recipe(arguments.recipe)  # what is wrong with it is said before the imports below, which take seconds
    from transencoder.run.checks import check_inputs
    from transencoder.run.layout import Layout
    from transencoder.run.plan import keep_recipe, load_plan, resolve_recipe
    from transencoder.run.stages import make_stages, write_stages
    from transencoder.runtime.accelerator import quiet_libraries
    from transencoder.runtime.backends import cpu_cores, without_gpu

    quiet_libraries()
    models = {"plm": arguments.plm, "bi_encoder": arguments.bi_encoder}
    recipe = resolve_recipe(arguments.recipe, models, arguments.seed, arguments.data_dir)
    plan = load_plan(recipe, f"--recipe {arguments.recipe}")
    if target != HubTarget():
        from transencoder.hub.releases import check_run_target

        check_run_target(target, plan)
    student = student_name(arguments.student, [student.name for student in plan.students], arguments.recipe)
    check_inputs(plan, arguments.recipe)
    run = arguments.output_dir
    if arguments.dry_run:
        for stage in make_stages(plan, run, Path(arguments.recipe), arguments.seed):
            print(stage.command(arguments.launcher, Path(sys.argv[0]).parent))
        return
    layout = Layout(run)
    keep_recipe(recipe, run)
    write_stages(make_stages(plan, run, layout.recipe, arguments.seed), layout.plan)
    if target.hub_model_id:
        from transencoder.hub.push import remember

        remember(run, target)
    layout.outcome(student).unlink(missing_ok=True)
    print(layout.outcome(student))
    print(student or "")
    print(cpu_cores() if without_gpu() and arguments.launcher == "accelerate launch" else "")


if __name__ == "__main__":
    main()
