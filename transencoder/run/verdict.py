"""The verdict on a run: whether what it ends with is better or worse than what it began with.

By the paired bootstrap: the pairs of a set are drawn again with replacement, and both encoders are measured on every
draw. Without labels it says how far they differ, and draws the pairs whose labels would decide it.
"""

import dataclasses
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transencoder.config.parsing import parse_stage
from transencoder.data.formats import FORMULA
from transencoder.data.scores import read_metadata
from transencoder.data.tables import PAIRS, read_pairs
from transencoder.data.tasks import load_tasks, title
from transencoder.errors import InputError
from transencoder.evaluation import METRICS, PRIMARY, metrics_of
from transencoder.inference import Inference
from transencoder.model_files import model_options
from transencoder.run.layout import Layout
from transencoder.run.stages import read_stages
from transencoder.run.summary import Round, best_round, dev_of, tests_of
from transencoder.runtime.accelerator import log
from transencoder.runtime.accelerator import start as start_accelerator
from transencoder.runtime.files import write_text
from transencoder.runtime.records import RESULTS_FILE
from transencoder.scoring import Teachers

RESAMPLES, DRAWS_AT_ONCE, SEED = 1000, 50, 2021
PAIRS_TO_LABEL = 100
COMPARED_PAIRS = 10_000  # of the training pairs, where there are no labels
NAMED_SETS = 3  # more are counted


@dataclass(frozen=True)
class Scored:
    """The pairs of a labelled set as several encoders score them.

    Args:
        title: of the set.
        gold: "label" or "score"; its first metric is what is compared.
        values: the gold values, float [pairs].
        scores: float [encoders, pairs].
    """

    title: str
    gold: str
    values: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Gain:
    """By how much one encoder is better than another on sets of one metric, their mean, with a 95 % interval."""

    metric: str
    sets: list[str]
    value: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """Return "better" or "worse" where the interval excludes 0, else "same"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "same"

    def __str__(self) -> str:
        where = ", ".join(self.sets) if len(self.sets) <= NAMED_SETS else f"the mean of {len(self.sets)} sets"
        return f"{self.value:+.2f} (95 % {self.low:+.2f} ... {self.high:+.2f}) on {where}"


@dataclass
class Verdict:
    """What a run comes to.

    Args:
        word: better, same, worse or unknown; of the bi-encoder, which is what the start was, too.
        line: the first line.
        notes: the lines after it.
        gains: "bi", "cross" -> over the start.
        search: what search.py should rank by, and why; None where it was not measured.
    """

    word: str
    line: str
    notes: list[str] = field(default_factory=list)
    gains: dict[str, list[Gain]] = field(default_factory=dict)
    search: dict[str, str] | None = None

    @property
    def text(self) -> str:
        """Return all lines."""
        return "\n".join([self.line, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """Return what results.json says of it."""
        gains = {kind: [vars(gain) for gain in gains] for kind, gains in self.gains.items()}
        return {"verdict": self.line, "word": self.word, "notes": self.notes, "gains": gains, "search": self.search}


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def resampled(gold: str, values: np.ndarray, scores: np.ndarray, seed: int) -> np.ndarray:
    """Return the primary metric x 100 of several encoders on draws of the pairs; the pairs as they are come first.

    Args:
        gold, values, scores: as of `Scored`.
    Returns:
        float64 [1 + RESAMPLES, encoders]. Where a draw leaves nothing to rank, AUC is 50 and the correlation 0.
    """
    pairs, draws = len(values), np.random.default_rng(seed)
    sides = [_groups(values), *map(_groups, scores)]
    found = [_metrics(gold, values, sides, np.ones((1, pairs), np.int64))]
    for _ in range(RESAMPLES // DRAWS_AT_ONCE):
        rows = draws.integers(0, pairs, (DRAWS_AT_ONCE, pairs)) + pairs * np.arange(DRAWS_AT_ONCE)[:, None]
        counts = np.bincount(rows.ravel(), minlength=rows.size).reshape(rows.shape)
        found.append(_metrics(gold, values, sides, counts))
    return 100 * np.concatenate(found)


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the order of values, where in it equal ones begin, and the group of each value; sorted once for all."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-math.inf))
    group = np.empty(len(values), np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    return order, starts, group


def _ranks(groups: tuple[np.ndarray, np.ndarray, np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return the mean rank of every value among as many copies of each as `counts` says, float64 [draws, pairs]."""
    order, starts, group = groups
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    return (np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group]


def _metrics(gold: str, values: np.ndarray, sides: list[Any], counts: np.ndarray) -> np.ndarray:
    """Return AUC, or Spearman's rho, of each side but the first on each draw, at most 1: float64 [draws, encoders]."""
    total = counts.sum(axis=1)
    if gold == "label":  # Mann and Whitney: the positives' ranks, less those that they have among themselves
        positive = counts * (values > 0.5)
        n = positive.sum(axis=1)
        wins = [(positive * _ranks(side, counts)).sum(axis=1) - n * (n + 1) / 2 for side in sides[1:]]
        return np.stack([_ratio(win, n * (total - n), 0.5) for win in wins], axis=1)
    truth, *found = (_ranks(side, counts) - (total[:, None] + 1) / 2 for side in sides)
    spread = (counts * truth**2).sum(axis=1)
    return np.stack(
        [
            _ratio((counts * truth * ranks).sum(axis=1), np.sqrt(spread * (counts * ranks**2).sum(axis=1)), 0.0)
            for ranks in found
        ],
        axis=1,
    )


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), otherwise), where=below > 0)


def gains_over_first(sets: list[Scored]) -> list[list[Gain]]:
    """Return how much each encoder after the first gains over that one; a `Gain` for each metric among the sets.

    A gain is the mean over its sets, whose pairs are drawn independently.
    """
    found: list[list[Gain]] = [[] for _ in sets[0].scores[1:]]
    for gold in dict.fromkeys(scored.gold for scored in sets):
        same = [scored for scored in sets if scored.gold == gold]
        draws = [resampled(gold, scored.values, scored.scores, SEED + place) for place, scored in enumerate(same)]
        mean = np.mean(draws, axis=0)
        for gains, differences in zip(found, (mean[:, 1:] - mean[:, :1]).T, strict=True):
            low, high = np.percentile(differences[1:], [2.5, 97.5])
            titles = [scored.title for scored in same]
            gains.append(Gain(metrics_of(gold)[0], titles, float(differences[0]), float(low), float(high)))
    return found


def word_of(gains: list[Gain]) -> str:
    """Return "worse" if any gain is, else "better" if any is, else "same"."""
    words = {gain.word for gain in gains}
    return next((word for word in ("worse", "better") if word in words), "same")


def in_words(gains: list[Gain]) -> str:
    """Return the gains as a phrase, with their metrics where these are several."""
    names = [METRICS[gain.metric].card.removesuffix(" x 100") for gain in gains]
    return "; ".join(
        f"{gain}, {name}" if len(gains) > 1 else str(gain) for gain, name in zip(gains, names, strict=True)
    )


# --- a run with labels -----------------------------------------------------------------------------------------------


def judge(run: Path, rounds: list[Round]) -> Verdict:
    """Return the verdict on a run where something is measured: the best start against the best of each kind.

    Raises:
        InputError: the scores of the pairs are damaged, or not those of the results.
    """
    dev, tests = dev_of(rounds), tests_of(rounds)
    start, end = start_and_end(rounds)
    cross = best_round(rounds, "cross") if any(round_.kind == "cross" for round_ in rounds) else None
    compared = [start, end, *([cross] if cross else [])]
    missing = [path for round_ in compared if not (path := Layout(run).pair_scores(round_.cycle)).is_file()]
    if missing:
        again = f"delete {RESULTS_FILE} beside it and run the same command again"
        return Verdict("unknown", f"VERDICT unknown: there is no {missing[0]}; {again}")
    found = gains_over_first(read_scored(run, compared, tests or [dev]))
    gains = dict(zip(("bi", "cross"), found, strict=False))
    where = "" if tests else " (dev, on which the best was chosen: there is no test set)"
    verdict = verdict_by(gains["bi"], start, end, where)
    verdict.gains = gains
    if cross:
        below = word_of(gains["cross"]) == "worse"
        said = "WARNING: the cross-encoder is below its teacher, the start" if below else "Cross-encoder"
        verdict.notes.append(f"{said}: {in_words(gains['cross'])}")
        verdict.search = how_to_search(read_scored(run, [end, cross], [dev] if dev else tests))
        verdict.notes.append(f"Search: {verdict.search['why']}")
    return verdict


def verdict_by(gains: list[Gain], start: Round, end: Round, where: str = "") -> Verdict:
    """Return the verdict on the bi-encoder by its gains over the start. `where`: what is to be said of the set."""
    verdict = Verdict(word_of(gains), verdict_line(gains) + where, gains={"bi": gains})
    if end is start:
        verdict.line += "; the start stays the best"
    elif verdict.word == "worse":
        verdict.notes.append(f"Keep the start, {start.path}: the end is worse, and published only by --push_worse")
    return verdict


def start_and_end(rounds: list[Round]) -> tuple[Round, Round]:
    """Return the bi-encoders that a verdict compares: the best start, and the best or last one of all."""
    return best_round([round_ for round_ in rounds if not round_.cycle], "bi"), best_round(rounds, "bi")


def gain_over(run: Path, rounds: list[Round], start: Round, end: Round) -> list[Gain] | None:
    """Return the gains of any encoder of a run over a start; None where that is itself, or where nothing tells."""
    titles = tests_of(rounds) or list(filter(None, [dev_of(rounds)]))
    files = [Layout(run).pair_scores(round_.cycle) for round_ in (start, end)]
    if start is end or not titles or not all(file.is_file() for file in files):
        return None
    return gains_over_first(read_scored(run, [start, end], titles))[0]


def verdict_line(gains: list[Gain], kind: str = "bi") -> str:
    """Return the line that a run, its summary and its cards begin with."""
    return f"VERDICT {word_of(gains)}: {kind}-encoder {in_words(gains)}"


def how_to_search(sets: list[Scored]) -> dict[str, str]:
    """Return what ranks best: the bi-encoder, unless the cross-encoder or the mean was measured to be better.

    Args:
        sets: scores of the bi-encoder and the cross-encoder.
    """
    three = [Scored(s.title, s.gold, s.values, np.vstack([s.scores, s.scores.mean(axis=0)])) for s in sets]
    gains = dict(zip(("cross", "mean"), gains_over_first(three), strict=True))
    if max(np.abs(s.scores).max() for s in sets) > 1 + 1e-5:
        del gains["mean"]  # search.py takes none of a dot product and a probability
    better = [name for name, found in gains.items() if word_of(found) == "better"]
    if not better:
        best = max(gains.values(), key=lambda found: found[0].value)
        return {"rank_by": "bi", "why": f"retrieval alone; re-ranking was not measured to be better: {in_words(best)}"}
    name = max(better, key=lambda name: gains[name][0].value)
    what = "by the mean of both encoders" if name == "mean" else "by the cross-encoder alone"
    return {"rank_by": name, "why": f"re-rank {what}, against retrieval alone {in_words(gains[name])}"}


def read_scored(run: Path, rounds: list[Round], titles: list[str]) -> list[Scored]:
    """Read the scores that several encoders gave to the pairs of the sets `titles`.

    Raises:
        InputError: a file is damaged, or does not belong to the results beside it.
    """
    columns = [_read_one(Layout(run).pair_scores(round_.cycle), round_) for round_ in rounds]
    found = []
    for name in titles:
        sets = [own[name] for own in columns]
        if len({own["sha256"] for own in sets}) > 1:
            raise InputError(f"{run}: {name} was another set in one of the cycles; measure again with --overwrite")
        scores = np.stack([own["scores"] for own in sets]).astype(np.float64)
        found.append(Scored(name, sets[0]["gold"], sets[0]["values"], scores))
    return found


def _read_one(path: Path, round_: Round) -> dict[str, dict[str, Any]]:
    """Return one encoder's scores, gold values, their kind and checksum, by set."""
    try:
        metadata, entries = read_metadata(path), [e for e in round_.entries if e["metric"] in PRIMARY]
        column = f"encoder-{metadata['encoders'].index(entries[0]['encoders'][0])}"
        table, found = pq.read_table(path, columns=["set", "gold", column]), {}
        for entry in entries:
            name = title(entry["task"], entry["split"])
            rows = table.filter(pc.equal(table["set"], name))
            found[name] = dict(metadata["sets"][name], values=rows["gold"].to_numpy(), scores=rows[column].to_numpy())
            same = (found[name]["sha256"], len(rows)) == (entry["data_sha256"], entry["n"])
            if not same or not np.isfinite(found[name]["scores"]).all():
                raise ValueError(f"{name} is another set there")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise InputError(f"{path}: not the scores of the results beside it ({error}); delete both") from error
    return found


# --- a run without labels --------------------------------------------------------------------------------------------


def score_both(run: Path, rounds: list[Round], sets: list[Any], scoring: Any) -> list[np.ndarray]:
    """Return the scores of the first bi-encoder and of the last one for sets of pairs, float32 [2, pairs] each."""
    inference = Inference(start_accelerator(scoring), scoring.eval_batch_tokens)
    options = model_options(scoring)
    scores = [Teachers([str(one.path)], options=options).score(sets, inference) for one in start_and_end(rounds)]
    return [np.stack(both) for both in zip(*scores, strict=True)]


def scoring_options(run: Path) -> Any:
    """Return the options with which the run labels, where encoders are read as in the run."""
    labels = Layout(run).scores(1, "bi").name
    words = next(stage.words for stage in read_stages(Layout(run).plan) if Path(stage.output).name == labels)
    return parse_stage("score_pairs", argv=[*words, "--recipe", str(Layout(run).recipe)])


def judge_on(run: Path, rounds: list[Round], specs: list[str]) -> Verdict:
    """Return the verdict by labelled sets that the recipe does not name, as evaluate_encoders.py takes them."""
    scoring = dataclasses.replace(scoring_options(run), skip_bad_rows=True)  # whoever labels may leave out pairs
    tasks = load_tasks(specs, scoring.data_dir, scoring)
    scores = score_both(run, rounds, [task.pairs for task in tasks], scoring)
    sets = [
        Scored(task.title, task.gold, np.asarray(task.pairs[task.gold], np.float64), own)
        for task, own in zip(tasks, scores, strict=True)
    ]
    (gains,) = gains_over_first(sets)
    return verdict_by(gains, *start_and_end(rounds))


def judge_unlabelled(run: Path, rounds: list[Round]) -> Verdict:
    """Return the verdict by what was labelled since the run; write the pairs that would decide it where that is none.

    Until then it says how far start and end order the training pairs differently.
    """
    path = Layout(run).to_label
    labelled = path.exists() and _has_labels(path)
    if labelled:
        try:
            return judge_on(run, rounds, [f"labelled={path}"])
        except InputError as error:  # somebody is at it
            log(f"No verdict yet: {error}")
    pairs = read_pairs([str(Layout(run).scores(rounds[-1].cycle, "bi"))])
    chosen = np.random.default_rng(SEED).permutation(len(pairs))[:COMPARED_PAIRS]
    pairs = pairs.select(np.sort(chosen))
    (scores,) = score_both(run, rounds, [pairs], scoring_options(run))
    ones = np.ones((1, len(pairs)), np.int64)
    first, last = (_ranks(_groups(own), ones)[0] for own in scores)
    moved = last - first
    line = (
        f"VERDICT unknown: there are no labels; start and end rank {len(pairs):,} training pairs with a "
        f"Spearman correlation of {rank_correlation(*scores):.3f}, and half of the pairs moved by at least "
        f"{100 * np.median(np.abs(moved)) / len(pairs):.1f} % of the list"
    )
    verdict = Verdict("unknown", line)
    rows = draw_to_label(moved, [list(pairs[name]) for name in PAIRS])
    if not len(rows):
        verdict.notes.append("Start and end rank all pairs alike: there is nothing to label.")
        return verdict
    if not labelled:
        lines = ["\t".join([*PAIRS, "label"])]
        lines += ["\t".join([*(pairs[int(row)][name] for name in PAIRS), ""]) for row in rows]
        write_text(path, "\n".join(lines) + "\n")
    command = shlex.join(["python", "scripts/summarize_run.py", str(run), "--tasks", f"labelled={path}"])
    verdict.notes.append(f"To find out, fill in the column label (1: same, 0: not) of {path}, then run: {command}")
    return verdict


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rho of two encoders' scores, -1 to 1; 0 where one of them is constant."""
    return float(_metrics("score", first, [_groups(first), _groups(second)], np.ones((1, len(first)), np.int64))[0, 0])


def draw_to_label(moved: np.ndarray, texts: list[list[str]]) -> np.ndarray:
    """Return the rows of the pairs to label, in an order that does not tell which of them moved which way.

    Args:
        moved: places by which each pair ranks higher at the end than at the start, float [pairs].
        texts: the two sentences of each pair.
    """
    # Only pairs that start and end order differently tell them apart. Half of the drawn ones moved up most, half moved
    # down most: if the changes are noise, both halves hold the same share of true pairs, and the end is better just so
    # far as the half that moved up holds more. That difference is what AUC on them compares.
    plain = [not set('\t\n\r"') & set(text) and not text.startswith(FORMULA) for side in texts for text in side]
    fits = np.reshape(plain, (2, -1)).all(axis=0)  # what a spreadsheet or another reader would take for something else
    order = np.argsort(-moved, kind="stable")
    risen = [row for row in order if moved[row] > 0 and fits[row]]
    fallen = [row for row in order[::-1] if moved[row] < 0 and fits[row]]
    half = min(PAIRS_TO_LABEL // 2, len(risen), len(fallen))
    return np.random.default_rng(SEED).permutation(np.array(risen[:half] + fallen[:half], np.int64))


def _has_labels(path: Path) -> bool:
    """Return whether somebody has begun to label; a file that cannot be read is somebody's, too."""
    try:
        return any(line.rpartition("\t")[2].strip() for line in path.read_text(encoding="utf-8").splitlines()[1:])
    except (OSError, ValueError):
        return True
