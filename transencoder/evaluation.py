"""Metrics, and the tables made of them. A new metric is an entry in `METRICS`."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from scipy import stats
from torch import nn

from transencoder.config.arguments import EvaluationArguments
from transencoder.data.paper import published_values, row_of
from transencoder.data.scores import write_tables
from transencoder.data.tasks import Task, title
from transencoder.errors import printable
from transencoder.inference import Inference
from transencoder.model_checks import inspect_encoder
from transencoder.runtime.accelerator import log
from transencoder.runtime.files import write_json, write_text
from transencoder.runtime.records import PAIR_SCORES_FILE, RESULTS_FILE, code_version
from transencoder.sanity import check_scores
from transencoder.scoring import PreparedPairs

FEATURES = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})
CITATION = "Virtanen et al., SciPy 1.0, Nature Methods 17 (2020)"


class ScipyMetric(evaluate.Metric):
    """Measure scores against gold values, x 100, without a network (`evaluate.load` would ask the Hub)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=str(self.__doc__), citation=CITATION, features=FEATURES)


class Spearman(ScipyMetric):
    """Spearman's rank correlation x 100, over all pairs of a set put together (SentEval's "all")."""

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"spearman": 100 * _defined(stats.spearmanr, predictions, references)}


class Pearson(ScipyMetric):
    """Pearson's correlation x 100."""

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"pearson": 100 * _defined(stats.pearsonr, predictions, references)}


class AUC(ScipyMetric):
    """Area under the ROC curve x 100: how often a positive pair scores above a negative one, a tie counting half."""

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references) > 0.5
        pairs = int(labels.sum()) * int((~labels).sum())
        # Mann and Whitney's U counts just that, by ranks.
        return {
            "auc": 100 * float(stats.mannwhitneyu(scores[labels], scores[~labels]).statistic) / pairs
            if pairs
            else math.nan
        }


def _defined(correlation: Any, predictions: list[float], references: list[float]) -> float:
    """Return the correlation, or NaN (without scipy's warning) where one side is constant."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return math.nan
    return float(correlation(predictions, references).statistic)


@dataclass(frozen=True)
class Metric:
    """Describe an entry of `METRICS`.

    Args:
        compute: gives one value, x 100, under the metric's name.
        gold: the gold values that it measures against: "score" (graded) or "label" (0 or 1).
        hub_name: the Hub's name for it.
        card: its name in model cards.
    """

    compute: type[ScipyMetric]
    gold: str
    hub_name: str
    card: str


# The first metric of each kind of gold values is the one that tables show and that chooses checkpoints.
METRICS = {
    "spearman": Metric(Spearman, "score", "spearmanr", "Spearman's rho x 100"),
    "pearson": Metric(Pearson, "score", "pearsonr", "Pearson's r x 100"),
    "auc": Metric(AUC, "label", "roc_auc", "AUC x 100"),
}


def metrics_of(gold: str) -> list[str]:
    """Return the names of the metrics for gold values of this kind, the primary one first."""
    return [name for name, metric in METRICS.items() if metric.gold == gold]


PRIMARY = {metrics_of(metric.gold)[0] for metric in METRICS.values()}


def measure(task: Task, scores: np.ndarray) -> dict[str, float | None]:
    """Return every metric of `task` for `scores` (float [pairs]), x 100; None where it is not defined."""
    gold = np.asarray(task.pairs[task.gold], dtype=np.float64)
    values: dict[str, float] = {}
    for name in metrics_of(task.gold):
        metric = METRICS[name].compute(keep_in_memory=True)
        values |= metric.compute(predictions=scores.astype(np.float64), references=gold)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def shown_value(value: float | None) -> str:
    """Return the value with two decimals, or a dash for None."""
    return "-" if value is None else f"{value:.2f}"


class DevSet:
    """Score the dev pairs, tokenised once, with the encoder that is being trained."""

    def __init__(self, task: Task, encoder: Any, accelerator: Accelerator, batch_tokens: int | None):
        self.task, self.inference = task, Inference(accelerator, batch_tokens)
        self.metric = metrics_of(task.gold)[0]
        self.prepared = PreparedPairs(encoder, task.pairs)

    def score(self, model: nn.Module) -> float | None:
        """Return the primary metric x 100 of `model` as it is now; None if every pair gets the same score."""
        scores = self.prepared.score(model, self.inference, "Dev")
        check_scores(f"{self.task.title}: the model", scores)
        return measure(self.task, scores)[self.metric]


def encoder_groups(kinds: list[str], ensemble: bool, with_ensembles: bool) -> list[list[int]]:
    """Return groups of encoders, by their places; the mean of a group's scores is measured.

    Args:
        kinds: "bi" or "cross" of each encoder.
        ensemble: only all together, in their order.
        with_ensembles: each alone, and then the bi-encoders, the cross-encoders, and all, where these are several.
    """
    everyone = list(range(len(kinds)))
    if ensemble:
        return [everyone]
    cross = [place for place in everyone if kinds[place] == "cross"]
    bi = [place for place in everyone if kinds[place] != "cross"]
    groups = [[place] for place in everyone]
    for group in (bi, cross, bi + cross) if with_ensembles else ():
        if len(group) > 1 and group not in groups:
            groups.append(group)
    return groups


def measure_encoders(
    arguments: EvaluationArguments, tasks: list[Task], scores: list[list[np.ndarray]]
) -> list[dict[str, Any]]:
    """Return the entries of results.json for all encoders, or for their ensembles.

    Args:
        scores: of each encoder for each task, float [pairs].
    """
    names, results = arguments.encoders, []
    kinds = [inspect_encoder(name) for name in names]
    for group in encoder_groups(kinds, arguments.ensemble, arguments.with_ensembles):
        for place, task in enumerate(tasks):
            mean = np.mean([scores[encoder][place] for encoder in group], axis=0)
            results += result_entries([names[encoder] for encoder in group], task, mean)
    return results


def write_results(
    arguments: EvaluationArguments, tasks: list[Task], scores: list[list[np.ndarray]], accelerator: Accelerator
) -> None:
    """Give the results to the trackers, and write them, and the scores they come from, from the first process.

    Args:
        scores: as of `measure_encoders`.
    """
    results, folder = measure_encoders(arguments, tasks, scores), Path(arguments.output_dir)
    header, rows = result_rows(results, arguments.paper)
    log_table(accelerator, "results", header, rows)
    for entry in results:
        name = f"{'+'.join(entry['encoders'])}/{entry['task']}.{entry['split']}/{entry['metric']}"
        accelerator.log({name: entry["value"]})
    if accelerator.is_main_process:
        text = f"{markdown_table(header, rows)}\n{origin(results)}"
        write_pair_scores(folder / PAIR_SCORES_FILE, arguments.encoders, tasks, scores)
        write_json(folder / RESULTS_FILE, results)
        write_text(folder / "results.md", text)
        print(printable(text))
        log(f"{folder}: {RESULTS_FILE}, results.md")


def write_pair_scores(path: Path, encoders: list[str], tasks: list[Task], scores: list[list[np.ndarray]]) -> None:
    """Write every encoder's score of every pair, for comparing encoders pair by pair.

    The columns are set (the task's title), gold, and encoder-0, encoder-1 ... in the order of `encoders`; the metadata
    has their names, and the checksum of each set. No text is kept.

    Args:
        scores: as of `measure_encoders`.
    """

    def tables() -> Iterator[pa.Table]:
        for place, task in enumerate(tasks):
            columns = {"set": [task.title] * len(task.pairs), "gold": np.asarray(task.pairs[task.gold], np.float64)}
            columns |= {f"encoder-{i}": own[place].astype(np.float32) for i, own in enumerate(scores)}
            yield pa.table(columns)

    sets = {task.title: {"gold": task.gold, "sha256": task.sha256} for task in tasks}
    write_tables(path, tables(), {"encoders": encoders, "sets": sets})


def result_entries(encoders: list[str], task: Task, scores: np.ndarray) -> list[dict[str, Any]]:
    """Return the entries of results.json for one measurement, one for each metric."""
    kind = "+".join(dict.fromkeys(inspect_encoder(name) for name in encoders)).replace("plm", "bi")
    entry = dict(encoders=encoders, kind=kind, task=task.name, split=task.split, n=len(scores))
    entry |= dict(data_sha256=task.sha256, code=code_version())
    return [dict(entry, metric=metric, value=value) for metric, value in measure(task, scores).items()]


def results_table(results: list[dict[str, Any]], paper: str | None = None) -> str:
    """Return `result_rows` as a Markdown table."""
    return markdown_table(*result_rows(results, paper))


def result_rows(results: list[dict[str, Any]], paper: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the entries of results.json as a table: a row for each encoder, a column for each task, their mean.

    Args:
        paper: setting of the paper's tables, whose row of the same kind follows each of ours (where there are single
            encoders, each of theirs).
    Returns:
        The header, and the rows.
    """
    shown = [entry for entry in results if entry["metric"] in PRIMARY]
    titles = list(dict.fromkeys(title(entry["task"], entry["split"]) for entry in shown))
    tests = [title for title in titles if not title.endswith(".dev")]
    averaged = have_a_mean(shown, tests)
    rows: dict[str, dict[str, float | None]] = {}
    fewest = min((len(entry["encoders"]) for entry in shown), default=0)
    kinds = {" + ".join(entry["encoders"]): entry["kind"] for entry in shown if len(entry["encoders"]) == fewest}
    for entry in shown:
        rows.setdefault(" + ".join(entry["encoders"]), {})[title(entry["task"], entry["split"])] = entry["value"]
    body = []
    for name, values in rows.items():
        known = [value for title, value in values.items() if title in tests and value is not None]
        body.append([name, *(shown_value(values.get(title)) for title in titles)])
        body[-1] += [shown_value(float(np.mean(known)) if known else None)] if averaged else []
        body += paper_rows(row_of(paper, kinds[name]), titles, tests, averaged) if paper and name in kinds else []
    return ["encoder", *titles, *(["mean of tests"] if averaged else [])], body


def have_a_mean(entries: list[dict[str, Any]], tests: list[str]) -> bool:
    """Return whether there are several sets, all measured by one metric: AUC and Spearman's rho have no mean."""
    shown = [entry["metric"] for entry in entries if title(entry["task"], entry["split"]) in tests]
    return len(tests) > 1 and len(PRIMARY.intersection(shown)) == 1


def paper_rows(row: str, titles: list[str], tests: list[str], averaged: bool) -> list[list[str]]:
    """Return the paper's row for a table, or no row if it has no figure for any of these sets.

    Args:
        row: as `paper.published` takes it.
        titles: of the table's columns.
        tests: those among them whose mean is the last column.
        averaged: whether there is such a column.
    """
    *values, mean = published_values(row, tests)
    if mean is None and not any(values):
        return []
    known = dict(zip(tests, values, strict=True))
    cells = [shown_value(known.get(title)) for title in titles] + ([shown_value(mean)] if averaged else [])
    return [[f"paper: {row}", *cells]]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with the first column to the left and numbers to the right."""
    rule = [":---"] + ["---:"] * (len(header) - 1)
    lines = [[printable(" ".join(cell.split())).replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def origin(results: list[dict[str, Any]]) -> str:
    """Return a line of Markdown under a table: which code measured, on which data."""
    codes = dict.fromkeys(entry["code"] for entry in results if "code" in entry)
    sets = {title(entry["task"], entry["split"]): entry.get("data_sha256", "") for entry in results}
    sums = ", ".join(f"{name} `{sum_[:12]}`" for name, sum_ in sets.items() if sum_)
    return f"Measured by trans-encoder {', '.join(codes)}. SHA-256 of the sets: {sums}.\n" if codes else ""


def log_table(accelerator: Accelerator, name: str, header: list[str], rows: list[list[str]]) -> None:
    """Log a whole table to every tracker; TensorBoard, which knows no tables, gets Markdown."""
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log({name: markdown_table(header, rows)})
        else:
            table = importlib.import_module(tracker.name).Table(columns=header, data=rows)
            tracker.log({name: table})
