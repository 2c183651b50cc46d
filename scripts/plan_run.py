#!/usr/bin/env python3
"""Check a recipe and all that it names, and print it as shell variables: the driver's first step.

python scripts/plan_run.py --recipe recipes/quickstart.yaml --output_dir runs/quickstart
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.options import HubTarget
from transencoder.config.parsing import StageParser
from transencoder.errors import one_line_errors
from transencoder.hub.push import remember
from transencoder.hub.releases import check_run_target
from transencoder.run.plan import check_inputs, keep_recipe, load_plan, resolve_recipe, to_shell
from transencoder.runtime.accelerator import quiet_libraries
from transencoder.runtime.backends import cpu_cores, without_gpu


def parse() -> tuple[HubTarget, argparse.Namespace]:
    parser = StageParser(HubTarget, __doc__)
    parser.add_argument("--recipe", required=True, help="YAML file")
    parser.add_argument("--output_dir", required=True, help="folder of the run")
    for key, what in (("plm", "language model"), ("bi_encoder", "ready bi-encoder")):
        parser.add_argument(
            f"--{key}", action="append", default=[], help=f"{what} in place of the recipe's: [NAME=]MODEL"
        )
    parser.add_argument("--data_dir", help="folder of the tasks in place of the recipe's")
    parser.add_argument("--seed", type=int, help="seed in place of the recipe's")
    parser.add_argument("--dry_run", action="store_true", help="write nothing")
    return parser.parse_args_into_dataclasses()


@one_line_errors
def main() -> None:
    target, arguments = parse()
    quiet_libraries()
    models = {"plm": arguments.plm, "bi_encoder": arguments.bi_encoder}
    recipe = resolve_recipe(arguments.recipe, models, arguments.seed, arguments.data_dir)
    plan = load_plan(recipe, f"--recipe {arguments.recipe}")
    check_run_target(target, plan)
    check_inputs(plan, arguments.recipe)
    if not arguments.dry_run:
        keep_recipe(recipe, Path(arguments.output_dir))
        if target.hub_model_id:
            remember(Path(arguments.output_dir), target)
    print(to_shell(plan))
    print(f"THREADS={cpu_cores() if without_gpu() else ''}")


if __name__ == "__main__":
    main()
