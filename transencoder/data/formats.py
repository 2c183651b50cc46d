"""The rows of a file in any of the formats: read block by block, as they are; and written."""

import csv
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from transencoder.errors import InputError
from transencoder.runtime.files import replacing

PAIR_SEPARATOR = "||"
FORMATS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")
NUMBERS = ("score", "label", "disagreement")  # our names of columns that hold numbers
KEPT = "kept "  # begins our names of columns that are only carried along, as text
ROW = "row"  # our name of the column with the rows' numbers, which no file has
BLOCK_ROWS = 8192
LONGEST_CELL = 1 << 26  # characters; beyond it, a quote was not closed
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n?')  # as Excel writes it above the header
SEPARATORS = ",;\t|"  # of a .csv; where a header has as many columns by two of them, the first one
UTF_16 = ("\udcff\udcfe", "\udcfe\udcff")  # its byte order marks, read as UTF-8
SAVE_AS_UTF_8 = "not UTF-8 text: save the file as UTF-8"
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet runs a cell that begins with one of these

Row = list[Any] | str  # the values, or what is wrong with the row


class Block(NamedTuple):
    """Rows of a file, as they were found.

    Args:
        batch: one column for each that is wanted, under our names.
        numbers: of the rows in the file, as a person counts them: from 1, without the header.
        problems: what is wrong with some of the rows, by their places in the batch.
    """

    batch: pa.RecordBatch
    numbers: Sequence[int]
    problems: dict[int, str]


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
    try:
        if format_of(source) == ".txt":
            return []
        if format_of(source) == ".parquet":
            return pq.read_schema(source).names
        names = _first_keys(source) if format_of(source) == ".jsonl" else _table(source)[0]
        for name in names:
            name.encode()
        return names
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: {SAVE_AS_UTF_8}") from error
    except (ValueError, RecursionError, pa.ArrowException, OSError, EOFError, csv.Error, zlib.error) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def theirs_of(name: str, renaming: dict[str, str], found: list[str]) -> str:
    """Return what a file with the columns `found` calls our column. Files without a renamed column keep our name."""
    if name.startswith(KEPT):
        return name.removeprefix(KEPT)
    return renaming[name] if name in renaming and renaming[name] in found else name


def require_columns(source: str, theirs: list[str], found: list[str]) -> None:
    """Raise `InputError` unless each of `theirs` is once among the columns `found`."""
    missing = [name for name in theirs if name not in found]
    if missing:
        shown = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        advice = "rename with --columns ours=theirs; in a recipe, columns: [ours=theirs] in the section common"
        if len(found) == 1 and format_of(source) == ".tsv" and any(mark in found[0] for mark in SEPARATORS):
            advice = "a .tsv has tabs between its columns; call a file with commas or semicolons .csv"
        raise InputError(f"{source}: no column {missing[0]!r}; it has: {shown} ({advice})")
    twice = [name for name in theirs if found.count(name) > 1]
    if twice:
        raise InputError(f"{source}: two columns are called {twice[0]!r}")


def read_blocks(source: str, wanted: tuple[str, ...], renaming: dict[str, str]) -> Iterator[Block]:
    """Yield the rows of a file, the `wanted` columns under our names; `checked` looks at what they hold."""
    found = column_names(source)
    theirs = [theirs_of(name, renaming, found) for name in wanted]
    if format_of(source) != ".txt":
        require_columns(source, theirs, found)
    try:
        if format_of(source) == ".parquet":
            yield from _read_parquet(source, theirs, wanted)
        else:
            readers = {".txt": _text_rows, ".jsonl": _json_rows}
            yield from _in_blocks(readers.get(format_of(source), _table_rows)(source, theirs, wanted), wanted)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def _lines(source: str) -> Iterator[str]:
    """Yield lines with their ends, of any system. Bytes that are not UTF-8 become surrogates, to be found later."""
    opened = gzip.open if source.endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        first = next(stream, "")
        if first.startswith(UTF_16) or "\0" in first[:2]:
            raise InputError(f"{source}: UTF-16, which is {SAVE_AS_UTF_8}")
        yield first
        yield from stream


def _text_rows(source: str, theirs: list[str], wanted: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Yield a sentence, or `sentence1||sentence2`, a line. Blank lines at the end are none."""
    blank: list[str] = []
    for number, line in enumerate(_lines(source), start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            blank.append(line)
            continue
        for place, text in enumerate([*blank, line], start=number - len(blank)):
            fields = [text] if len(wanted) == 1 else text.split(PAIR_SEPARATOR)
            if len(fields) != len(wanted):
                yield place, f"expected {PAIR_SEPARATOR.join(wanted)}, found {len(fields)} field(s)"
            else:
                yield place, fields
        blank.clear()


def _table(source: str) -> tuple[list[str], Iterator[list[str]]]:
    """Return the header of a .csv, with quotes as usual, or of a .tsv, without quoting; and its rows.

    The columns of a .csv are separated by what makes the most columns of its header, as Excel writes semicolons where
    a comma is the decimal point.
    Python's own reader is strict about quotes; pyarrow's would take several rows for one where a quote is not closed.
    """
    lines = _lines(source)
    first, tabs = next(lines, ""), format_of(source) == ".tsv"
    named = SEPARATOR_LINE.fullmatch(first)
    csv.field_size_limit(LONGEST_CELL)
    separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    rows = csv.reader(
        lines if named else itertools.chain([first], lines),
        delimiter=named[1] if named else "\t" if tabs else separator,
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    rows = filter(None, rows)  # blank lines are no rows
    return next(rows, []), rows


def _table_rows(source: str, theirs: list[str], wanted: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    header, rows = _table(source)
    places = [header.index(name) for name in theirs]
    for number in itertools.count(1):
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # Where the next row begins, nobody can say.
            raise InputError(
                f"{source}: row {number}: a quote that is not closed, or that should be doubled ({error})"
            ) from error
        if len(fields) != len(header):
            yield number, f"expected {len(header)} columns, found {len(fields)}"
        else:
            yield number, [fields[place] for place in places]


def _first_keys(source: str) -> list[str]:
    """Return the keys of the first object; raise ValueError where there is none."""
    first = next(filter(str.strip, _lines(source)), "")
    try:
        row = json.loads(first)
    except ValueError as error:
        if first.strip() in ("{", "["):
            raise ValueError("JSON over several lines; make it one object a line (jq -c '.[]' or jq -c .)") from error
        raise
    if isinstance(row, list):
        raise ValueError("a JSON array; make it one object a line (jq -c '.[]')")
    if not isinstance(row, dict):
        raise ValueError("its first line is not a JSON object")
    return list(row)


def _json_rows(source: str, theirs: list[str], wanted: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Yield one object a line; blank lines are passed over, and fields that nobody asked for."""
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, "not a JSON object"
            continue
        try:
            yield number, [_json_value(name, row.get(key)) for name, key in zip(wanted, theirs, strict=True)]
        except ValueError as error:
            yield number, str(error)


def _json_value(name: str, value: Any) -> Any:
    """Return text as it is and numbers as float; raise ValueError for anything else. What is kept becomes text."""
    if name.startswith(KEPT) and not isinstance(value, str):
        return "" if value is None else json.dumps(value, ensure_ascii=False)
    if value is None or (name not in NUMBERS and isinstance(value, str)):
        return value
    if name not in NUMBERS:
        raise ValueError(f"{name} is not a string")
    if not isinstance(value, int | float) or (isinstance(value, bool) and name != "label"):
        raise ValueError(f"{name} {value!r:.60} is not a number")
    return float(value) if abs(value) <= sys.float_info.max else float("inf")


def _in_blocks(rows: Iterator[tuple[int, Row]], names: tuple[str, ...]) -> Iterator[Block]:
    while chunk := list(itertools.islice(rows, BLOCK_ROWS)):
        numbers, found = zip(*chunk, strict=True)
        problems = {place: row for place, row in enumerate(found) if isinstance(row, str)}
        if problems:
            found = [[None] * len(names) if isinstance(row, str) else row for row in found]
        columns = zip(names, zip(*found, strict=True), strict=True)
        arrays = [_array(name, list(values), problems) for name, values in columns]
        yield Block(pa.record_batch(arrays, names=list(names)), numbers, problems)


def _array(name: str, values: list[Any], problems: dict[int, str]) -> pa.Array:
    """Return strings, or numbers, as an array; those that are not UTF-8 are nulls, and among the problems."""
    type_ = None if name in NUMBERS else pa.large_string()
    try:
        return pa.array(values, type_)
    except UnicodeEncodeError:
        for place, value in enumerate(values):
            if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                problems.setdefault(place, f"{name} is {SAVE_AS_UTF_8}")
                values[place] = None
        return pa.array(values, type_)


def _read_parquet(source: str, theirs: list[str], wanted: tuple[str, ...]) -> Iterator[Block]:
    with pq.ParquetFile(source) as file:
        yield from as_blocks(
            pa.record_batch(b.select(theirs).columns, names=list(wanted)) for b in file.iter_batches(columns=theirs)
        )


def as_blocks(batches: Iterable[pa.RecordBatch]) -> Iterator[Block]:
    """Number the rows of batches."""
    start = 1
    for batch in batches:
        yield Block(batch, range(start, start + len(batch)), {})
        start += len(batch)


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
            writer.writerows([_inert(cell) for cell in row] for row in itertools.chain([names], rows))


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
