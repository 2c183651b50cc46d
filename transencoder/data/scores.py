"""Parquet files of scores and of mined pairs: written whole, with metadata that says where they come from."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transencoder.data.tables import PAIRS, blocks
from transencoder.errors import InputError, storage_error
from transencoder.runtime.files import replacing
from transencoder.runtime.records import difference
from transencoder.runtime.shards import remove_shards

KEY = b"transencoder"  # of the metadata in a Parquet file


def write_scores(
    path: Path,
    pairs: datasets.Dataset,
    scores: np.ndarray,
    metadata: dict[str, Any],
    disagreement: np.ndarray | None = None,
) -> None:
    """Write sentence1, sentence2, score (float32) and what `pairs` has besides as Parquet, atomically.

    Args:
        metadata: goes into the file.
        disagreement: of several teachers, float32 [pairs]; one more column.
    """
    own = {"score": scores} | ({} if disagreement is None else {"disagreement": disagreement})
    more = [name for name in pairs.column_names if name not in (*PAIRS, *own)]

    def tables() -> Iterator[pa.Table]:
        for start, block in blocks(pairs):
            some = {name: values[start : start + len(block)] for name, values in own.items()}
            yield pa.table({**{n: block[n] for n in PAIRS}, **some, **{n: block[n] for n in more}})

    write_tables(path, tables(), metadata)


def write_tables(path: Path, tables: Iterator[pa.Table], metadata: dict[str, Any]) -> int:
    """Write tables of one schema as the row groups of a Parquet file, atomically; return how many rows there are."""
    first = next(tables)
    schema, rows = first.schema.with_metadata({KEY: json.dumps(metadata)}), len(first)

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        writer.write_table(first.replace_schema_metadata(schema.metadata))
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
            rows += len(table)
    return rows


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return what `write_tables` was told about a file; None for another tool's file."""
    found = pq.read_schema(path).metadata or {}
    try:
        metadata = json.loads(found.get(KEY, b"null"))
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


def check_output(path: Path) -> None:
    """Raise `InputError` if `path` cannot become a Parquet file, before there is anything to lose."""
    _check_output(path, (".parquet",))


def check_rows_output(path: Path, begins: dict[str, str], inputs: list[str] | None) -> None:
    """Raise `InputError` unless a tool may write its results to `path`: a new file, or one of its own.

    Args:
        begins: what the tool's own files begin with, by the suffixes that they may have.
        inputs: must not be overwritten.
    """
    _check_output(path, tuple(begins))
    if not path.exists():
        return
    start = begins[path.suffix].encode()
    with path.open("rb") as file:
        ours = file.read(len(start)) in (b"", start)
    if not ours or any(path.samefile(source) for source in inputs or [] if Path(source).exists()):
        raise InputError(f"--output {path}: exists and was not written by this tool; choose another name")


def _check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes or path.is_dir():
        raise InputError(f"--output {path}: must be the name of a {' or '.join(suffixes)} file")
    check_place(path, "--output")


def check_place(path: Path, option: str) -> None:
    """Raise `InputError` if no file can be written at `path`, before there is anything to lose; make its folder."""
    if path.is_dir():
        raise InputError(f"{option} {path}: a folder, where a file belongs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        where = f"{option} {path}"
        raise storage_error(error, where) or InputError(f"{where}: cannot be written: {error.strerror}") from error


def is_made(path: Path, metadata: dict[str, Any], what: str = "scores", overwrite: bool = False) -> bool:
    """Return whether `path` already holds what `metadata` describes.

    Args:
        what: how a message names what it holds.
        overwrite: replace what this tool wrote there; never another one's file.

    Raises:
        InputError: it holds something else, or nothing can be written there.
    """
    check_output(path)
    if not path.exists():
        return False
    try:
        found = read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"--output {path}: exists and is not a Parquet file; delete it, or choose another name"
        ) from error
    if found is None:
        raise InputError(f"--output {path}: exists and was not written by this tool; choose another name")
    if overwrite:
        return False
    for name in ("world_size", "hub_datasets", "code"):  # for the record
        found.pop(name, None)
    changed = difference(found, json.loads(json.dumps(metadata)))
    if changed:
        raise InputError(f"--output {path}: holds other {what} ({changed}); choose another name or add --overwrite")
    remove_shards(path)  # a kill may have come in between
    return True
