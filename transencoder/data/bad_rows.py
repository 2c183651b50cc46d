"""Rows that are wrong: found, and refused or left out."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from transencoder.data.formats import KEPT, ROW, Block, format_of
from transencoder.errors import InputError

# As pandas writes text with quotes into a .tsv. Others write quotes there as they are, which is what is read.
QUOTED = r'^"([^"]|"")*""([^"]|"")*"$'
GRADED = "graded values are scores: --columns score=label"
SKIP = "--skip_bad_rows leaves such rows out"


def checked(block: Block, source: str, schema: pa.Schema) -> Block:
    """Return the block in `schema`'s types, and all problems of its rows.

    Raises:
        InputError: a column of another type altogether.
    """
    problems = dict(block.problems)

    def note(bad: pa.Array, what: str) -> None:
        for place in np.flatnonzero(bad.fill_null(False).to_numpy(zero_copy_only=False)).tolist():
            problems.setdefault(place, what)

    arrays = []
    for name, type_ in zip(schema.names, schema.types, strict=True):
        if name == ROW:
            arrays.append(pa.array(block.numbers, type_))
            continue
        column = block.batch.column(name)
        if name.startswith(KEPT):
            arrays.append(_as_text(column, name, source).fill_null(""))
            continue
        note(pc.is_null(column), f"{name} is missing")
        if type_ == pa.float64():
            column = _as_numbers(column, name, source, problems)
            note(pc.invert(pc.is_finite(column)), f"{name} is not a finite number")
            if name == "label":
                note(pc.invert(pc.is_in(column, pa.array([0.0, 1.0, None]))), f"label is neither 0 nor 1; {GRADED}")
        else:
            column = _as_text(column, name, source)
            note(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0), f"{name} is empty")
            note(pc.match_substring(column, "\0"), f"{name} holds a NUL character (is the file UTF-16?)")
            if format_of(source) == ".tsv":
                quoted = f"{name} is in quotes, as in a .csv; a .tsv has none: save it as .csv, .jsonl or .parquet"
                note(pc.match_substring_regex(column, QUOTED), quoted)
        arrays.append(column)
    return Block(pa.record_batch(arrays, schema=schema), block.numbers, problems)


def _as_text(column: pa.Array, name: str, source: str) -> pa.Array:
    """Cast to large_string, and make sure that it is UTF-8: Parquet's reader does not look."""
    try:
        text = column.cast(pa.large_string())
        text.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{source}: {name} is not UTF-8 text") from error
    return text


def _as_numbers(column: pa.Array, name: str, source: str, problems: dict[int, str]) -> pa.Array:
    """Cast to float64; what is no number is null, and among the problems. Labels may be true and false."""
    if pa.types.is_boolean(column.type) and name != "label":
        raise InputError(f"{source}: {name} is of type bool, not a number")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        if name == "label":
            column = pc.replace_substring_regex(column, "(?i)^true$", "1")
            column = pc.replace_substring_regex(column, "(?i)^false$", "0")
    try:
        return column.cast(pa.float64(), safe=not pa.types.is_integer(column.type))  # large ones are rounded
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array([_number(value, place, name, problems) for place, value in enumerate(column)], pa.float64())


def _number(value: pa.Scalar, place: int, name: str, problems: dict[int, str]) -> float | None:
    try:
        return value.cast(pa.float64()).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        problems.setdefault(place, f"{name} {value.as_py()!r:.60} is not a number")
        return None


class BadRows:
    """Refuse the first wrong row of a source, or leave such rows out and count them.

    Args:
        source: how a message names it.
        skip: leave them out.
    """

    def __init__(self, source: str, skip: bool):
        self.source, self.skip, self.rows, self.left_out, self.first = source, skip, 0, 0, ""

    def sift(self, block: Block) -> pa.RecordBatch:
        """Return the good rows of a checked block; raises `InputError` for a wrong one unless it may be left out."""
        self.rows += len(block.batch)
        if not block.problems:
            return block.batch
        place = min(block.problems)
        self.first = self.first or f"row {block.numbers[place]}: {block.problems[place]}"
        if not self.skip:
            raise InputError(f"{self.source}: {self.first} ({SKIP})")
        self.left_out += len(block.problems)
        good = np.ones(len(block.batch), dtype=bool)
        good[list(block.problems)] = False
        return block.batch.filter(pa.array(good))

    @property
    def report(self) -> str:
        """Return how many rows were left out, and why the first one was; "" for none."""
        return f"{self.source}: {self.left_out} of {self.rows} rows left out, first {self.first}" if self.first else ""
