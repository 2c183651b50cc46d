"""Turning checked tables into tokens, and tokens into batches.

Tokens are made once and kept memory-mapped; those of a very long training set are made batch by batch.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from transencoder.data.tables import (
    PAIRS,
    RANDOM_ROWS,
    blocks,
    cache_folder,
    cache_key,
    release_pages,
    row_hashes,
)
from transencoder.runtime.files import replacing
from transencoder.runtime.waiting import local_main_process_first

# Training inputs that are tokenised before the first step, which takes about a minute; more are tokenised batch by
# batch. What decides is the number alone, so that a run and its repetition take the same way.
TOKENIZED_ROWS = 1_000_000

# --- text -> tokens --------------------------------------------------------------------------------------------------


class TokenRows:
    """Token ids of many inputs, memory-mapped; a row is a NumPy view, so reading a batch costs next to nothing.

    Args:
        table: the column `input_ids` (list of int32) and perhaps `token_type_ids` (list of int8).
    """

    def __init__(self, table: pa.Table):
        self.names = table.column_names
        self._columns = {name: table.column(name).chunks for name in self.names}
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
        """The arrays of column `name` at `indices` (int64)."""
        found = []
        for index, chunk in zip(indices, np.searchsorted(self._starts, indices, side="right") - 1, strict=True):
            offsets, values = self._views[name][chunk]
            row = index - self._starts[chunk]
            found.append(values[offsets[row] : offsets[row + 1]])
        return found

    def at(self, indices: np.ndarray) -> tuple["TokenRows", np.ndarray]:
        """Where the tokens of `indices` are found: here, under these numbers."""
        return self, indices


class TextRows:
    """Inputs that are tokenised when their batch is asked for: there are too many to do it before the first step.

    Args as of `tokenize`.

    Attributes:
        lengths: int32 [rows], as of `TokenRows` but in bytes of text, which batches of similar length can be cut by.
    """

    def __init__(
        self, table: datasets.Dataset, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
    ):
        self._table = table.select_columns(list(columns))
        self.names, self._encode = _encoding(columns, tokenizer, max_length)
        self._read = 0
        self.lengths = np.empty(len(table), dtype=np.int32)
        for start, block in blocks(self._table):
            bytes_ = sum(pc.binary_length(column).to_numpy() for column in block.columns)
            self.lengths[start : start + len(block)] = bytes_

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, indices: np.ndarray) -> tuple[TokenRows, np.ndarray]:
        """The tokens of `indices`, and their numbers there."""
        self._read += len(indices)
        if self._read > RANDOM_ROWS:
            self._read = 0
            release_pages()
        tokens = self._encode(self._table[indices])
        arrays = [pa.array(tokens[name], pa.list_(TOKEN_TYPES[name])) for name in self.names]
        return TokenRows(pa.table(arrays, names=self.names)), np.arange(len(indices))


TOKEN_TYPES = {"input_ids": pa.int32(), "token_type_ids": pa.int8()}


def _encoding(
    columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[str], Callable[[dict[str, list[str]]], dict[str, Any]]]:
    """The names of what a model needs of one or two columns of text, and the function that makes it of a batch."""
    names = ["input_ids"]
    if len(columns) == 2 and "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = (batch[column] for column in columns)
        wanted = dict(return_attention_mask=False, return_token_type_ids="token_type_ids" in names)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, **wanted)
        return {name: encoded[name] for name in names}

    return names, encode


def tokenize(
    table: datasets.Dataset, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenRows:
    """Tokenise `columns` (one: a sentence; two: a pair) of every row, once: the result stays in the `datasets` cache.

    The cache key is made from the tokenizer's own serialisation: a fast tokenizer changes its pickled form when it is
    first used, so the key that `datasets` would compute differs from run to run.
    """
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else repr(tokenizer)
    if tokenizer.is_fast:
        vocabulary.update(truncation=None, padding=None)
    names, encode = _encoding(columns, tokenizer, max_length)
    fingerprint = cache_key(table._fingerprint, columns, max_length, names, vocabulary)
    types = {name: datasets.List(datasets.Value(str(TOKEN_TYPES[name]))) for name in names}

    def encode_block(batch: dict[str, list[str]]) -> dict[str, Any]:
        release_pages()
        return encode(batch)

    target = cache_folder() / f"tokens-{fingerprint}.arrow"
    with local_main_process_first():
        if not target.exists():
            with replacing(target) as temporary:
                table.map(
                    encode_block,
                    batched=True,
                    remove_columns=table.column_names,
                    features=datasets.Features(types),
                    cache_file_name=str(temporary),
                    new_fingerprint=fingerprint,
                    desc="Tokenizing",
                )
    return TokenRows(datasets.Dataset.from_file(str(target)).data.table)


def training_tokens(
    table: datasets.Dataset, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenRows | TextRows:
    """The inputs of a training: up to `TOKENIZED_ROWS` are tokenised now, more of them when their batch comes.

    The tokens are the same either way. Which rows make a batch is not: it depends on `lengths`.
    """
    rows_of = tokenize if len(table) <= TOKENIZED_ROWS else TextRows
    return rows_of(table, columns, tokenizer, max_length)


def pad(
    tokens: TokenRows | TextRows, indices: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """The rows at `indices`, right-padded, as int64 [rows, longest]: input_ids, attention_mask, token_type_ids."""
    tokens, indices = tokens.at(indices)
    lengths = tokens.lengths[indices]
    inside = np.arange(lengths.max()) < lengths[:, None]
    batch = {"attention_mask": torch.from_numpy(inside.astype(np.int64))}
    for name in tokens.names:
        fill = tokenizer.pad_token_id if name == "input_ids" else tokenizer.pad_token_type_id
        padded = np.full(inside.shape, fill, dtype=np.int64)
        padded[inside] = np.concatenate(tokens.rows(name, indices))
        batch[name] = torch.from_numpy(padded)
    return batch


def unique_sentences(
    table: datasets.Dataset, columns: tuple[str, ...] = PAIRS
) -> tuple[datasets.Dataset, list[np.ndarray]]:
    """Each distinct sentence once, and for every column the index of each row's sentence (int32 [rows]).

    Both are kept in the `datasets` cache, memory-mapped. Sentences are told apart by 64-bit hashes, see `row_hashes`.
    """
    key = cache_key(table._fingerprint, columns)
    text, places = (cache_folder() / f"unique-{key}.{suffix}" for suffix in ("arrow", "npy"))
    with local_main_process_first():
        if not (text.exists() and places.exists()):
            _write_unique(table.select_columns(list(columns)), text, places)
    return datasets.Dataset.from_file(str(text)), list(np.load(places, mmap_mode="r"))


def _write_unique(table: datasets.Dataset, text: Path, places: Path) -> None:
    """What `unique_sentences` keeps, block by block, from the columns of `table`, all of them sentences.

    The sentences are numbered as they appear, row by row, so that what a block of pairs needs lies close together.
    """
    width, names = len(table.column_names), table.column_names
    hashes = np.empty((len(table), width), dtype=np.uint64)
    for start, block in blocks(table):
        for column, name in enumerate(names):
            hashes[start : start + len(block), column] = row_hashes(block.select([name]))
    known = np.sort(hashes, axis=None)
    known = known[np.append(True, known[1:] != known[:-1])]
    found = np.full(len(known), -1, dtype=np.int32)  # the number of the sentence with each known hash
    indices = np.empty((width, len(table)), dtype=np.int32)

    schema, count = pa.schema([("sentence", pa.large_string())]), 0
    with (
        replacing(text) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for start, block in blocks(table):
            rows = slice(start, start + len(block))
            some, first, inverse = np.unique(hashes[rows], return_index=True, return_inverse=True)
            at = np.searchsorted(known, some)
            new = np.flatnonzero(found[at] < 0)
            new = new[np.argsort(first[new])]
            found[at[new]] = np.arange(count, count + len(new))
            count += len(new)
            indices[:, rows] = found[at][inverse].reshape(-1, width).T
            column_by_column = pa.concat_arrays([part for name in names for part in _text(block[name]).chunks])
            row, column = np.divmod(first[new], width)
            writer.write_batch(
                pa.record_batch([column_by_column.take(pa.array(column * len(block) + row))], names=["sentence"])
            )
    with replacing(places) as temporary:
        np.save(temporary, indices)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """In the type of checked tables, which offsets of 32 bits do not limit."""
    return column.cast(pa.large_string())


def turned(table: datasets.Dataset) -> datasets.Dataset:
    """The pairs with their sentences exchanged."""
    renamed = table.rename_columns({"sentence1": "sentence2", "sentence2": "sentence1"})
    return renamed.select_columns(table.column_names)


# --- tokens -> batches -----------------------------------------------------------------------------------------------
