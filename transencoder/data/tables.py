"""Reading and checking sentences and pairs.

A file is read once, block by block, into a memory-mapped Arrow file of the `datasets` cache: its length costs disk,
not memory, and a second run with the same file starts at once.
"""

import ctypes
import hashlib
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from transencoder.config.options import Reading
from transencoder.data.bad_rows import BadRows, checked
from transencoder.data.cache import cache_key, cached, checksum
from transencoder.data.formats import (
    KEPT,
    NUMBERS,
    ROW,
    Block,
    as_blocks,
    check_file,
    column_names,
    format_of,
    read_blocks,
    require_columns,
    theirs_of,
)
from transencoder.data.hub_sets import load_split
from transencoder.errors import InputError

SENTENCES = ("sentence",)
PAIRS = ("sentence1", "sentence2")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?$")
BLOCK_ROWS = 65_536  # rows of a table that are worked on at a time
MAPPED_BYTES = 1 << 27  # files up to this size may stay mapped as a whole
RANDOM_ROWS = 4096  # rows from all over a long file after which its pages are given back; each can map 64 KiB
LIBC = ctypes.CDLL(None)
AS_IT_IS = Reading()


def read_sentences(sources: list[str], reading: Reading = AS_IT_IS) -> datasets.Dataset:
    """Read the distinct sentences of all `sources`, in order of first appearance, as the column `sentence`.

    A file of pairs gives the sentences of both its columns. Repeated sentences are left out: as one another's in-batch
    negatives they would be pushed apart. Raises `InputError` as `read_pairs` does.
    """
    return join_sentences([part for source in sources for part in sentence_parts(source, reading)], sources)


def sentence_parts(source: str, reading: Reading = AS_IT_IS) -> list[datasets.Dataset]:
    """Read the column `sentence` of a source, or one for each side of its pairs; repeats included."""
    if not is_hub_id(source) and _holds_pairs(source, parse_renaming(reading.columns)):
        return sides(_cached_table(source, PAIRS, reading))
    return [_cached_table(source, SENTENCES, reading)]


def read_rows(sources: list[str], reading: Reading, keep: list[str]) -> datasets.Dataset:
    """Read every row of `sources`, repeats included.

    Args:
        keep: columns that are carried along, as text.
    Returns:
        The columns sentence, `keep`, row (int64, from 1), and file where there are several sources. A pair gives two
        rows.
    """
    parts, more = [], _carried(keep)
    for source in sources:
        pairs = not is_hub_id(source) and _holds_pairs(source, parse_renaming(reading.columns))
        texts = PAIRS if pairs else SENTENCES
        table = _cached_table(source, (*texts, *more), reading)
        for text in texts:
            names = {text: "sentence", **dict(zip(more, [*keep, ROW], strict=True))}
            part = table.select_columns([text, *more]).rename_columns(names)
            parts.append(part.add_column("file", [source] * len(part)) if len(sources) > 1 else part)
    return datasets.concatenate_datasets(parts)


def _carried(keep: list[str]) -> list[str]:
    """Return our names of the columns `keep`, and of the rows' numbers."""
    return [*(f"{KEPT}{name}" for name in keep), ROW]


def sides(pairs: datasets.Dataset) -> list[datasets.Dataset]:
    """Return both sides of pairs, each as the column `sentence`."""
    return [pairs.select_columns(name).rename_column(name, "sentence") for name in PAIRS]


def join_sentences(parts: list[datasets.Dataset], sources: list[str]) -> datasets.Dataset:
    """Return the distinct sentences of `parts`. `sources`: how an error names them."""
    table = datasets.concatenate_datasets(parts)
    _check_two_distinct(table, SENTENCES, sources)
    return without_repeats(table)


def read_pairs(
    sources: list[str],
    gold: str | tuple[str, ...] | None = None,
    reading: Reading = AS_IT_IS,
    drop_duplicates: bool = False,
    keep: list[str] | None = None,
) -> datasets.Dataset:
    """Pairs of all `sources`, in order.

    Args:
        sources: .txt (`sentence1||sentence2`), .tsv, .csv, .jsonl or .parquet, plain or .gz, or Hub ids
            (`ORG/NAME:split@revision`; by default train and main).
        gold: numeric column(s) to read as well: "score", "label" (0 or 1), "disagreement".
        reading: how columns are renamed, and what is done about bad rows.
        drop_duplicates: keep the first of exactly equal pairs.
        keep: columns that are carried along, as text, together with the rows' numbers.
    Returns:
        A memory-mapped dataset with the string columns `sentence1` and `sentence2`, `gold` as float64, and `keep` and
        row (int64, from 1) where some are kept.
    Raises:
        InputError: a missing, empty or unreadable file, a missing column, an empty sentence, a score that is not a
            number, fewer than two distinct sentences. The message names file, row and column.
    """
    wanted = PAIRS + ((gold,) if isinstance(gold, str) else gold or ()) + tuple(_carried(keep) if keep else ())
    table = datasets.concatenate_datasets([_cached_table(source, wanted, reading) for source in sources])
    table = table.rename_columns({f"{KEPT}{name}": name for name in keep}) if keep else table
    _check_two_distinct(table, PAIRS, sources)
    return without_repeats(table, list(PAIRS)) if drop_duplicates else table


def sample(table: datasets.Dataset, size: int | None, seed: int) -> datasets.Dataset:
    """Return a random subset of `size` rows, in their order; all of them if `size` is None or larger."""
    if size is None or size >= len(table):
        return table
    return table.select(np.sort(np.random.default_rng(seed).choice(len(table), size, replace=False)))


def without_repeats(table: datasets.Dataset, names: list[str] | None = None) -> datasets.Dataset:
    """Return the first of each set of equal rows, told by 64-bit hashes: a few bytes a row, however long the text.

    Args:
        names: of the columns that are compared; all by default.
    """
    first = first_rows(table, names or table.column_names)
    return table if len(first) == len(table) else table.select(first)


def first_rows(table: datasets.Dataset, names: list[str]) -> np.ndarray:
    """Return the numbers of the first of each set of rows that are equal in the columns `names`: int64, ascending."""
    hashes, compared = np.empty(len(table), dtype=np.uint64), table.select_columns(names)
    for start, block in blocks(compared):
        hashes[start : start + len(block)] = row_hashes(block.select(names))
    return np.sort(np.unique(hashes, return_index=True)[1])


def row_hashes(block: pa.Table) -> np.ndarray:
    """Return a number for each row, by which equal rows are known: uint64 [rows].

    Two of 10 million different rows share one with a probability of 3e-6.
    """
    hashes = np.zeros(len(block), dtype=np.uint64)
    for column in block.columns:
        hashes *= np.uint64(0x9E3779B97F4A7C15)  # so that (a, b) and (b, a) differ
        hashes ^= pd.util.hash_array(column.to_numpy(zero_copy_only=False), categorize=False)
    return hashes


def content_checksum(table: datasets.Dataset) -> str:
    """Return what tells the rows of a table from those of any other, wherever they came from."""
    sha = hashlib.sha256()
    for _, block in blocks(table):
        sha.update(row_hashes(block).tobytes())
    return sha.hexdigest()


def blocks(table: datasets.Dataset, rows: int | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield a table, `rows` (by default `BLOCK_ROWS`) at a time: the number of the block's
    first row, from 0, and the block.

    The rows of a selection are gathered by Arrow, which takes a hundredth of the time that `Dataset.iter` does.
    """
    rows, data, chosen = rows or BLOCK_ROWS, table.data.table, table._indices
    for start in range(0, len(table), rows):
        release_pages()
        if chosen is None:
            yield start, data.slice(start, rows)
        else:
            indices = chosen.column(0).slice(start, rows).to_numpy().astype(np.int64)
            lowest, highest = indices.min(), indices.max()
            yield start, data.slice(lowest, highest - lowest + 1).take(pa.array(indices - lowest))


def release_pages() -> None:
    """Give back what this process has mapped of the long files of tables, tokens and vectors; they stay open.

    The system would take these pages back by itself when it needs them. Until then they count as the process's, which
    a limit on its memory may not forgive, and a person who watches it does not either. Linux only; elsewhere nothing.
    """
    try:
        mappings = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for mapping in mappings:
        if not mapping.endswith((".arrow", ".npy", ".vec")):
            continue
        place, access = mapping.split(maxsplit=2)[:2]
        start, end = (int(address, 16) for address in place.split("-"))
        # What a process changes for itself alone ("rw-p") is not in the file.
        if end - start > MAPPED_BYTES and access.startswith("r") and access != "rw-p":
            LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def numbers(table: datasets.Dataset, name: str, dtype: type = np.float64) -> np.ndarray:
    """Return a numeric column as one array [rows], without a Python object for each row."""
    values = np.empty(len(table), dtype=dtype)
    for start, block in blocks(table):
        values[start : start + len(block)] = block[name].to_numpy()
    return values


def _holds_pairs(source: str, renaming: dict[str, str]) -> bool:
    """Return whether a file has two sentences a row, and no column of sentences."""
    found = column_names(source)
    pairs = all(theirs_of(name, renaming, found) in found for name in PAIRS)
    return pairs and theirs_of("sentence", renaming, found) not in found


def is_hub_id(source: str) -> bool:
    """Return whether `source` names a Hub repository rather than a path."""
    return bool(HUB_ID.match(source)) and not Path(source).exists() and not format_of(source)


def _cached_table(source: str, wanted: tuple[str, ...], reading: Reading) -> datasets.Dataset:
    """Return one source as a memory-mapped table of the `wanted` columns, read and checked on first sight only."""
    if is_hub_id(source):
        return _from_hub(source, wanted, reading)
    check_file(source)
    if format_of(source) == ".txt" and (kept := [name.removeprefix(KEPT) for name in wanted if name.startswith(KEPT)]):
        raise InputError(f"--keep {kept[0]}: {source} has no columns")
    renaming, content = parse_renaming(reading.columns), _content(source)
    key = cache_key(content, format_of(source), wanted, sorted(renaming.items()), reading.skip_bad_rows)

    def blocks_of_file() -> Iterator[Block]:
        yield from read_blocks(source, tuple(name for name in wanted if name != ROW), renaming)
        if _content(source) != content:
            raise InputError(f"{source}: has changed while it was read; run the same command again")

    return _through_cache(key, source, blocks_of_file, wanted, reading)


def _content(source: str) -> str:
    """Return the checksum of a file: another one may have its name, its size and its time."""
    try:
        return checksum(Path(source))
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error


def _through_cache(
    key: str, source: str, read: Callable[[], Iterator[Block]], wanted: tuple[str, ...], reading: Reading
) -> datasets.Dataset:
    """Return the table of this key, written first if it is not there yet."""
    types = {ROW: pa.int64(), **dict.fromkeys(NUMBERS, pa.float64())}
    schema = pa.schema([(name, types.get(name, pa.large_string())) for name in wanted])

    def make(target: Path) -> str:
        bad = BadRows(source, reading.skip_bad_rows)
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for block in read():
                writer.write_batch(bad.sift(checked(block, source, schema)))
        if bad.rows == bad.left_out:
            raise InputError(f"{source}: no rows" + (f" are good; {bad.first}" if bad.rows else ""))
        return bad.report

    return cached([f"{key}.arrow"], make, lambda path: datasets.Dataset.from_file(str(path)))


def parse_renaming(columns: list[str] | None) -> dict[str, str]:
    """["score=gold"] -> {"score": "gold"}."""
    for item in columns or []:
        if item.count("=") != 1:
            raise InputError(f"--columns {item}: expected ours=theirs, such as sentence1=question1")
    return dict(item.split("=") for item in columns or [])


def _from_hub(source: str, wanted: tuple[str, ...], reading: Reading) -> datasets.Dataset:
    """Load a split of a Hub dataset, `ORG/NAME:split@revision` (default: train, main)."""
    name, _, revision = source.partition("@")
    name, _, split = name.partition(":")
    table, renaming = load_split(name, split or "train", revision=revision or None), parse_renaming(reading.columns)
    ours = [name for name in wanted if name != ROW]
    theirs = [theirs_of(name, renaming, table.column_names) for name in ours]
    require_columns(source, theirs, table.column_names)
    table = table.select_columns(theirs).rename_columns({b: a for a, b in zip(ours, theirs, strict=True) if a != b})
    return check_hub_table(table, source, wanted, reading)


def check_hub_table(
    table: datasets.Dataset, source: str, wanted: tuple[str, ...], reading: Reading = AS_IT_IS
) -> datasets.Dataset:
    """Return a Hub table with the `wanted` columns, checked as files are. `source`: how an error names it."""
    chunks = table.with_format("arrow").iter(100_000)
    key = cache_key(table._fingerprint, wanted, reading.skip_bad_rows)
    return _through_cache(key, source, lambda: as_blocks(b for c in chunks for b in c.to_batches()), wanted, reading)


def _check_two_distinct(table: datasets.Dataset, names: tuple[str, ...], sources: list[str]) -> None:
    """Refuse a single sentence, however often it stands there: it has nothing to be compared with."""
    first = table[0][names[0]]
    for name in names:
        for chunk in table.data.column(name).chunks:
            if pc.any(pc.not_equal(chunk, first)).as_py():
                return
    raise InputError(f"{' '.join(sources)}: fewer than two distinct sentences")
