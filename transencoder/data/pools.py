"""The unlabelled pairs and sentences that the paper trains on, by name, from the Hub or from local files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from transencoder.config.arguments import LabelArguments, ScoringArguments
from transencoder.config.options import Reading, result_options
from transencoder.data.hub_sets import load_split
from transencoder.data.tables import (
    AS_IT_IS,
    PAIRS,
    SENTENCES,
    check_hub_table,
    is_hub_id,
    join_sentences,
    read_pairs,
    sample,
    sentence_parts,
    sides,
    without_repeats,
)
from transencoder.data.tasks import TASKS, expand_groups, local_file, read_split, split_name
from transencoder.errors import InputError
from transencoder.runtime.accelerator import log, log_found
from transencoder.runtime.records import HubSource, Input


@dataclass(frozen=True)
class Pool:
    """Describe unlabelled pairs: those of several sets, test sets among them, without their labels.

    Args:
        parts: splits of tasks ("stsb.train"), or other pools.
        pairs: how many there should be, exact repeats removed; None if no source says.
        printed: whether that is the paper's own count.
        note: why there may be another number of them.
    """

    parts: tuple[str, ...]
    pairs: int | None = None
    printed: bool = True
    note: str = ""


UNSCORED = "the paper also takes the pairs of 2015 and 2016 that were never scored; the sets on the Hub lack them"
POOLS = {
    "sts": Pool(
        ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb.train", "stsb.dev", "stsb.test"), 27_237, False, UNSCORED
    ),
    "sickr": Pool(("sickr.train", "sickr.dev", "sickr.test"), 9_840, False),
    "sts_sickr": Pool(("sts", "sickr"), 37_081, note=f"{UNSCORED}; with them, 37,077 were found"),
    "qqp": Pool(("qqp.train", "qqp.dev", "qqp.test"), 21_000, note="another sample, and exact repeats were removed"),
    "qnli": Pool(("qnli.train", "qnli.dev", "qnli.test"), 15_463, note="exact repeats were removed"),
    "mrpc": Pool(("mrpc.train", "mrpc.dev", "mrpc.test"), 5_801, note="exact repeats were removed"),
    "snli": Pool(("snli.train", "snli.dev", "snli.test")),
}

WIKI = "wiki1m"  # the SimCSE authors' sentences of Wikipedia, for step 1
WIKI_HUB = ("princeton-nlp/datasets-for-simcse", "wiki1m_for_simcse.txt", 1_000_000)

# The options that name models, and those that name data, which may be on the Hub.
MODEL_OPTIONS = ("model_name_or_path", "encoders", "teacher", "teachers", "spread_by")
DATA_OPTIONS = ("sentences", "sentences_b", "pairs", "extra_pairs", "scores", "tasks", "dev")


def read_pool(arguments: ScoringArguments | LabelArguments, drop_duplicates: bool) -> datasets.Dataset:
    """Read the pairs to label: named pools and files, or a sample of them, and extra pairs.

    Args:
        arguments: `pairs` (names of `POOLS`, files, NAME=FILE, Hub ids), what `PoolArguments` adds, and the seed.
        drop_duplicates: keep the first of exactly equal pairs; a named pool has no others.
    """
    data_dir, seed, keep = arguments.data_dir, arguments.seed, getattr(arguments, "keep", None)
    table = _together(arguments.pairs, data_dir, arguments, keep)
    table = _sampled(table, arguments.num_training_pairs, seed, "pairs")
    if arguments.extra_pairs:
        extra = _together(arguments.extra_pairs, data_dir, arguments, keep)
        extra = _sampled(extra, arguments.num_extra_pairs, seed, "extra pairs")
        table = datasets.concatenate_datasets([table, extra])
    return without_repeats(table, list(PAIRS)) if drop_duplicates else table


def read_sentence_pool(sources: list[str], data_dir: str | None, reading: Reading = AS_IT_IS) -> datasets.Dataset:
    """Read the distinct sentences of named pools, `wiki1m`, files and Hub ids, like `tables.read_sentences`."""
    return join_sentences(sentence_pool_parts(sources, data_dir, reading), sources)


def sentence_pool_parts(
    sources: list[str], data_dir: str | None, reading: Reading = AS_IT_IS
) -> list[datasets.Dataset]:
    """Read the same with their repeats, a table for each source and side."""
    parts = []
    for source in sources:
        if source == WIKI:
            parts.append(_wikipedia(data_dir))
        elif source in POOLS:
            parts += sides(_named_pool(source, data_dir))
        else:
            parts += sentence_parts(_file_of(source, (*POOLS, WIKI)), reading)
    return parts


def is_ordered(pairs: list[str], extra_pairs: list[str] | None = None) -> bool:
    """Return whether a pair's sentences play different roles in one of these pools: a question and its passage."""
    parts = [part for name in (*pairs, *(extra_pairs or [])) if name in POOLS for part in POOLS[name].parts]
    return any(TASKS[part.partition(".")[0]].ordered for part in parts if part not in POOLS)


def swap_of(swap: bool | None, ordered: bool) -> bool:
    """Return whether a cross-encoder trains on both orders of a pair: by default unless the order matters.

    Raises:
        InputError: `swap` is true and the order matters.
    """
    if swap and ordered:
        raise InputError("--swap True: the order of these pairs matters (QNLI); leave it out")
    return not ordered if swap is None else swap


def check_both_orders(both_orders: bool, ordered: bool) -> None:
    """Raise `InputError` if pairs whose order matters are to be scored in both."""
    if both_orders and ordered:
        raise InputError("--both_orders: the order of these pairs matters (QNLI); leave it out")


def input_files(arguments: Any) -> list[Input]:
    """Return every path and every name on the Hub in a stage's options, so that a run notices when one changes.

    Named pools, tasks and sentences stand for their files in the data folder, or for their sets on the Hub.

    Args:
        arguments: a stage's dataclass of options; those that do not decide the result are passed over.
    """
    found: list[Input] = []
    for option, value in result_options(arguments).items():
        words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
        for word in (split_name(word)[1] for word in words):
            if Path(word).exists():
                found.append(Path(word))
            elif option in MODEL_OPTIONS:
                found.append(HubSource(word, "model"))
            elif option in DATA_OPTIONS and is_hub_id(word):
                name, _, revision = word.partition("@")
                found.append(HubSource(name.partition(":")[0], "dataset", revision or None))
        if option in DATA_OPTIONS:
            data_dir = getattr(arguments, "data_dir", None)
            found += _local_files(words, data_dir) if data_dir else _hub_sets(words)
    return list(dict.fromkeys(found))


def _hub_sets(names: list[str]) -> list[HubSource]:
    """Return the sets on the Hub that named pools, tasks and sentences stand for."""
    found = []
    for name in [*names, *expand_groups(names)]:
        if name in POOLS:
            found += _hub_sets(list(POOLS[name].parts))
        elif name.partition(".")[0] in TASKS:
            source = TASKS[name.partition(".")[0]]
            found.append(HubSource(source.hub_id, "dataset", source.revision))
        elif name == WIKI:
            found.append(HubSource(WIKI_HUB[0], "dataset"))
    return found


def _local_files(names: list[str], data_dir: str) -> list[Path]:
    """Return the files in the data folder that named pools, tasks and sentences stand for."""
    found = []
    for name in dict.fromkeys([*names, *expand_groups(names)]):
        if name.partition(".")[0] not in (*TASKS, *POOLS, WIKI):
            continue
        whole = local_file(f"pool.{name}", data_dir)
        own = [whole, local_file(name, data_dir), local_file(f"{name}.test", data_dir), _wiki_file(name, data_dir)]
        found += [path for path in own if path]
        found += _local_files(list(POOLS[name].parts), data_dir) if name in POOLS and not whole else []
    return list(dict.fromkeys(found))


def _together(specs: list[str], data_dir: str | None, reading: Reading, keep: list[str] | None) -> datasets.Dataset:
    """Read the pairs of pools and files into one table, with the columns `keep` of the files."""
    if keep and (pools := POOLS.keys() & specs):
        raise InputError(f"--keep {keep[0]}: the pool {min(pools)} has no such column")
    tables = [
        _named_pool(spec, data_dir)
        if spec in POOLS
        else read_pairs([_file_of(spec, tuple(POOLS))], reading=reading, keep=keep)
        for spec in specs
    ]
    return datasets.concatenate_datasets(tables)


def _named_pool(name: str, data_dir: str | None) -> datasets.Dataset:
    """Read a pool's distinct pairs, from the file pool.NAME.jsonl(.gz) if there is one, else from its parts."""
    pool = POOLS[name]
    path = local_file(f"pool.{name}", data_dir)
    if path:
        table = read_pairs([str(path)])
    else:
        parts = [
            _named_pool(part, data_dir) if part in POOLS else read_split(part, data_dir, None) for part in pool.parts
        ]
        table = datasets.concatenate_datasets(parts)
    table = without_repeats(table)
    found = f"pool {name}: {len(table)} pairs"
    if pool.pairs == len(table):
        found += ", as many as in the paper" if pool.printed else ", as expected"
    elif pool.pairs:
        found += f", {'the paper has ' if pool.printed else ''}{pool.pairs}{'' if pool.printed else ' expected'}"
        found += f" ({pool.note})" if pool.note else ""
    log_found(found)
    return table


def _file_of(spec: str, names: tuple[str, ...]) -> str:
    """Return the file of FILE or NAME=FILE; raise `InputError` if it is no Hub id either. `names`: known pools."""
    path = split_name(spec)[1]
    if not Path(path).exists() and not is_hub_id(path) and "." not in Path(path).name:
        raise InputError(f"{spec}: neither a file nor a pool; pools: {', '.join(names)}")
    return path


def _sampled(table: datasets.Dataset, size: int | None, seed: int, what: str) -> datasets.Dataset:
    if size is not None and size > len(table):
        log(f"{size} {what} were asked for, there are {len(table)}")
    return sample(table, size, seed)


def _wiki_file(name: str, data_dir: str | None) -> Path | None:
    return local_file(WIKI, data_dir, (".txt", ".txt.gz")) if name == WIKI else None


def _wikipedia(data_dir: str | None) -> datasets.Dataset:
    """Read wiki1m.txt(.gz) of the data folder, or the SimCSE authors' file on the Hub without its blank lines."""
    hub_id, file, expected = WIKI_HUB
    path = _wiki_file(WIKI, data_dir)
    if data_dir and not path:
        raise InputError(f"--data_dir {data_dir}: no {WIKI}.txt(.gz)")
    if path:
        (table,) = sentence_parts(str(path))
    else:
        table = load_split(hub_id, "train", data_files=file).rename_column("text", "sentence")
        table = table.filter(lambda row: bool(row["sentence"].strip()))
        table = check_hub_table(table, f"{hub_id}/{file}", SENTENCES)
    log(f"{WIKI}: {len(table)} sentences, {expected} expected")
    return table
