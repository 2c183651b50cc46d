"""The evaluation tasks: where each one lies on the Hub, what its file is called locally, and how it is measured."""

from dataclasses import dataclass
from pathlib import Path

import datasets

from transencoder.arguments import TrainingArguments
from transencoder.errors import InputError
from transencoder.runtime import log
from transencoder.tables import column_names, is_hub_id, parse_renaming, read_pairs


@dataclass(frozen=True)
class Source:
    """A task on the Hub.

    Args:
        hub_id, config, revision: as `datasets.load_dataset` takes them.
        splits: our split name -> the Hub's; the first is the one that is reported.
        columns: renaming, ours=theirs.
        gold: "score" (Spearman, Pearson) or "label" (AUC).
        rows: rows of each split, where known: a difference is said when the task is loaded.
    """

    hub_id: str
    revision: str | None = None
    config: str | None = None
    splits: tuple[tuple[str, str], ...] = (("test", "test"),)
    columns: tuple[str, ...] = ()
    gold: str = "score"
    rows: tuple[tuple[str, int], ...] = ()


STSB_SPLITS = (("test", "test"), ("dev", "validation"), ("train", "train"))
# GLUE's test sets carry no labels, so its validation sets are what is reported.
GLUE_SPLITS = (("test", "validation"), ("train", "train"))

TASKS = {
    "sts12": Source("mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384", rows=(("test", 3108),)),
    "sts13": Source("mteb/sts13-sts", "7e90230a92c190f1bf69ae9002b8cea547a64cca", rows=(("test", 1500),)),
    "sts14": Source("mteb/sts14-sts", "6031580fec1f6af667f0bd2da0a551cf4f0b2375", rows=(("test", 3750),)),
    "sts15": Source("mteb/sts15-sts", "ae752c7c21bf194d8b67fd573edf7ae58183cbe3", rows=(("test", 3000),)),
    "sts16": Source("mteb/sts16-sts", "4d8694f8f0e0100860b497b999b3dbed754a0513", rows=(("test", 1186),)),
    "stsb": Source(
        "mteb/stsbenchmark-sts",
        "b0fddb56ed78048fa8b90373c8a3cfc37b684831",
        splits=STSB_SPLITS,
        rows=(("test", 1379), ("dev", 1500), ("train", 5749)),
    ),
    "sickr": Source(
        "RobZamp/sick",
        "refs/convert/parquet",
        splits=STSB_SPLITS,
        columns=("sentence1=sentence_A", "sentence2=sentence_B", "score=relatedness_score"),
        rows=(("test", 4927), ("dev", 500), ("train", 4500)),
    ),
    "qqp": Source(
        "nyu-mll/glue",
        config="qqp",
        splits=GLUE_SPLITS,
        columns=("sentence1=question1", "sentence2=question2"),
        gold="label",
    ),
    "qnli": Source(
        "nyu-mll/glue",
        config="qnli",
        splits=GLUE_SPLITS,
        columns=("sentence1=question", "sentence2=sentence"),
        gold="label",
    ),
    "mrpc": Source("nyu-mll/glue", config="mrpc", splits=GLUE_SPLITS, gold="label"),
}

# Names that stand for several tasks, in the order of the paper's tables.
GROUPS = {
    "sts": ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb"),
    "sts_sickr": ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr"),
    "binary": ("qqp", "qnli", "mrpc"),
}


@dataclass(frozen=True)
class Task:
    """Labelled pairs to measure on.

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
        """As tables and plots show it."""
        return title(self.name, self.split)


def expand_groups(specs: list[str]) -> list[str]:
    """Groups of tasks by their members, each once: ["sts", "mine=a.tsv"] -> ["sts12", ..., "stsb", "mine=a.tsv"]."""
    return list(dict.fromkeys(name for spec in specs for name in GROUPS.get(spec, (spec,))))


def title(name: str, split: str) -> str:
    """ "stsb" for the test split, "stsb.dev" for another."""
    return name if split == "test" else f"{name}.{split}"


def load_task(spec: str, data_dir: str | None = None, columns: list[str] | None = None) -> Task:
    """Load a task for measuring.

    Args:
        spec: a registered task ("stsb", "stsb.dev"), a file, or NAME=FILE.
        data_dir: folder with the registered tasks as NAME.jsonl(.gz) or NAME.SPLIT.jsonl(.gz).
        columns: renaming for files.
    Raises:
        InputError: unknown task, missing file, or anything `read_pairs` refuses.
    """
    name, split, path = parse_spec(spec)
    if path is None:
        return _local_task(name, split, data_dir) if data_dir else _hub_task(name, split)
    if not Path(path).exists() and not is_hub_id(path):
        raise InputError(
            f"{spec}: neither a file nor a task; tasks: {', '.join(TASKS)} (stsb.dev names another split); "
            f"groups: {', '.join(GROUPS)}"
        )
    gold = "label" if "label" in _names(path, columns) else "score"
    return Task(name, split, read_pairs([path], gold, columns), gold)


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Name, split and file of a task.

    "stsb.dev" -> stsb, dev, None; "mine.dev=a.tsv" -> mine, dev, a.tsv; "a.tsv" -> a, test, a.tsv.
    """
    name, _, path = spec.rpartition("=")
    base, _, split = (name or spec).partition(".")
    if name:
        return base, split or "test", path
    if base in TASKS and (split or "test") in {"test", "dev", "train"}:
        return base, split or "test", None
    return Path(spec).name.partition(".")[0], "test", spec


def _local_task(name: str, split: str, data_dir: str) -> Task:
    stems = [name, f"{name}.{split}"] if split == "test" else [f"{name}.{split}"]
    for path in (Path(data_dir) / f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".jsonl.gz")):
        if path.is_file():
            task = Task(name, split, read_pairs([str(path)], TASKS[name].gold), TASKS[name].gold)
            expected = dict(TASKS[name].rows).get(split)
            if expected and expected != len(task.pairs):
                log(f"{task.title}: {len(task.pairs)} rows, where the published set has {expected}")
            return task
    raise InputError(
        f"--data_dir {data_dir}: no {' or '.join(f'{stem}.jsonl(.gz)' for stem in stems)} for task {name}"
    )


def _hub_task(name: str, split: str) -> Task:
    source = TASKS[name]
    splits = dict(source.splits)
    if split not in splits:
        raise InputError(f"{name}.{split}: the Hub has only {', '.join(splits)} of {name}")
    try:
        table = datasets.load_dataset(source.hub_id, source.config, split=splits[split], revision=source.revision)
    except Exception as error:  # the library raises a dozen types for "not there" and "no network"
        raise InputError(
            f"{name}: {source.hub_id} cannot be loaded from the Hub ({type(error).__name__}); "
            f"put {name}.jsonl(.gz) into a folder and pass it as --data_dir"
        ) from error
    renaming = dict(reversed(item.split("=")) for item in source.columns)
    table = table.rename_columns(renaming).select_columns(["sentence1", "sentence2", source.gold])
    if name == "qnli":  # the Hub's 0 is "entailment", which is our 1
        table = table.map(lambda row: {"label": 1 - row["label"]})
    return Task(name, split, table, source.gold)


def _names(path: str, columns: list[str] | None) -> list[str]:
    """Columns of a file under our names."""
    if is_hub_id(path):
        return []
    found = column_names(path)
    return found + [ours for ours, theirs in parse_renaming(columns).items() if theirs in found]


def load_dev(arguments: TrainingArguments) -> Task | None:
    """The task of --dev, for choosing a checkpoint."""
    return load_task(arguments.dev, arguments.data_dir, arguments.columns) if arguments.dev else None
