"""The summary of a finished run: the table, the plot, and its best models."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transencoder.config.recipes import read_recipe
from transencoder.data.paper import row_of
from transencoder.data.tasks import title
from transencoder.errors import InputError
from transencoder.evaluation import PRIMARY, have_a_mean, markdown_table, paper_rows
from transencoder.run.completion import is_complete, stopped_before
from transencoder.run.layout import Layout, encoder_place
from transencoder.run.plan import ENSEMBLE, Plan, Student, load_plan
from transencoder.runtime.files import read_json, replacing
from transencoder.runtime.optional import load_optional

SMALLEST_AXIS = 10  # points, so that one and a half of them do not look like a cliff


@dataclass
class Round:
    """One encoder of the run, or the mean of several, and what it measured.

    Args:
        cycle: 0 for the start.
        kind: "bi", "cross", or "bi+cross" for an ensemble of both.
        student: name of its language model in the run, or ENSEMBLE.
        path: its folder; None for an ensemble.
        values: task title -> primary metric x 100.
        paper: row of the paper's tables that it is to be compared with.
        entries: what results.json says of it.
    """

    cycle: int
    kind: str
    student: str
    path: str | None
    values: dict[str, float]
    paper: str | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> str:
        """As the table and the plot's axis call it."""
        kind = "bi- and cross-encoder" if self.kind == "bi+cross" else f"{self.kind}-encoder"
        return f"cycle {self.cycle}, {kind}" if self.cycle else f"start, {kind}"


def collect_rounds(run: Path, so_far: bool = False) -> list[Round]:
    """Return every encoder of a run that was measured, or made where nothing is measured, in the order of making.

    Args:
        so_far: stop at the first cycle that is not through yet.
    Raises:
        InputError: without `so_far`, such a cycle.
    """
    layout = Layout(run)
    plan = load_plan(read_recipe(str(layout.recipe)), str(layout.recipe))
    rounds: list[Round] = []
    for cycle in range(plan.cycles + 1):
        if stopped_before(run, cycle, plan.stop_at):
            break
        through = layout.results(cycle).is_file() if plan.measures else _are_made(run, cycle, plan)
        if not through:
            if so_far:
                break
            what = f"no {layout.results(cycle).name}" if plan.measures else "not all of its models"
            raise InputError(f"{layout.cycle(cycle)}: {what}; run_transencoder.sh has not finished there")
        results = read_results(layout.results(cycle)) if plan.measures else []
        for kind in kinds_of(plan, cycle):
            for student in plan.students:
                rounds.append(_round(run, cycle, kind, student, results))
        rounds += _ensembles(cycle, results)
    for round_ in rounds:
        setting = plan.paper.get(round_.student)
        round_.paper = row_of(setting, round_.kind, at_start=not round_.cycle) if setting else None
    return rounds


def kinds_of(plan: Plan, cycle: int) -> tuple[str, ...]:
    """Return the kinds of encoder that a cycle makes, in order; 0 is the start."""
    return ("cross", "bi") if cycle and plan.alternate else ("bi",)


def _are_made(run: Path, cycle: int, plan: Plan) -> bool:
    """Return whether all encoders of a cycle are there and whole."""
    made_here = [student for student in plan.students if cycle or not student.bi_encoder]
    kinds = kinds_of(plan, cycle)
    return all(is_complete(Layout(run).encoder(cycle, kind, student.name)) for kind in kinds for student in made_here)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read what evaluate_encoders.py wrote; raise `InputError` for anything else."""
    try:
        results = read_json(path)
        if all({"encoders", "kind", "task", "split", "metric", "value"} <= entry.keys() for entry in results):
            return results
        raise ValueError("an entry lacks a key")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not what evaluate_encoders.py writes ({error}); delete it and measure again"
        ) from error


def _round(run: Path, cycle: int, kind: str, student: Student, results: list[dict[str, Any]]) -> Round:
    """Return one encoder's results. Its folder is found by where the driver puts it, so that a run can be moved."""
    inside = encoder_place(cycle, kind, student.name)
    ready = student.bi_encoder if not cycle else None
    own = [
        entry
        for entry in results
        if len(entry["encoders"]) == 1
        and (entry["encoders"] == [ready] if ready else entry["encoders"][0].endswith(inside))
    ]
    return Round(cycle, kind, student.name, ready or str(run / inside), _values(own), entries=own)


def _ensembles(cycle: int, results: list[dict[str, Any]]) -> list[Round]:
    """Return the means of several encoders, where they were measured."""
    several = [entry for entry in results if len(entry["encoders"]) > 1]
    kinds = dict.fromkeys(entry["kind"] for entry in several)
    return [
        Round(cycle, kind, ENSEMBLE, None, _values([entry for entry in several if entry["kind"] == kind]))
        for kind in kinds
    ]


def _values(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the primary metrics by the titles of their tasks."""
    return {
        title(entry["task"], entry["split"]): math.nan if entry["value"] is None else entry["value"]
        for entry in results
        if entry["metric"] in PRIMARY
    }


def tests_of(rounds: list[Round]) -> list[str]:
    """Return the titles that are not dev sets."""
    return [name for name in rounds[0].values if not name.endswith(".dev")]


def dev_of(rounds: list[Round]) -> str | None:
    """Return the title of the dev set."""
    return next((name for name in rounds[0].values if name.endswith(".dev")), None)


def summary_table(runs: list[list[Round]]) -> str:
    """Return Markdown: a row for each encoder, a column for each set, the mean of the test sets last.

    Args:
        runs: the rounds of one run, or of several that differ in their seed only: then mean and standard deviation.
    Raises:
        InputError: the runs do not have the same rounds and sets.
    """
    shapes = {tuple((r.step, r.student, *r.values) for r in rounds) for rounds in runs}
    if len(shapes) > 1:
        raise InputError("these runs differ in more than their seed: not the same encoders measured on the same sets")
    names, tests = list(runs[0][0].values), tests_of(runs[0])
    averaged = have_a_mean([entry for r in runs[0] for entry in r.entries], tests)
    several = len({r.student for r in runs[0]}) > 1
    rows = []
    for same in zip(*runs, strict=True):
        columns = [[r.values[name] for r in same] for name in names]
        if averaged:
            columns.append([float(np.mean([r.values[name] for name in tests])) for r in same])
        label = f"{same[0].step} ({same[0].student})" if several else same[0].step
        rows.append([label, *map(_mean_and_deviation, columns)])
        rows += paper_rows(same[0].paper, names, tests, averaged) if same[0].paper else []
    return markdown_table(["encoder", *names, *(["mean of tests"] if averaged else [])], rows)


def _mean_and_deviation(values: list[float]) -> str:
    """ "71.20", or for several runs "71.20 ± 0.31" with the sample standard deviation."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def best_round(rounds: list[Round], kind: str) -> Round:
    """Return the encoder with the best dev score, the start included; without a dev set that of the last cycle."""
    dev, candidates = dev_of(rounds), [r for r in rounds if r.kind == kind and r.path]
    if dev is None:
        return next(r for r in candidates if r.cycle == candidates[-1].cycle)
    return max(candidates, key=lambda r: -math.inf if math.isnan(r.values[dev]) else r.values[dev])


def keep_best(run: Path, rounds: list[Round]) -> list[str]:
    """Copy the best encoder of each kind on dev to `best/`, or without dev the last to `last/`; a line each."""
    lines, dev = [], dev_of(rounds)
    for kind in sorted({r.kind for r in rounds if r.path}):
        best = best_round(rounds, kind)
        target = Layout(run).final(dev is not None) / f"{kind}-encoder"
        if Path(best.path).is_dir():
            with replacing(target) as temporary:
                shutil.copytree(best.path, temporary)
            why = f"{dev} {best.values[dev]:.2f}" if dev else "the last cycle's"
            lines.append(f"`{target.relative_to(run)}` is {best.step} of {best.student} ({why}).")
        else:
            lines.append(f"The best {kind}-encoder is the start itself, {best.path} from the Hub: no copy was made.")
    return lines


def below_start(rounds: list[Round]) -> list[str]:
    """Return a line about each encoder that is below its student's start on a set, and on which."""
    lines = []
    for round_ in rounds:
        start = next(r for r in rounds if r.student == round_.student)
        if not round_.cycle or start.cycle:  # an ensemble may have no start
            continue
        below = [name for name, value in round_.values.items() if value < start.values[name]]
        shown = ", ".join(f"{name} ({round_.values[name]:.2f} against {start.values[name]:.2f})" for name in below)
        if below:
            whose = f" of {round_.student}" if len({r.student for r in rounds}) > 1 else ""
            lines.append(f"{round_.step}{whose}: below the start on {shown}.")
    return lines


def plot_progress(path: Path, rounds: list[Round], gains: dict[str, list[Any]]) -> None:
    """Plot score against half-cycle as a PNG: a panel for each student, a line for each set, dashed for the dev set.

    Args:
        gains: those of the verdict. Their 95 % intervals are drawn at the encoders that it compares with the start,
            around the score on the gain's set, or the mean over its sets.
    """
    students = list(dict.fromkeys(r.student for r in rounds if r.path))
    figure_class = load_optional("matplotlib.figure").Figure
    figure = figure_class(figsize=(1.5 + 4.5 * len(students), 4), layout="constrained")
    axes = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    compared, shown = [(best_round(rounds, kind), gain) for kind in gains for gain in gains[kind]], {}
    for axis, student in zip(axes, students, strict=True):
        own = [r for r in rounds if r.student == student]
        places = [f"{r.kind} {r.cycle}" if r.cycle else "start" for r in own]
        for name in rounds[0].values:
            style = "o--" if name == dev_of(rounds) else "o-"
            (shown[name],) = axis.plot(places, [r.values[name] for r in own], style)
        for place, round_ in zip(places, own, strict=True):
            for gain in (gain for end, gain in compared if end is round_ and round_.cycle):
                if set(gain.sets) <= round_.values.keys():
                    middle = float(np.mean([round_.values[name] for name in gain.sets]))
                    sides = [[gain.value - gain.low], [gain.high - gain.value]]
                    bar = axis.errorbar([place], [middle], np.maximum(sides, 0), fmt="k_", capsize=4)
                    shown["gain over the start, 95 %"] = bar
        axis.set_title(student)
        axis.set_xlabel("half-cycle")
        axis.grid(alpha=0.3)
    low, high = axes[0].get_ylim()
    more = max(SMALLEST_AXIS - (high - low), 0) / 2
    axes[0].set_ylim(low - more, high + more)
    axes[0].set_ylabel("Spearman or AUC, x 100")
    axes[-1].legend(shown.values(), shown, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
