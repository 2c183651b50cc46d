"""Reading and checking sentences and pairs, and turning them into batches.

Files are read once, in pieces, into a memory-mapped Arrow file of the `datasets` cache; tokens are kept the same way. So the
length of a file costs disk, not memory, and a second run with the same file starts at once.
"""

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from transencoder.errors import InputError

SENTENCES = ("sentence",)
PAIRS = ("sentence1", "sentence2")
PAIR_SEPARATOR = "||"
FORMATS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+)?$")
BLOCK_BYTES = 16 << 20
CACHE_VERSION = 1  # raise it when what is written to the cache changes


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """The first process of each machine fills the cache, the others read it. Accelerate's own context of this name leaves the
    others waiting when the first one fails; here they go on, meet the same error, and every process ends in the same way."""
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


# --- files -> tables -------------------------------------------------------------------------------------------------


def read_sentences(sources: list[str], columns: list[str] | None = None) -> datasets.Dataset:
    """The distinct sentences of all `sources`, in order of first appearance, as the column `sentence`.

    A file of pairs gives the sentences of both its columns. Repeated sentences are left out: as one another's in-batch
    negatives they would be pushed apart. Raises `InputError` as `read_pairs` does.
    """
    parts = []
    for source in sources:
        found = None if is_hub_id(source) else column_names(source)
        if found and "sentence" not in found and set(PAIRS) <= set(found) and not columns:
            table = _cached_table(source, PAIRS, None)
            parts += [table.select_columns(name).rename_column(name, "sentence") for name in PAIRS]
        else:
            parts.append(_cached_table(source, SENTENCES, columns))
    table = datasets.concatenate_datasets(parts)
    _check_two_distinct(table, SENTENCES, sources)
    return _without_repeats(table)


def read_pairs(
    sources: list[str], gold: str | None = None, columns: list[str] | None = None, drop_duplicates: bool = False
) -> datasets.Dataset:
    """Pairs of all `sources`, in order.

    Args:
        sources: .txt (`sentence1||sentence2`), .tsv, .csv, .jsonl or .parquet, plain or .gz, or Hub ids (`ORG/NAME:split`).
        gold: name of a numeric column to read as well: "score" or "label" (0 or 1).
        columns: renaming, `ours=theirs`.
        drop_duplicates: keep the first of exactly equal pairs.
    Returns:
        A memory-mapped dataset with the string columns `sentence1` and `sentence2`, and `gold` as float64.
    Raises:
        InputError: a missing, empty or unreadable file, a missing column, an empty sentence, a score that is not a number,
            fewer than two distinct sentences. The message names file, row and column.
    """
    wanted = PAIRS + ((gold,) if gold else ())
    table = datasets.concatenate_datasets([_cached_table(source, wanted, columns) for source in sources])
    _check_two_distinct(table, PAIRS, sources)
    return _without_repeats(table) if drop_duplicates else table


def sample(table: datasets.Dataset, size: int | None, seed: int) -> datasets.Dataset:
    """A random subset of `size` rows, in their order; all of them if `size` is None or larger."""
    if size is None or size >= len(table):
        return table
    return table.select(np.sort(np.random.default_rng(seed).choice(len(table), size, replace=False)))


def _without_repeats(table: datasets.Dataset) -> datasets.Dataset:
    """The first of each set of equal rows, told by 64-bit hashes: a few bytes a row, whatever the length of the text."""
    hashes = np.zeros(len(table), dtype=np.uint64)
    start = 0
    for batch in table.with_format("arrow").iter(100_000):
        for column in batch.columns:
            hashed = pd.util.hash_array(column.to_numpy(zero_copy_only=False))
            part = hashes[start : start + len(batch)]
            part *= np.uint64(0x9E3779B97F4A7C15)  # so that (a, b) and (b, a) differ
            part ^= hashed
        start += len(batch)
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return table if len(first) == len(table) else table.select(first)


def is_hub_id(source: str) -> bool:
    """Whether `source` names a Hub repository rather than a path."""
    return bool(HUB_ID.match(source)) and not Path(source).exists() and not _format_of(source)


def _format_of(source: str) -> str:
    """.txt, .tsv, .csv, .jsonl or .parquet; "" for anything else."""
    suffix = Path(source.removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS else ""


def _check_file(source: str) -> None:
    """Refuse what is not a readable file of a known format."""
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source}: no such file")
    if not path.is_file():
        raise InputError(f"{source}: not a file")
    if not _format_of(source):
        raise InputError(f"{source}: unknown format; known: {', '.join(FORMATS)}, each also with .gz")
    if path.stat().st_size == 0:
        raise InputError(f"{source}: the file is empty")


def _cached_table(source: str, wanted: tuple[str, ...], columns: list[str] | None) -> datasets.Dataset:
    """One source as a memory-mapped table of the `wanted` columns, read and checked on first sight only."""
    renaming = _parse_renaming(columns)
    if is_hub_id(source):
        return _from_hub(source, wanted, renaming)
    _check_file(source)
    path, stat = Path(source).resolve(), Path(source).stat()
    key = _key(str(path), stat.st_size, stat.st_mtime_ns, wanted, sorted(renaming.items()))
    return _through_cache(key, source, lambda: _read_batches(source, wanted, renaming), wanted)


def _key(*parts: Any) -> str:
    """A name for a cache file, from everything its content depends on."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()[:32]


def _through_cache(
    key: str, source: str, batches: Callable[[], Iterator[pa.RecordBatch]], wanted: tuple[str, ...]
) -> datasets.Dataset:
    """The table of this key, written first if it is not there yet."""
    cached = _cache_folder() / f"{key}.arrow"
    with local_main_process_first():
        if not cached.exists():
            _write_arrow(cached, source, batches(), wanted)
    return datasets.Dataset.from_file(str(cached))


def _cache_folder() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trans-encoder"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _parse_renaming(columns: list[str] | None) -> dict[str, str]:
    """["score=gold"] -> {"score": "gold"}."""
    for item in columns or []:
        if item.count("=") != 1:
            raise InputError(f"--columns {item}: expected ours=theirs, such as sentence1=question1")
    return dict(item.split("=") for item in columns or [])


def _write_arrow(target: Path, source: str, batches: Iterator[pa.RecordBatch], wanted: tuple[str, ...]) -> None:
    """Write checked `batches` to `target` by way of a temporary name."""
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    schema = pa.schema([(name, pa.large_string() if name in PAIRS + SENTENCES else pa.float64()) for name in wanted])
    rows = 0
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(_checked(batch, source, rows, schema))
                rows += batch.num_rows
        if rows == 0:
            raise InputError(f"{source}: no rows")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(batch: pa.RecordBatch, source: str, rows_before: int, schema: pa.Schema) -> pa.RecordBatch:
    """`batch` in `schema`'s types, or an `InputError` that names the first bad row (counted from 1, header left out)."""

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
            column = column.cast(type_)
            refuse(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0), f"{name} is empty")
        arrays.append(column)
    return pa.record_batch(arrays, schema=schema)


def _as_numbers(column: pa.Array, name: str, source: str, rows_before: int) -> pa.Array:
    """Cast to float64; on failure find the row and say what stands there."""
    try:
        return column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        for row, value in enumerate(column.to_pylist(), start=rows_before + 1):
            try:
                float(value)
            except (TypeError, ValueError):
                raise InputError(f"{source}: row {row}: {name} {value!r} is not a number") from None
        raise


def _read_batches(source: str, wanted: tuple[str, ...], renaming: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Pieces of a file with the `wanted` columns, under our names, unchecked."""
    theirs = [renaming.get(name, name) for name in wanted]
    readers = {".txt": _read_text, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    reader = readers.get(_format_of(source), _read_delimited)
    if reader is not _read_text:
        _require_columns(source, theirs, column_names(source))
    try:
        for batch in reader(source, theirs):
            yield pa.record_batch(batch.columns, names=list(wanted))
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def column_names(source: str) -> list[str]:
    """The columns of a file, from its first row; none for .txt. Raises `InputError` if it cannot be read."""
    _check_file(source)
    format_ = _format_of(source)
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
    except (ValueError, pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def _require_columns(source: str, theirs: list[str], found: list[str]) -> None:
    missing = [name for name in theirs if name not in found]
    if missing:
        shown = ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
        raise InputError(f"{source}: no column {missing[0]!r}; it has: {shown} (rename with --columns ours=theirs)")


def _open(source: str) -> pa.NativeFile:
    return pa.input_stream(source, compression="gzip" if source.endswith(".gz") else None)


def _read_text(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    """A sentence a line, or `sentence1||sentence2` a line. A blank line is an empty sentence, which the check refuses."""
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
    tabs = _format_of(source) == ".tsv"
    options = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in theirs}, include_columns=theirs, strings_can_be_null=False
    )
    parsing = pyarrow.csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    # One thread: only then do pyarrow's messages name the row.
    reading = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    with _open(source) as stream:
        yield from pyarrow.csv.open_csv(
            stream, read_options=reading, parse_options=parsing, convert_options=options
        )


def _read_jsonl(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    """One object a line; fields that nobody asked for are ignored."""
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
    """pyarrow counts rows from its block's start and skips blank lines; look again, line by line, for an exact message."""
    with _open(source) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"{source}: line {number}: not JSON: {error}"
            if not isinstance(row, dict):
                return f"{source}: line {number}: not a JSON object"
            for name, type_ in zip(schema.names, schema.types, strict=True):
                value = row.get(name)
                if type_ == pa.string() and value is not None and not isinstance(value, str):
                    return f"{source}: line {number}: {name} is not a string"
                if type_ == pa.float64() and (isinstance(value, bool) or not isinstance(value, int | float)):
                    return f"{source}: line {number}: {name} {value!r} is not a number"
                if type_ == pa.float64() and not math.isfinite(value):
                    return f"{source}: line {number}: {name} is not a finite number"
    return None


def _read_parquet(source: str, theirs: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(columns=theirs):
            yield batch.select(theirs)


def _from_hub(source: str, wanted: tuple[str, ...], renaming: dict[str, str]) -> datasets.Dataset:
    """A split of a Hub dataset, `ORG/NAME:split` (default: train)."""
    name, _, split = source.partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen types for "not there", "no network", "no such split"
        raise InputError(
            f"{source}: cannot be loaded from the Hub ({type(error).__name__}); pass a local file instead, or fill the cache"
        ) from error
    theirs = [renaming.get(name, name) for name in wanted]
    _require_columns(source, theirs, table.column_names)
    table = table.select_columns(theirs).rename_columns({b: a for a, b in zip(wanted, theirs, strict=True) if a != b})
    chunks = table.with_format("arrow").iter(100_000)
    return _through_cache(
        _key(table._fingerprint, wanted), source, lambda: (b for chunk in chunks for b in chunk.to_batches()), wanted
    )


def _check_two_distinct(table: datasets.Dataset, names: tuple[str, ...], sources: list[str]) -> None:
    """A single sentence, however often it stands there, has nothing to be compared with."""
    first = table[0][names[0]]
    for name in names:
        for chunk in table.data.column(name).chunks:
            if pc.any(pc.not_equal(chunk, first)).as_py():
                return
    raise InputError(f"{' '.join(sources)}: fewer than two distinct sentences")


# --- text -> tokens --------------------------------------------------------------------------------------------------


class TokenRows:
    """Token ids of many inputs, memory-mapped; a row is a NumPy view, so reading a batch costs next to nothing.

    Args:
        table: a dataset with the column `input_ids` (list of int32) and perhaps `token_type_ids` (list of int8).
    """

    def __init__(self, table: datasets.Dataset):
        self.names = table.column_names
        self._columns = {name: table.data.column(name).chunks for name in self.names}
        self._views = {
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)) for chunk in chunks]
            for name, chunks in self._columns.items()
        }
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._views["input_ids"]])
        sizes = [len(chunk) for chunk in self._columns["input_ids"]]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, name: str, indices: np.ndarray) -> list[np.ndarray]:
        """The arrays of column `name` at `indices`."""
        found = []
        for index, chunk in zip(indices, np.searchsorted(self._starts, indices, side="right") - 1, strict=True):
            offsets, values = self._views[name][chunk]
            row = index - self._starts[chunk]
            found.append(values[offsets[row] : offsets[row + 1]])
        return found


def tokenize(table: datasets.Dataset, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenRows:
    """Tokenise `columns` (one: a sentence; two: a pair) of every row, once: the result stays in the `datasets` cache.

    The cache key is made from the tokenizer's own serialisation: a fast tokenizer changes its pickled form when it is first
    used, so the key that `datasets` would compute differs from run to run.
    """
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else repr(tokenizer)
    if tokenizer.is_fast:
        vocabulary.update(truncation=None, padding=None)
    names = ["input_ids"]
    if len(columns) == 2 and "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    types = {"input_ids": datasets.List(datasets.Value("int32")), "token_type_ids": datasets.List(datasets.Value("int8"))}
    fingerprint = _key(table._fingerprint, columns, max_length, names, vocabulary)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)
        return {name: encoded[name] for name in names}

    with local_main_process_first():
        tokens = table.map(
            encode,
            batched=True,
            batch_size=10_000,
            remove_columns=table.column_names,
            features=datasets.Features({name: types[name] for name in names}),
            cache_file_name=str(_cache_folder() / f"tokens-{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc="Tokenizing",
        )
    return TokenRows(tokens)


def pad(tokens: TokenRows, indices: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """The rows at `indices` as right-padded int64 tensors [len(indices), longest]: input_ids, attention_mask, token_type_ids."""
    lengths = tokens.lengths[indices]
    inside = np.arange(lengths.max()) < lengths[:, None]
    batch = {"attention_mask": torch.from_numpy(inside.astype(np.int64))}
    for name in tokens.names:
        fill = tokenizer.pad_token_id if name == "input_ids" else tokenizer.pad_token_type_id
        padded = np.full(inside.shape, fill, dtype=np.int64)
        padded[inside] = np.concatenate(tokens.rows(name, indices))
        batch[name] = torch.from_numpy(padded)
    return batch


def unique_sentences(table: datasets.Dataset, columns: tuple[str, ...] = PAIRS) -> tuple[datasets.Dataset, list[np.ndarray]]:
    """Each distinct sentence once, and for every column the index of each row's sentence (int64 [rows])."""
    joined = pa.chunked_array([chunk for name in columns for chunk in in_order(table).data.column(name).chunks])
    encoded = joined.combine_chunks().dictionary_encode()
    indices = encoded.indices.to_numpy().astype(np.int64)
    unique = datasets.Dataset(pa.table({"sentence": encoded.dictionary}))
    return unique, np.split(indices, len(columns))


def in_order(table: datasets.Dataset) -> datasets.Dataset:
    """`table` with its rows laid out as they are numbered (after `select`, `.data` still holds the original rows)."""
    return table.flatten_indices() if table._indices is not None else table


# --- tokens -> batches -----------------------------------------------------------------------------------------------


class PairInputs(Dataset):
    """Step 2: two sentences in one input, and their pseudo-label. With `swap`, every pair is there in both orders.

    Args:
        table: columns sentence1, sentence2 and score.
    """

    def __init__(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, swap: bool):
        if swap:
            turned = table.rename_columns({"sentence1": "sentence2", "sentence2": "sentence1"})
            table = datasets.concatenate_datasets([table, turned.select_columns(table.column_names)])
        self.tokenizer = tokenizer
        self.tokens = tokenize(table, PAIRS, tokenizer, max_length)
        self.scores = np.asarray(table["score"], dtype=np.float32)
        self.lengths = self.tokens.lengths

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        indices = np.asarray(indices)
        return {"inputs": pad(self.tokens, indices, self.tokenizer), "scores": torch.from_numpy(self.scores[indices])}


class SentencePairs(Dataset):
    """Step 3: the first and then the second sentences of a batch's pairs, in one padded batch, and their pseudo-labels."""

    def __init__(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int):
        sentences, (self.first, self.second) = unique_sentences(table)
        self.tokenizer = tokenizer
        self.tokens = tokenize(sentences, SENTENCES, tokenizer, max_length)
        self.scores = np.asarray(table["score"], dtype=np.float32)
        self.lengths = np.maximum(self.tokens.lengths[self.first], self.tokens.lengths[self.second])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        both = np.concatenate([self.first[indices], self.second[indices]])
        return {"inputs": pad(self.tokens, both, self.tokenizer), "scores": torch.from_numpy(self.scores[indices])}


class DropoutViews(Dataset):
    """Step 1, SimCSE: every sentence of the batch twice; dropout makes the two differ."""

    def __init__(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.tokens = tokenize(table, SENTENCES, tokenizer, max_length)
        self.lengths = self.tokens.lengths

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"inputs": pad(self.tokens, np.concatenate([indices, indices]), self.tokenizer)}


class MaskedViews(Dataset):
    """Step 1, Mirror-BERT: every sentence as it is, and with a random span of characters replaced by the mask token.

    Args:
        table: column sentence.
        span: length of the masked span, in characters; sentences under `MIN_CHARACTERS` stay whole.
    Raises:
        InputError: the tokenizer has no mask token.
    """

    MIN_CHARACTERS = 30

    def __init__(
        self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, span: int, seed: int
    ):
        if tokenizer.mask_token is None:
            raise InputError("--method mirror: the model's tokenizer has no mask token; use --method simcse")
        self.texts = table["sentence"]
        self.tokenizer, self.max_length, self.span, self.seed = tokenizer, max_length, span, seed
        self.lengths = tokenize(table, SENTENCES, tokenizer, max_length).lengths
        self.epoch = 0

    def mask_span(self, text: str, index: int) -> str:
        """`text` with the span masked; which span depends on seed, epoch and row only, never on the world size."""
        if len(text) < self.MIN_CHARACTERS:
            return text
        start = np.random.default_rng((self.seed, self.epoch, index)).integers(len(text) - self.span + 1)
        return text[:start] + self.tokenizer.mask_token + text[start + self.span :]

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        texts = [self.texts[index] for index in indices]
        texts += [self.mask_span(text, index) for text, index in zip(texts, indices, strict=True)]
        encoded = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt", return_token_type_ids=False
        )
        return {"inputs": dict(encoded)}


class LengthWindowSampler(Sampler[list[int]]):
    """Batches of rows of similar length, drawn anew each epoch: a shuffle, cut into windows of `window` batches, each
    window sorted by length, and the order of the batches shuffled again. The incomplete last batch is left out, so that
    every step averages over the same number of rows, whatever the world size.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimizer step, over all processes.
        pieces: equal parts that a batch is given out in, one after another (gradient accumulation).
        window: batches in a window; 1 is a plain shuffle.
    """

    drop_last = True

    def __init__(self, lengths: np.ndarray, batch_size: int, pieces: int, window: int, seed: int):
        self.lengths, self.full_batch, self.pieces, self.window, self.seed = lengths, batch_size, pieces, window, seed
        self.batch_size = batch_size // pieces
        self.epoch = 0

    @property
    def batches(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.lengths) // self.full_batch

    def __len__(self) -> int:
        return self.batches * self.pieces

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))[: self.batches * self.full_batch]
        width = self.window * self.full_batch
        if self.window > 1:
            order = np.concatenate(
                [
                    part[np.argsort(self.lengths[part], kind="stable")]
                    for part in (order[start : start + width] for start in range(0, len(order), width))
                ]
            )
        for batch in order.reshape(self.batches, self.full_batch)[random.permutation(self.batches)]:
            for piece in np.split(batch, self.pieces):
                yield piece.tolist()


def make_loader(rows: Dataset, sampler: LengthWindowSampler) -> DataLoader:
    """A loader whose batches the dataset pads itself, for `accelerator.prepare` with `split_batches=True`."""
    return DataLoader(rows, batch_sampler=sampler, collate_fn=lambda batch: batch)
