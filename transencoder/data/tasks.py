"""The evaluation tasks: where each one lies on the Hub, what its file is called locally, and how it is measured."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np

from transencoder.config.arguments import TrainingArguments
from transencoder.config.options import Reading
from transencoder.data.formats import column_names
from transencoder.data.hub_sets import load_split
from transencoder.data.tables import AS_IT_IS, PAIRS, check_hub_table, is_hub_id, parse_renaming, read_pairs
from transencoder.errors import InputError
from transencoder.runtime.accelerator import log_found


@dataclass(frozen=True)
class Source:
    """Describe a task on the Hub.

    Args:
        hub_id, config, revision: as `datasets.load_dataset` takes them. Without a commit, the one that the Hub has is
            loaded, logged, and noted in run.json.
        splits: our split name -> the Hub's, or a part of it.
        columns: renaming, ours=theirs.
        gold: "score" (Spearman, Pearson), "label" (AUC), or None for pairs only.
        rows: rows of each split; a difference is logged when the task is loaded.
        note: why there may be another number of rows.
        scale: lowest and highest score of the published set.
        positive: the Hub's label that is our 1.
        ordered: the two sentences play different roles, so that a pair must not be swapped.
        benchmark: MTEB's name of the task, under which the Hub collects results on its test split.
    """

    hub_id: str
    revision: str | None = None
    config: str | None = None
    splits: tuple[tuple[str, str], ...] = (("test", "test"),)
    columns: tuple[str, ...] = ()
    gold: str | None = "score"
    rows: tuple[tuple[str, int], ...] = ()
    note: str = ""
    scale: tuple[float, float] = (0.0, 5.0)
    positive: int = 1
    ordered: bool = False
    benchmark: str | None = None


PLAIN_NAME = re.compile(r"\w[\w.-]{0,99}")  # what a task, or a student and its folders, can be called
THREE_SPLITS = (("test", "test"), ("dev", "validation"), ("train", "train"))

TASKS = {
    "sts12": Source(
        "mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384", rows=(("test", 3108),), benchmark="STS12"
    ),
    "sts13": Source(
        "mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca", rows=(("test", 1500),), benchmark="STS13"
    ),
    "sts14": Source(
        "mteb/sts14-sts", "6031580fec1f6af667f0bd2da0a551cf4f0b2375", rows=(("test", 3750),), benchmark="STS14"
    ),
    "sts15": Source(
        "mteb/sts15-sts", "ae752c7c21bf194d8b67fd573edf7ae58183cbe3", rows=(("test", 3000),), benchmark="STS15"
    ),
    "sts16": Source(
        "mteb/sts16-sts", "4d8694f8f0e0100860b497b999b3dbed754a0513", rows=(("test", 1186),), benchmark="STS16"
    ),
    "stsb": Source(
        "mteb/stsbenchmark-sts",
        "b0fddb56ed78048fa8b90373c8a3cfc37b684831",
        splits=THREE_SPLITS,
        rows=(("test", 1379), ("dev", 1500), ("train", 5749)),
        benchmark="STSBenchmark",
    ),
    "sickr": Source(
        "RobZamp/sick",
        "refs/convert/parquet",
        splits=THREE_SPLITS,
        columns=("sentence1=sentence_A", "sentence2=sentence_B", "score=relatedness_score"),
        rows=(("test", 4906), ("dev", 495), ("train", 4439)),
        note="SentEval's files hold 4927, 500 and 4500",
        scale=(1.0, 5.0),
    ),
    # GLUE keeps the labels of its QQP and QNLI test sets to itself, so that its validation sets are divided here. For
    # QNLI and MRPC these are the paper's own sets; its QQP is another sample of as many of Quora's pairs.
    "qqp": Source(
        "nyu-mll/glue",
        config="qqp",
        splits=(("test", "validation[1000:11000]"), ("dev", "validation[:1000]"), ("train", "train[:10000]")),
        columns=("sentence1=question1", "sentence2=question2"),
        gold="label",
        rows=(("test", 10000), ("dev", 1000), ("train", 10000)),
    ),
    "qnli": Source(
        "nyu-mll/glue",
        config="qnli",
        splits=(("test", "validation[1000:]"), ("dev", "validation[:1000]"), ("train", "train[:10000]")),
        columns=("sentence1=question", "sentence2=sentence"),
        gold="label",
        rows=(("test", 4463), ("dev", 1000), ("train", 10000)),
        positive=0,  # "entailment"
        ordered=True,
    ),
    "mrpc": Source(
        "nyu-mll/glue",
        config="mrpc",
        splits=THREE_SPLITS,
        gold="label",
        rows=(("test", 1725), ("dev", 408), ("train", 3668)),
    ),
    "snli": Source(
        "stanfordnlp/snli",
        splits=THREE_SPLITS,
        columns=("sentence1=premise", "sentence2=hypothesis"),
        gold=None,
        rows=(("test", 10000), ("dev", 10000), ("train", 550152)),
    ),
}

# Names that stand for several tasks, in the order of the paper's tables.
GROUPS = {
    "sts": ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb"),
    "sts_sickr": ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr"),
    "binary": ("qqp", "qnli", "mrpc"),
}
MEASURED = [name for name, source in TASKS.items() if source.gold]
KNOWN = f"tasks: {', '.join(MEASURED)} (stsb.dev names another split); groups: {', '.join(GROUPS)}"


@dataclass(frozen=True)
class Task:
    """Hold labelled pairs to measure on.

    Args:
        name, split: "stsb", "test".
        pairs: columns sentence1, sentence2 and `gold`.
        gold: "score" (graded) or "label" (0 or 1).
    """

    name: str
    split: str
    pairs: datasets.Dataset
    gold: str

    @property
    def title(self) -> str:
        """Return the name that tables and plots show."""
        return title(self.name, self.split)

    @cached_property
    def sha256(self) -> str:
        """Return the checksum of the pairs and their gold values, whatever file they came from."""
        sha = hashlib.sha256()
        for row in zip(*(self.pairs[name] for name in (*PAIRS, self.gold)), strict=True):
            sha.update(json.dumps(row).encode())
        return sha.hexdigest()


def expand_groups(specs: list[str]) -> list[str]:
    """Replace groups of tasks by their members, each once: ["sts", "a.tsv"] -> ["sts12", ..., "stsb", "a.tsv"]."""
    return list(dict.fromkeys(name for spec in specs for name in GROUPS.get(spec, (spec,))))


def title(name: str, split: str) -> str:
    """Return "stsb" for the test split, "stsb.dev" for another."""
    return name if split == "test" else f"{name}.{split}"


def load_task(spec: str, data_dir: str | None = None, reading: Reading = AS_IT_IS) -> Task:
    """Load a task for measuring.

    Args:
        spec: a registered task ("stsb", "stsb.dev"), a file, or NAME=FILE.
        data_dir: folder with the registered tasks as NAME.jsonl(.gz) or NAME.SPLIT.jsonl(.gz).
        reading: of files.
    Raises:
        InputError: unknown task or split, missing file, gold values of both kinds or all the same, or anything
            `read_pairs` refuses.
    """
    name, split, path = parse_spec(spec)
    if path is None:
        gold = TASKS[name].gold
        if gold is None:
            raise InputError(f"{spec}: pairs only, nothing to measure; {KNOWN}")
        task = Task(name, split, read_split(title(name, split), data_dir, gold), gold)
    else:
        if not Path(path).exists() and not is_hub_id(path):
            raise InputError(f"{spec}: neither a file nor a task; {KNOWN}")
        gold = _gold_of(path, reading.columns)
        task = Task(name, split, read_pairs([path], gold, reading), gold)
    values = np.asarray(task.pairs[gold])
    if np.ptp(values) == 0:
        what = "AUC needs both labels" if gold == "label" else "a correlation needs two values"
        raise InputError(f"{spec}: every {gold} is {values[0]:g}; {what}")
    return task


def load_tasks(specs: list[str], data_dir: str | None, reading: Reading) -> list[Task]:
    """Load tasks and groups of them, each once; as `load_task`."""
    check_titles(specs, "--tasks")
    return [load_task(spec, data_dir, reading) for spec in expand_groups(specs)]


def check_titles(specs: list[str], where: str) -> None:
    """Refuse two tasks of one name: a table would have one column for both. `where`: how the error begins."""
    titles = [title(*parse_spec(spec)[:2]) for spec in expand_groups(specs)]
    if len(set(titles)) < len(titles):
        raise InputError(f"{where}: the tasks' names must differ (NAME=FILE gives a name): {', '.join(titles)}")


def split_name(spec: str) -> tuple[str, str]:
    """Return the name and the path of NAME=PATH, or no name where `spec` is a path itself, of whatever characters."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and not Path(spec).exists() else ("", spec)


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Return the name, the split and the file of a task.

    "stsb.dev" -> stsb, dev, None; "mine.dev=a.tsv" -> mine, dev, a.tsv; "a.tsv" -> a, test, a.tsv.

    Raises:
        InputError: a split that the task does not have, or a name that is no plain word.
    """
    name, path = split_name(spec)
    if path != spec and not PLAIN_NAME.fullmatch(name):
        raise InputError(f"{spec}: {name!r} cannot be a task's name: letters, digits, '_', '.' and '-' only")
    base, _, split = (name or spec).partition(".")
    if name:
        return base, split or "test", path
    splits = [ours for ours, _ in TASKS[base].splits] if base in TASKS else []
    if (split or "test") in splits:
        return base, split or "test", None
    if splits and not Path(spec).exists():
        raise InputError(f"{spec}: no such file, and no split of {base}, which has: {', '.join(splits)}")
    return Path(spec).name.partition(".")[0], "test", spec


def read_split(spec: str, data_dir: str | None, gold: str | None) -> datasets.Dataset:
    """Read a split of a registered task, from the data folder or the Hub, and log how many rows it has.

    Args:
        spec: "stsb.train"; "stsb" is the test split.
        gold: the column to read as well: "score", "label", or None for the pairs only.
    """
    name, _, split = spec.partition(".")
    split = split or "test"
    source = TASKS[name]
    path = local_file(spec, data_dir) or (local_file(f"{name}.test", data_dir) if split == "test" else None)
    if path:
        table = read_pairs([str(path)], gold)
    elif data_dir:
        stems = [name, f"{name}.test"] if split == "test" else [spec]
        wanted = " or ".join(f"{stem}.jsonl(.gz)" for stem in stems)
        raise InputError(
            f"--data_dir {data_dir}: no {wanted} for task {name}; put it there, leave --data_dir out to take all from "
            "the Hub, or name other tasks and pairs"
        )
    else:
        table = _from_hub(source, split, gold)
    _log_size(title(name, split), source, split, table, gold)
    return table


def local_file(stem: str, data_dir: str | None, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz")) -> Path | None:
    """Return the file of this name in the data folder, or None."""
    paths = [Path(data_dir) / f"{stem}{suffix}" for suffix in suffixes] if data_dir else []
    return next((path for path in paths if path.is_file()), None)


def _from_hub(source: Source, split: str, gold: str | None) -> datasets.Dataset:
    theirs = dict(source.splits)[split]
    try:
        table = load_split(source.hub_id, theirs, source.config, source.revision)
    except InputError as error:
        raise InputError(f"{error}; or put the tasks into a folder and pass it as --data_dir") from error
    wanted = (*PAIRS, gold) if gold else PAIRS
    renaming = dict(reversed(item.split("=")) for item in source.columns)
    table = table.rename_columns({old: new for old, new in renaming.items() if new in wanted}).select_columns(wanted)
    if gold == "label" and source.positive == 0:
        table = table.map(lambda row: {"label": 1 - row["label"]})
    return check_hub_table(table, f"{source.hub_id}:{theirs}", wanted)


def _log_size(name: str, source: Source, split: str, table: datasets.Dataset, gold: str | None) -> None:
    """Log the rows found and expected, and scores that are on another scale."""
    expected, found = dict(source.rows).get(split), f"{name}: {len(table)} rows"
    lowest, highest = source.scale
    if expected == len(table):
        found += ", as expected"
    elif expected is not None:
        found += f", {expected} expected" + (f" ({source.note})" if source.note else "")
    if gold == "score":
        scores = np.asarray(table["score"])
        if scores.min() < lowest or scores.max() > highest:
            found += f"; scores from {scores.min():g} to {scores.max():g}, {lowest:g} to {highest:g} expected"
    log_found(found)


def _gold_of(path: str, columns: list[str] | None) -> str:
    """Return "label" or "score", whichever a file has; where it has both, a renaming decides."""
    if is_hub_id(path):
        return "score"
    found, renaming = column_names(path), parse_renaming(columns)
    named = [gold for gold in ("score", "label") if renaming.get(gold) in found]
    there = named or [gold for gold in ("score", "label") if gold in found]
    if len(there) > 1:
        raise InputError(
            f"{path}: has a score and a label; choose with --columns score=score or --columns label=label"
        )
    return there[0] if there else "score"


def load_dev(arguments: TrainingArguments) -> Task | None:
    """Load the task of --dev, for choosing a checkpoint; None without --dev."""
    return load_task(arguments.dev, arguments.data_dir, arguments) if arguments.dev else None
