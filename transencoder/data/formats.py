"""The rows of a file in any of the formats, read block by block, with what is said of a row that is wrong; written."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from transencoder.errors import InputError
from transencoder.runtime.files import replacing

PAIR_SEPARATOR = "||"
FORMATS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")
BLOCK_BYTES = 16 << 20
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins with one of these


def format_of(source: str) -> str:
    """Return .txt, .tsv, .csv, .jsonl or .parquet; "" for anything else, a compressed Parquet file too."""
    suffix = Path(source.removesuffix(".gz")).suffix
    known = FORMATS[:-1] if source.endswith(".gz") else FORMATS
    return suffix if suffix in known else ""


def check_file(source: str) -> None:
    """Refuse what is not a readable file of a known format."""
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source}: no such file")
    if not path.is_file():
        raise InputError(f"{source}: not a file")
    if not os.access(path, os.R_OK):  # what is in the cache is not opened here, but by a stage
        raise InputError(f"{source}: cannot be read: Permission denied; give this user the right to it")
    if not format_of(source):
        raise InputError(f"{source}: unknown format; known: {', '.join(FORMATS)}, and all but the last also with .gz")
    if path.stat().st_size == 0:
        raise InputError(f"{source}: the file is empty")


def column_names(source: str) -> list[str]:
    """Return a file's columns, from its first row; none for .txt. Raises `InputError` if it cannot be read."""
    check_file(source)
    format_ = format_of(source)
    try:
        if format_ == ".txt":
            return []
        if format_ == ".parquet":
            return pq.read_schema(source).names
        with _open(source) as stream:
            first = next(_lines(stream), "")
        if format_ == ".jsonl":
            row = json.loads(first)
            return list(row) if isinstance(row, dict) else []
        return first.split("\t") if format_ == ".tsv" else next(csv.reader([first]), [])
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text") from error
    except (ValueError, RecursionError, pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def theirs_of(name: str, renaming: dict[str, str], found: list[str]) -> str:
    """Return what a file with the columns `found` calls our column. Files without a renamed column keep our name."""
    return renaming[name] if name in renaming and renaming[name] in found else name


def require_columns(source: str, theirs: list[str], found: list[str]) -> None:
    """Raise `InputError` unless each of `theirs` is once among the columns `found`."""
    missing = [name for name in theirs if name not in found]
    if missing:
        shown = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        raise InputError(
            f"{source}: no column {missing[0]!r}; it has: {shown} "
            "(rename with --columns ours=theirs; in a recipe, columns: [ours=theirs] in the section common)"
        )
    twice = [name for name in theirs if found.count(name) > 1]
    if twice:
        raise InputError(f"{source}: two columns are called {twice[0]!r}")


def read_batches(source: str, wanted: tuple[str, ...], renaming: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield blocks of a file with the `wanted` columns, under our names, unchecked."""
    theirs = [theirs_of(name, renaming, column_names(source)) for name in wanted]
    readers = {".txt": _read_text, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    reader = readers.get(format_of(source), _read_delimited)
    if reader is not _read_text:
        require_columns(source, theirs, column_names(source))
    try:
        for batch in reader(source, theirs):
            yield pa.record_batch(batch.columns, names=list(wanted))
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def _open(source: str) -> pa.NativeFile:
    return pa.input_stream(source, compression="gzip" if source.endswith(".gz") else None)


def _read_text(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield a sentence, or `sentence1||sentence2`, a line. A blank line is an empty sentence: the check refuses it."""
    with _open(source) as stream:
        lines: list[list[str]] = []
        for number, line in enumerate(_lines(stream), start=1):
            fields = [line] if len(theirs) == 1 else line.split(PAIR_SEPARATOR)
            if len(fields) != len(theirs):
                raise InputError(
                    f"{source}: row {number}: expected {PAIR_SEPARATOR.join(theirs)}, found {len(fields)} field(s)"
                )
            lines.append(fields)
            if len(lines) == 100_000:
                yield pa.record_batch([list(column) for column in zip(*lines, strict=True)], names=theirs)
                lines = []
        if lines:
            yield pa.record_batch([list(column) for column in zip(*lines, strict=True)], names=theirs)


def _lines(stream: pa.NativeFile) -> Iterator[str]:
    """Decoded lines without their ends; a byte order mark at the start is dropped."""
    rest, first = b"", True
    while block := stream.read(BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8-sig" if first else "utf-8")
            first = False
    if rest:
        yield rest.removesuffix(b"\r").decode("utf-8-sig" if first else "utf-8")


def _read_delimited(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    """.csv with quotes as usual; .tsv without quoting, as NLP data sets write it. The first row names the columns."""
    tabs = format_of(source) == ".tsv"
    options = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in theirs}, include_columns=theirs, strings_can_be_null=False
    )
    parsing = pyarrow.csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    # One thread: only then do pyarrow's messages name the row.
    reading = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    with _open(source) as stream:
        yield from pyarrow.csv.open_csv(stream, read_options=reading, parse_options=parsing, convert_options=options)


def _read_jsonl(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield one object a line; fields that nobody asked for are ignored."""
    numeric = {"score", "label"}
    schema = pa.schema([(name, pa.float64() if name in numeric else pa.string()) for name in theirs])
    try:
        parsing = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        with _open(source) as stream:
            reading = pyarrow.json.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
            yield from pyarrow.json.open_json(stream, read_options=reading, parse_options=parsing)
    except (pa.ArrowInvalid, ValueError, TypeError) as error:
        raise InputError(_first_bad_json_row(source, schema) or f"{source}: cannot be read: {error}") from error


def _first_bad_json_row(source: str, schema: pa.Schema) -> str | None:
    """Look line by line for what pyarrow refused: it counts from its block's start and skips blank lines."""
    with _open(source) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                return f"{source}: line {number}: not JSON: {error}"
            if not isinstance(row, dict):
                return f"{source}: line {number}: not a JSON object"
            for name, type_ in zip(schema.names, schema.types, strict=True):
                value = row.get(name)
                if type_ == pa.string() and value is not None and not isinstance(value, str):
                    return f"{source}: line {number}: {name} is not a string"
                if type_ == pa.float64() and (isinstance(value, bool) or not isinstance(value, int | float)):
                    return f"{source}: line {number}: {name} {value!r} is not a number"
                if type_ == pa.float64() and not abs(value) <= sys.float_info.max:
                    return f"{source}: line {number}: {name} is not a finite number"
    return None


def _read_parquet(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(columns=theirs):
            yield batch.select(theirs)


def checked(batch: pa.RecordBatch, source: str, rows_before: int, schema: pa.Schema) -> pa.RecordBatch:
    """`batch` in `schema`'s types, or an `InputError` that names the first bad row (from 1, header left out)."""

    def refuse(bad: pa.Array, what: str) -> None:
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise InputError(f"{source}: row {rows_before + row + 1}: {what}")

    arrays = []
    for name, type_ in zip(schema.names, schema.types, strict=True):
        column = batch.column(name)
        refuse(pc.is_null(column), f"{name} is missing")
        if type_ == pa.float64():
            column = _as_numbers(column, name, source, rows_before)
            refuse(pc.invert(pc.is_finite(column)), f"{name} is not a finite number")
            if name == "label":
                refuse(pc.invert(pc.is_in(column, pa.array([0.0, 1.0]))), "label is neither 0 nor 1")
        else:
            column = _as_text(column, name, source)
            refuse(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0), f"{name} is empty")
            refuse(pc.match_substring(column, "\0"), f"{name} holds a NUL character (is the file UTF-16?)")
        arrays.append(column)
    return pa.record_batch(arrays, schema=schema)


def _as_text(column: pa.Array, name: str, source: str) -> pa.Array:
    """Cast to large_string, and make sure that it is UTF-8: pyarrow's JSON reader does not look."""
    try:
        text = column.cast(pa.large_string())
        text.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{source}: {name} is not UTF-8 text") from error
    return text


def _as_numbers(column: pa.Array, name: str, source: str, rows_before: int) -> pa.Array:
    """Cast to float64; on failure find the row and say what stands there."""
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)
        return column.cast(pa.float64(), safe=not pa.types.is_integer(column.type))  # large ones are rounded
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        for row, value in enumerate(column, start=rows_before + 1):
            try:
                value.cast(pa.float64())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise InputError(f"{source}: row {row}: {name} {value.as_py()!r} is not a number") from None
        raise InputError(f"{source}: {name} is of type {column.type}, not a number") from error


def write_rows(path: Path, names: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as .csv or .jsonl, by the path's ending, atomically.

    In a .csv all text is quoted. A cell that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            for row in rows:
                stream.write(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n")
        else:
            writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_inert(cell) for cell in row] for row in rows)


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
