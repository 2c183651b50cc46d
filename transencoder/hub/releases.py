"""What a run of the driver publishes: a repository for each kind of encoder of each student.

Every cycle is a commit with the tag `cycle-N`, the contrastive start being `cycle-0`; `main` ends at the best one.
"""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import yaml

from transencoder.config.options import HubTarget, Reading, RunTarget
from transencoder.config.recipes import read_recipe
from transencoder.data.tables import PAIRS, read_pairs
from transencoder.data.tasks import expand_groups, load_task
from transencoder.errors import InputError
from transencoder.evaluation import METRICS
from transencoder.hub.card import CardContent, first_model, labelled_start, model_name, portable
from transencoder.hub.push import Repository, Version, check_target
from transencoder.model_files import Kind
from transencoder.run.layout import RECIPE_FILE, Layout, encoder_place
from transencoder.run.plan import Plan, Student, load_plan
from transencoder.run.summary import Round, best_round, collect_rounds, dev_of, summary_table
from transencoder.run.verdict import Gain, gain_over, in_words, verdict_line, word_of
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import read_json

KINDS: tuple[Kind, ...] = ("bi", "cross")


def repository_id(target: HubTarget, plan: Plan, student: str, kind: Kind) -> str:
    """ORG/NAME-bi; with several students, ORG/NAME-STUDENT-bi."""
    middle = f"-{student}" if len(plan.students) > 1 else ""
    return f"{target.hub_model_id}{middle}-{kind}"


def check_run_target(target: RunTarget, plan: Plan) -> None:
    """Raise `InputError` if a run's models could not go where they shall, and for Hub flags without a name."""
    if target.hub_model_id is None:
        if target != RunTarget():
            flags = "--hub_public, --hub_license, --hub_language and --push_worse"
            raise InputError(f"{flags} go with --push_to_hub ORG/NAME")
        return
    check_target(target)
    for student in plan.students:
        for kind in KINDS:
            check_target(dataclasses.replace(target, hub_model_id=repository_id(target, plan, student.name, kind)))


def run_repositories(run: Path, target: RunTarget) -> list[Repository]:
    """Return what should be on the Hub of a run, as far as it has come; nothing that is worse than somebody's start.

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
    return [repository for repository in repositories if repository]


def _is_made_here(round_: Round, student: Student) -> bool:
    """Return whether the run made it: a start that the recipe names is somebody else's, and is not published."""
    return round_.cycle > 0 or not student.bi_encoder


def _repository(
    run: Path, plan: Plan, target: RunTarget, student: Student, own: list[Round], rounds: list[Round], note: str
) -> Repository | None:
    kind = own[0].kind
    name = repository_id(target, plan, student.name, kind)
    base = student.cross_encoder_plm or student.plm if kind == "cross" else student.bi_encoder or student.plm
    taught_by = [student.bi_encoder, *(teacher.model for teacher in plan.teachers)]
    given = [Path(teacher.scores).name for teacher in plan.teachers if teacher.scores]  # by who knows what
    labelled = labelled_start([base, *filter(None, taught_by)]) or next(iter(given), None)
    start = next(r for r in rounds if r.cycle == 0 and r.student == student.name)
    best, dev = best_round(own, kind), dev_of(rounds)
    end = best
    why = f"the best of them on `{dev}`" if dev else "the latest"
    layout = Layout(run)
    gains, told = gain_over(run, rounds, start, best), {}
    if not plan.measures and layout.summary.is_file() and kind == "bi" and student is plan.students[0]:
        told = read_json(layout.summary)  # it may know of labels that came later, of this bi-encoder
    word, line = (word_of(gains), verdict_line(gains)) if gains else (told.get("word"), told.get("verdict", ""))
    if kind == "bi" and word == "worse" and not target.push_worse:
        if start not in own:
            log(f"Not pushed to {name}: {line}; --push_worse pushes it all the same")
            return None
        best, why = start, f"as {best.step}, {why}, is worse"
    plot = layout.plot
    command = (
        f"hf download {name} {RECIPE_FILE} --local-dir .\n"
        f"bash scripts/run_transencoder.sh --recipe {RECIPE_FILE} --output_dir runs/{run.name}"
    )
    recipe = yaml.safe_dump(portable(read_recipe(str(layout.recipe))), sort_keys=False, allow_unicode=True)

    def version(this: Round) -> Version:
        content = CardContent(
            repo=name,
            model=Path(this.path),
            kind=kind,
            base=first_model(base),
            labelled=labelled,
            verdict=verdict_in_words(gain_over(run, rounds, start, this), kind, called_start(student))
            or (line if told and this is end else ""),
            command=command,
            recipe=recipe,
            results=this.entries,
            start=start.entries if this is not start else [],
            paper=this.paper,
            note=(f"The start is {called_start(student)}. " if this is not start else "") + note,
            lineage=lineage(rounds, this, best, why),
            plot=plot.is_file(),
            published=published_names(plan, target),
        )
        files = [plot] if plot.is_file() else []
        return Version(content, this.step, f"cycle-{this.cycle}", files)

    return Repository(name, kind, [version(r) for r in own], version(best))


def called_start(student: Student) -> str:
    """Return how a card calls what a student began with."""
    return f"`{model_name(student.bi_encoder)}`" if student.bi_encoder else "the bi-encoder's tag `cycle-0`"


def verdict_in_words(gains: list[Gain] | None, kind: Kind, start: str) -> str:
    """Return a card's first line: what the model is against its start, and what to use where that is better."""
    if gains is None:
        return ""
    words = {
        "better": f"**This {kind}-encoder is better than the start**, {start}",
        "same": f"**This {kind}-encoder is not measurably better than the start**, {start}",
        "worse": f"**This {kind}-encoder is worse than the start: use {start}**",
    }
    metric = f", {METRICS[gains[0].metric].card}" if len(gains) == 1 else ""  # several are named in the phrase
    return f"{words[word_of(gains)]}: {in_words(gains)}{metric}."


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


def lineage(rounds: list[Round], this: Round, best: Round, why: str) -> str:
    """Return the run's table so far, and where in it a model stands."""
    place = f"This is *{this.step}*" + (f" of {this.student}" if len({r.student for r in rounds}) > 1 else "")
    table = f"{summary_table([rounds])}\n" if rounds[0].values else ""
    return (
        f'{table}{place}. Each cycle is a tag of the repository (`revision="cycle-1"`); `main` is '
        f"at {best.step}, {why}.\n"
    )


def selection_note(rounds: list[Round]) -> str:
    """Say what the dev set was used for."""
    dev = dev_of(rounds)
    return f"`{dev}` chose what was kept: its figures are not test results. " if dev else ""


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
