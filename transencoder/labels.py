"""Pseudo-labels: the pairs that a student learns from, their scores, and the files that the scores lie in."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import Accelerator

from transencoder.config.arguments import LabelArguments
from transencoder.data.pools import input_files, is_ordered, read_pool
from transencoder.data.tables import (
    PAIRS,
    blocks,
    numbers,
    read_pairs,
)
from transencoder.data.tasks import Task
from transencoder.errors import InputError, storage_error
from transencoder.model_files import check_encoders
from transencoder.runtime.files import write_file
from transencoder.runtime.records import HUB_COMMITS, code_version, difference, identity
from transencoder.runtime.shards import Parts, remove_parts
from transencoder.scoring import Teachers, score_with

# Pairs that a file of scores shares with a labelled set, and correlation on them, from which it holds its labels.
SHARED_PAIRS, SAME_SCORES = 10, 0.999
FACTS = b"transencoder"  # key of the Parquet metadata that says where scores come from


def write_scores(path: Path, pairs: datasets.Dataset, scores: np.ndarray, facts: dict[str, Any]) -> None:
    """Write sentence1, sentence2 and score (float32) as Parquet, atomically; `facts` go into the file's metadata."""

    def tables() -> Iterator[pa.Table]:
        for start, block in blocks(pairs):
            columns = [block[name] for name in PAIRS]
            yield pa.table([*columns, scores[start : start + len(block)]], names=[*PAIRS, "score"])

    write_tables(path, tables(), facts)


def write_tables(path: Path, tables: Iterator[pa.Table], facts: dict[str, Any]) -> int:
    """Write tables of one schema as the row groups of a Parquet file, atomically; returns how many rows there are."""
    first = next(tables)
    schema, rows = first.schema.with_metadata({FACTS: json.dumps(facts)}), len(first)

    def write(stream: BinaryIO) -> None:
        nonlocal rows
        with pq.ParquetWriter(stream, schema) as writer:
            writer.write_table(first.replace_schema_metadata(schema.metadata))
            for table in tables:
                writer.write_table(table.replace_schema_metadata(schema.metadata))
                rows += len(table)

    write_file(path, write)
    return rows


def read_facts(path: Path) -> dict[str, Any] | None:
    """What `write_scores` was told about the scores; None for another tool's file."""
    metadata = pq.read_schema(path).metadata or {}
    try:
        facts = json.loads(metadata.get(FACTS, b"null"))
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def check_output(path: Path) -> None:
    """Raise `InputError` if `path` cannot become a Parquet file, before there is anything to lose."""
    if path.suffix != ".parquet" or path.is_dir():
        raise InputError(f"--output {path}: must be the name of a .parquet file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        where = f"--output {path}"
        raise storage_error(error, where) or InputError(f"{where}: cannot be written: {error.strerror}") from error


def scores_are_there(path: Path, facts: dict[str, Any], what: str = "scores") -> bool:
    """Whether `path` already holds the scores, or what else there is, that `facts` describe.

    Raises:
        InputError: it holds something else, or nothing can be written there.
    """
    check_output(path)
    if not path.exists():
        return False
    try:
        found = read_facts(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"--output {path}: exists and is not a Parquet file; add --overwrite") from error
    if found is None:
        raise InputError(f"--output {path}: exists and was not written by this tool; add --overwrite")
    for name in ("world_size", "hub_datasets", "code"):  # for the record
        found.pop(name, None)
    changed = difference(found, json.loads(json.dumps(facts)))
    if changed:
        raise InputError(f"--output {path}: holds other {what} ({changed}); choose another name or add --overwrite")
    remove_parts(path)  # a kill may have come in between
    return True


def read_label_pairs(arguments: LabelArguments, dev: Task | None = None) -> datasets.Dataset:
    """A student's training pairs, checked: with the column `score` from --scores, or without it from --pairs.

    Raises:
        InputError: also for a score outside [-1, 1], neither a cosine nor a probability, and for the labels of `dev`.
    """
    if not arguments.scores:
        check_encoders(arguments.teachers, None)
        return read_pool(arguments, drop_duplicates=True)
    pairs = read_pairs([arguments.scores], "score", arguments.columns)
    scores = numbers(pairs, "score")
    (outside,) = np.nonzero(np.abs(scores) > 1 + 1e-5)
    if len(outside):
        row = outside[0]
        raise InputError(f"{arguments.scores}: row {row + 1}: score {scores[row]} is not in [-1, 1]")
    check_no_labels(arguments.scores, pairs, dev)
    return pairs


def order_matters(arguments: LabelArguments) -> bool:
    """Whether a student's training pairs must not be turned round, which files of scores say of their pairs."""
    if arguments.pairs:
        return is_ordered(arguments.pairs, arguments.extra_pairs)
    path = Path(arguments.scores)
    return path.suffix == ".parquet" and path.is_file() and bool((read_facts(path) or {}).get("ordered"))


def pseudo_labels(arguments: LabelArguments, pairs: datasets.Dataset, accelerator: Accelerator) -> datasets.Dataset:
    """`pairs` with the column `score`, which --teachers give them first where there is none.

    Teachers' scores are kept as teacher-scores.parquet in the output folder; the teachers are gone at the return.
    """
    if arguments.scores:
        return pairs
    path, facts = Path(arguments.output_dir) / "teacher-scores.parquet", identity(arguments, input_files(arguments))
    if arguments.overwrite or not scores_are_there(path, facts):
        teachers = Teachers(arguments.teachers, arguments.teacher_weights)
        score_to_file(teachers, pairs, path, accelerator, arguments.eval_batch_tokens, arguments.shard_rows, facts)
    return read_pairs([str(path)], "score")


def score_to_file(
    teachers: Teachers,
    pairs: datasets.Dataset,
    path: Path,
    accelerator: Accelerator,
    batch_tokens: int | None,
    shard_rows: int,
    facts: dict[str, Any],
) -> np.ndarray:
    """Score `pairs`, write `path` from the first process, and return the scores.

    Args:
        shard_rows: inputs after which what is done is kept on disk, for a run that is interrupted.
        facts: what the scores depend on; they go into the file's metadata.
    """
    parts = Parts(path, facts, shard_rows, accelerator)
    (scores,) = score_with(teachers, [pairs], accelerator, batch_tokens, parts)
    if accelerator.is_main_process:
        record = {"world_size": accelerator.num_processes, "code": code_version()}
        record |= {"hub_datasets": HUB_COMMITS} if HUB_COMMITS else {}
        write_scores(path, pairs, scores, {**facts, **record})
    parts.remove()
    accelerator.wait_for_everyone()
    return scores


def check_no_labels(scores_file: str, pairs: datasets.Dataset, dev: Task | None) -> None:
    """Refuse training scores that are the labels of the set on which the checkpoint is chosen.

    A pool may hold the pairs of a labelled set, as the paper's does; what it may not hold is their labels. They are
    recognised by their values: on at least `SHARED_PAIRS` common pairs, in either order, the scores are the labels on
    another scale. No teacher's scores are.

    Args:
        pairs: columns sentence1, sentence2 and score.
    """
    if dev is None:
        return
    labels = dict(zip(zip(*(dev.pairs[name] for name in PAIRS), strict=True), dev.pairs[dev.gold], strict=True))
    known = pa.array({sentence for pair in labels for sentence in pair}, pa.large_string())
    found = [pc.is_in(pairs.data.column(name).cast(pa.large_string()), known) for name in PAIRS]
    (rows,) = np.nonzero(np.asarray(pc.and_(*found)))
    common = pairs.select(rows)
    shared = []
    for first, second, score in zip(*(common[name] for name in (*PAIRS, "score")), strict=True):
        label = labels.get((first, second), labels.get((second, first)))
        if label is not None:
            shared.append((score, label))
    if len(shared) < SHARED_PAIRS or np.ptp(shared, axis=0).min() == 0:
        return
    if abs(np.corrcoef(np.transpose(shared))[0, 1]) > SAME_SCORES:
        raise InputError(
            f"--scores {scores_file}: on the {len(shared)} pairs that it shares with --dev ({dev.title}) its scores "
            f"are the {dev.gold}s themselves; train on an encoder's scores (score_pairs.py), which reads no label"
        )
