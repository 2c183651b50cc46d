#!/usr/bin/env python3
"""Check a recipe and all that it names, and write the run's plan: the driver's first step, which knows its options.

python scripts/plan_run.py --recipe recipes/quickstart.yaml --output_dir runs/quickstart

It prints in lines what the driver needs: the launcher, OMP_NUM_THREADS where it should be set, words for
run_stages.py, and for each run its folder and the file that will say how a launch ended. With --dry_run it prints the
plan as commands, and says first, on stderr, what the run has and needs.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.options import RunTarget
from transencoder.config.parsing import StageParser
from transencoder.config.recipes import read_recipe
from transencoder.errors import InputError, one_line_errors


def parse() -> tuple[RunTarget, argparse.Namespace]:
    parser = StageParser(RunTarget, __doc__)
    parser.add_argument("--recipe", help="YAML file")
    parser.add_argument("--output_dir", type=Path, help="folder of the run")
    for key, what in (("plm", "language model"), ("bi_encoder", "ready bi-encoder")):
        parser.add_argument(
            f"--{key}", action="append", default=[], help=f"{what} in place of the recipe's: [NAME=]MODEL"
        )
    parser.add_argument("--data_dir", help="folder of the tasks in place of the recipe's")
    parser.add_argument("--seed", type=int, help="seed in place of the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of several runs, in output_dir/seed-N")
    parser.add_argument("--student", help="the only student to be trained: name, or number from 0")
    parser.add_argument("--patience", type=int, default=86400, help="seconds to wait for the other students")
    parser.add_argument("--push_to_hub", help="ORG/NAME that the models are pushed to")
    parser.add_argument("--launcher", default="accelerate launch", help="what starts the stages")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, write nothing")
    try:
        target, words = parser.parse_args_into_dataclasses()
    except InputError as error:
        raise InputError(f"{error}; a recipe's own keys are set in the recipe") from error
    return dataclasses.replace(target, hub_model_id=words.push_to_hub or target.hub_model_id), words


def check(words: argparse.Namespace) -> None:
    """Raise `InputError` for options that are missing, or do not go together."""
    if not (words.recipe and words.output_dir):
        raise InputError("give --recipe FILE and --output_dir DIR")
    if words.patience < 0:
        raise InputError(f"--patience {words.patience}: must be a number of seconds")
    if words.seeds is None:
        return
    if words.seed is not None or words.student is not None:
        raise InputError(f"--seeds excludes {'--seed' if words.seed is not None else '--student'}")
    if len(set(words.seeds)) < max(2, len(words.seeds)):
        raise InputError(f"--seeds {' '.join(map(str, words.seeds))}: give two or more numbers, each once")
    if (words.output_dir / "recipe.yaml").exists():
        raise InputError(f"--output_dir {words.output_dir}: holds a run of one seed; choose another folder")


def student_name(given: str | None, names: list[str], recipe: str) -> str | None:
    """Return the name that `--student` stands for."""
    if given is None or given in names:
        return given
    if given.isdecimal() and int(given) < len(names):
        return names[int(given)]
    raise InputError(f"--student {given}: {recipe} has the students {' '.join(names)}")


@one_line_errors
def main() -> None:
    target, words = parse()
    check(words)
    read_recipe(words.recipe)  # what is wrong with it is said before the imports below, which take seconds
    from transencoder.run.checks import check_inputs
    from transencoder.run.estimate import describe
    from transencoder.run.layout import Layout
    from transencoder.run.plan import keep_recipe, load_plan, resolve_recipe
    from transencoder.run.stages import make_stages, write_stages
    from transencoder.runtime.accelerator import log, quiet_libraries
    from transencoder.runtime.backends import cpu_cores, spelled_out, without_gpu

    quiet_libraries()
    models, student = {"plm": words.plm, "bi_encoder": words.bi_encoder}, words.student
    runs = []
    for seed in words.seeds or [words.seed]:
        recipe = resolve_recipe(words.recipe, models, seed, words.data_dir)
        plan = load_plan(recipe, f"--recipe {words.recipe}")
        student = student_name(words.student, [student.name for student in plan.students], words.recipe)
        run, where = words.output_dir, target
        if words.seeds:
            run = words.output_dir / f"seed-{seed}"
            name = target.hub_model_id and f"{target.hub_model_id}-seed-{seed}"
            where = dataclasses.replace(target, hub_model_id=name)
        if where != RunTarget():
            from transencoder.hub.releases import check_run_target

            check_run_target(where, plan)
        if not runs:
            inputs = check_inputs(plan, words.recipe)
        runs.append((run, seed, recipe, plan, where))
    if words.dry_run:
        for line in describe(plan, inputs, len(runs)):
            log(line)
        for run, seed, _, plan, _ in runs:
            for stage in make_stages(plan, run, Path(words.recipe), seed):
                print(stage.command(words.launcher, Path(sys.argv[0]).parent))
        return
    print(spelled_out(words.launcher))
    print(cpu_cores() if without_gpu() and words.launcher == "accelerate launch" else "")
    options = [*(["--student", student] if student else []), "--patience", str(words.patience)]
    print(*options, *(["--push"] if target.hub_model_id else []))
    for run, seed, recipe, plan, where in runs:
        layout = Layout(run)
        keep_recipe(recipe, run)
        write_stages(make_stages(plan, run, layout.recipe, seed), layout.plan)
        if where.hub_model_id:
            from transencoder.hub.push import remember

            remember(run, where)
        layout.outcome(student).unlink(missing_ok=True)
        print(run, layout.outcome(student), sep="\n")


if __name__ == "__main__":
    main()
