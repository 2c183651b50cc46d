"""What a run of the driver publishes: a repository for each kind of encoder of each student.

Every cycle is a commit with the tag `cycle-N`, the contrastive start being `cycle-0`; `main` ends at the best one.
"""

import dataclasses
from pathlib import Path
from typing import Any

import datasets

from transencoder.config.options import HubTarget, Reading
from transencoder.config.recipes import read_recipe
from transencoder.data.tables import PAIRS, read_pairs
from transencoder.data.tasks import expand_groups, load_task
from transencoder.errors import InputError
from transencoder.hub.card import CardContent
from transencoder.hub.push import Repository, Version, check_target
from transencoder.model_files import Kind
from transencoder.run.layout import Layout, encoder_place
from transencoder.run.plan import Plan, Student, load_plan
from transencoder.run.summary import Round, best_round, collect_rounds, dev_of, summary_table

KINDS: tuple[Kind, ...] = ("bi", "cross")


def repository_id(target: HubTarget, plan: Plan, student: str, kind: Kind) -> str:
    """ORG/NAME-bi; with several students, ORG/NAME-STUDENT-bi."""
    middle = f"-{student}" if len(plan.students) > 1 else ""
    return f"{target.hub_model_id}{middle}-{kind}"


def check_run_target(target: HubTarget, plan: Plan) -> None:
    """Raise `InputError` if a run's models could not go where they shall, and for Hub flags without a name."""
    if target.hub_model_id is None:
        if target != HubTarget():
            raise InputError("--hub_public, --hub_license and --hub_language go with --push_to_hub ORG/NAME")
        return
    check_target(target)
    for student in plan.students:
        for kind in KINDS:
            check_target(dataclasses.replace(target, hub_model_id=repository_id(target, plan, student.name, kind)))


def run_repositories(run: Path, target: HubTarget) -> list[Repository]:
    """Return what should be on the Hub of a run, as far as it has come.

    Raises:
        InputError: not a run of the driver.
    """
    path = str(Layout(run).recipe)
    recipe = read_recipe(path)
    plan = load_plan(recipe, path)
    rounds = collect_rounds(run, so_far=True)
    note = selection_note(rounds) + transductive_note(run, plan, recipe) if rounds else ""
    repositories = []
    for student in plan.students:
        for kind in KINDS:
            own = [r for r in rounds if r.student == student.name and r.kind == kind and _is_made_here(r, student)]
            if own:
                repositories.append(_repository(run, plan, target, student, own, rounds, note))
    return repositories


def _is_made_here(round_: Round, student: Student) -> bool:
    """Return whether the run made it: a start that the recipe names is somebody else's, and is not published."""
    return round_.cycle > 0 or not student.bi_encoder


def _repository(
    run: Path, plan: Plan, target: HubTarget, student: Student, own: list[Round], rounds: list[Round], note: str
) -> Repository:
    kind = own[0].kind
    name = repository_id(target, plan, student.name, kind)
    base = student.cross_encoder_plm or student.plm if kind == "cross" else student.bi_encoder or student.plm
    start = next(r for r in rounds if r.cycle == 0 and r.student == student.name)
    best = best_round(own, kind)
    layout = Layout(run)
    plot = layout.plot
    command = (
        f"hf download {name} {layout.recipe.name} --local-dir .\n"
        f"bash scripts/run_transencoder.sh --recipe {layout.recipe.name} --output_dir runs/{run.name}"
    )

    def version(this: Round) -> Version:
        content = CardContent(
            repo=name,
            model=Path(this.path),
            kind=kind,
            base=base,
            command=command,
            results=this.entries,
            start=start.entries if this is not start else [],
            paper=this.paper,
            note=note,
            lineage=lineage(rounds, this, best),
            plot=plot.is_file(),
            published=published_names(plan, target),
        )
        files = [layout.recipe, *([plot] if plot.is_file() else [])]
        return Version(content, this.step, f"cycle-{this.cycle}", files)

    return Repository(name, kind, [version(r) for r in own], version(best))


def published_names(plan: Plan, target: HubTarget) -> dict[str, str]:
    """End of an encoder's path in the run -> how a card calls it."""
    names = {}
    for student in plan.students:
        bi, cross = (repository_id(target, plan, student.name, kind) for kind in KINDS)
        names[encoder_place(0, "bi", student.name)] = f"`{bi}` at tag `cycle-0`"
        for cycle in range(1, plan.cycles + 1):
            names[encoder_place(cycle, "bi", student.name)] = f"`{bi}` at tag `cycle-{cycle}`"
            names[encoder_place(cycle, "cross", student.name)] = f"`{cross}` at tag `cycle-{cycle}`"
    return names


def lineage(rounds: list[Round], this: Round, best: Round) -> str:
    """Return the run's table so far, and where in it a model stands."""
    dev = dev_of(rounds)
    why = f"the best on `{dev}`" if dev else "the latest"
    place = f"This is *{this.step}*" + (f" of {this.student}" if len({r.student for r in rounds}) > 1 else "")
    return (
        f'{summary_table([rounds])}\n{place}. Each cycle is a tag of the repository (`revision="cycle-1"`); `main` is '
        f"at {best.step}, {why} of these tags.\n"
    )


def selection_note(rounds: list[Round]) -> str:
    """Say what the dev set was used for."""
    dev = dev_of(rounds)
    return f"`{dev}` was used for choosing: its figures are no test results. " if dev else ""


def transductive_note(run: Path, plan: Plan, recipe: dict[str, Any]) -> str:
    """Say how many test pairs were, without their scores, among the training pairs."""
    if not plan.tasks:
        return ""
    options = {**recipe.get("common", {}), **recipe.get("evaluate_encoders", {})}
    reading = Reading(columns=options.get("columns"), skip_bad_rows=options.get("skip_bad_rows", False))
    scores = Layout(run).scores(1, "bi")
    try:
        pool = set(_pairs(read_pairs([str(scores)])))
        tests = [load_task(spec, plan.data_dir, reading) for spec in expand_groups(plan.tasks)]
    except InputError:  # the data may be elsewhere by now
        return (
            "Where test pairs were, without scores, among the training pairs, as in the paper, this is *transductive*."
        )
    seen = [(task, sum(pair in pool or pair[::-1] in pool for pair in _pairs(task.pairs))) for task in tests]
    if not any(count for _, count in seen):
        return "None of the test pairs was among the training pairs."
    counts = ", ".join(
        f"{count:,} of the {len(task.pairs):,} pairs of `{task.title}`" for task, count in seen if count
    )
    return f"*Transductive*: {counts} were, without their scores, among the training pairs."


def _pairs(table: datasets.Dataset) -> list[tuple[str, str]]:
    return list(zip(*(table[name] for name in PAIRS), strict=True))
