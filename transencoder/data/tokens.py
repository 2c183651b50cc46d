"""Text -> tokens, as a model's own preprocessing makes them, padded into batches.

Tokens are made once and kept memory-mapped; those of a very long training set are made batch by batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn
from tqdm.auto import tqdm

from transencoder.data.cache import cache_key, cached, checksum
from transencoder.data.tables import PAIRS, RANDOM_ROWS, blocks, release_pages, row_hashes
from transencoder.runtime.accelerator import log

# Training inputs that are tokenized before the first step, which takes about a minute; more are tokenized batch by
# batch. What decides is the number alone, so that a run and its repetition take the same way.
TOKENIZED_ROWS = 1_000_000
TEXTS_AT_ONCE = 1000  # that are tokenized together
SAMPLED_ROWS = 1000  # of inputs that are tokenized batch by batch, to say how many are cut
CUT = "cut"
# What lengths are rounded up to, by where the model is: a GPU is fast with such, and a training has few shapes then.
MULTIPLE = {"cuda": 8}
TOKEN_TYPES = {"input_ids": pa.int32(), "token_type_ids": pa.int8()}
Batch = dict[str, torch.Tensor]


class Preprocessor:
    """A model's own preprocessing of text: its prompt, its lower-casing, its chat template, its longest input.

    Texts are cut and tokenized by sentence-transformers; the padding is ours, so that it can be added batch by batch.

    Args:
        transformer: the first module of a sentence-transformers model.
        prompt: put before every text; None for none.
        max_length: most tokens of an input; by default the model's own.
        pairs: whether an input is two texts, as a cross-encoder reads them.
    """

    def __init__(self, transformer: nn.Module, prompt: str | None, max_length: int | None = None, pairs: bool = False):
        self.transformer, self.prompt = transformer, prompt
        longest = transformer.max_seq_length
        self.max_length = longest if max_length is None else min(max_length, longest)
        tokenizer = transformer.tokenizer
        self.fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        # A decoder that answers with its last token wants it at the end. Others are padded on the right whatever their
        # tokenizer says: absolute positions that depend on the batch would change their scores.
        self.pads_left = transformer.transformer_task == "text-generation"
        probe = self._preprocess([("a", "b")] if pairs else ["a"], self.max_length)
        # Token types that are all 0 are what a model takes by itself.
        typed = any(probe.get("token_type_ids", [[]])[0])
        self.names = ["input_ids", "token_type_ids"] if typed else ["input_ids"]
        self.prompt_length = probe.get("prompt_length")

    def _preprocess(self, texts: list[str] | list[tuple[str, str]], max_length: int) -> dict[str, Any]:
        """Return lists of tokens, without padding."""
        without_padding = {
            "text": {"max_length": max_length, "padding": False},
            "common": {"return_tensors": None},
        }
        return self.transformer.preprocess(texts, prompt=self.prompt, processing_kwargs=without_padding)

    def __call__(self, *columns: list[str], count_cut: bool = True) -> pa.RecordBatch:
        """Return the tokens of texts, or of the pairs of two columns, without padding.

        Args:
            count_cut: find out which inputs are cut, for which those of the greatest length are tokenized again.
        Returns:
            The columns `names`, and `cut`, true for inputs of which only a part was read.
        """
        inputs = list(zip(*columns, strict=True)) if len(columns) > 1 else list(columns[0])
        features = self._preprocess(inputs, self.max_length)
        arrays = [pa.array(features[name], pa.list_(TOKEN_TYPES[name])) for name in self.names]
        cut = np.array([count_cut and len(tokens) >= self.max_length for tokens in features["input_ids"]])
        if cut.any():  # or they have just that length, which one token more tells
            longer = self._preprocess([inputs[row] for row in np.flatnonzero(cut)], self.max_length + 1)
            cut[cut] = [len(tokens) > self.max_length for tokens in longer["input_ids"]]
        return pa.record_batch([*arrays, pa.array(cut)], names=[*self.names, CUT])

    def rows(self, *columns: list[str], count_cut: bool = True) -> TokenRows:
        """Return a few texts, or pairs, as tokens in memory."""
        return TokenRows(pa.Table.from_batches([self(*columns, count_cut=count_cut)]), self)

    def identity(self) -> list[Any]:
        """Return what the tokens of a text depend on, as JSON can hold it.

        A fast tokenizer's own serialization is part of it. Its pickled form, which `datasets` would take, changes when
        it is first used.
        """
        tokenizer = self.transformer.tokenizer
        if tokenizer.is_fast:
            vocabulary = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
        else:
            with TemporaryDirectory() as folder:  # merges and the like are in no vocabulary
                files = tokenizer.save_vocabulary(folder)
                vocabulary = [repr(tokenizer), sorted(tokenizer.get_vocab().items()), checksum(*map(Path, files))]
        config = self.transformer.get_config_dict()
        return [self.max_length, self.prompt, self.names, vocabulary, config, str(tokenizer.chat_template)]

    def pad(self, rows: dict[str, list[np.ndarray]]) -> Batch:
        """Return token rows (int [length] each, by the names of their columns) as int64 [rows, longest] tensors."""
        lengths = np.array([len(row) for row in rows["input_ids"]])
        multiple = MULTIPLE.get(next(self.transformer.parameters()).device.type, 1)
        rounded = -(-lengths.max() // multiple) * multiple
        width = max(lengths.max(), min(rounded, self.transformer.max_seq_length))
        places = np.arange(width)
        inside = places >= (width - lengths)[:, None] if self.pads_left else places < lengths[:, None]
        batch = {"attention_mask": torch.from_numpy(inside.astype(np.int64))}
        for name, arrays in rows.items():
            padded = np.full(inside.shape, self.fill[name], dtype=np.int64)
            padded[inside] = np.concatenate(arrays)
            batch[name] = torch.from_numpy(padded)
        if self.prompt_length is not None:
            batch["prompt_length"] = torch.tensor([self.prompt_length])
        return batch

    def batch(self, *columns: list[str]) -> Batch:
        """Return a few texts, or pairs, as one padded batch."""
        tokens = self.rows(*columns, count_cut=False)
        return tokens.batch(np.arange(len(tokens)))


class TokenRows:
    """Token ids of many inputs, memory-mapped; a row is a NumPy view, so reading a batch costs next to nothing.

    Args:
        table: as `preprocessor` makes it: `input_ids` (list of int32), perhaps `token_type_ids` (list of int8), `cut`.
        preprocessor: what made them, and pads them.

    Attributes:
        cut: how many inputs are longer than the model reads.
    """

    def __init__(self, table: pa.Table, preprocessor: Preprocessor):
        self.names, self.preprocessor = preprocessor.names, preprocessor
        self.cut = pc.sum(table.column(CUT)).as_py() or 0
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
        """Return the arrays of column `name` at `indices` (int64)."""
        found = []
        for index, chunk in zip(indices, np.searchsorted(self._starts, indices, side="right") - 1, strict=True):
            offsets, values = self._views[name][chunk]
            row = index - self._starts[chunk]
            found.append(values[offsets[row] : offsets[row + 1]])
        return found

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the rows at `indices`, padded: int64 [rows, longest]."""
        return self.preprocessor.pad({name: self.rows(name, indices) for name in self.names})


class TextRows:
    """Inputs that are tokenized when their batch is asked for: there are too many to do it before the first step.

    Args as of `tokenize`.

    Attributes:
        lengths: int32 [rows], as of `TokenRows` but in bytes of text, by which batches of similar length can be cut.
    """

    def __init__(self, table: datasets.Dataset, columns: tuple[str, ...], preprocessor: Preprocessor):
        self._table, self._columns = table.select_columns(list(columns)), columns
        self._preprocessor, self._read = preprocessor, 0
        sample = self._table[np.linspace(0, len(table) - 1, SAMPLED_ROWS, dtype=np.int64)]
        found = preprocessor.rows(*(sample[column] for column in columns))
        log_cut(found.cut, f"{len(found)} sampled {_inputs(columns)}", preprocessor.max_length)
        self.lengths = np.empty(len(table), dtype=np.int32)
        for start, block in blocks(self._table):
            bytes_ = sum(pc.binary_length(column).to_numpy() for column in block.columns)
            self.lengths[start : start + len(block)] = bytes_

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the rows at `indices`, padded: int64 [rows, longest]."""
        self._read += len(indices)
        if self._read > RANDOM_ROWS:
            self._read = 0
            release_pages()
        texts = self._table[indices]
        return self._preprocessor.batch(*(texts[column] for column in self._columns))


def tokenize(table: datasets.Dataset, columns: tuple[str, ...], preprocessor: Preprocessor) -> TokenRows:
    """Tokenize `columns` (one: a sentence; two: a pair) of every row, once: the result stays in the cache."""
    schema = pa.schema([(name, pa.list_(TOKEN_TYPES[name])) for name in preprocessor.names] + [(CUT, pa.bool_())])
    key = cache_key(table._fingerprint, columns, preprocessor.identity(), schema.names)

    def make(target: Path) -> None:
        with pa.ipc.new_stream(str(target), schema) as writer:
            for batch in _token_batches(table, columns, preprocessor):
                writer.write_batch(batch.cast(schema))

    made = cached([f"tokens-{key}.arrow"], make, lambda path: datasets.Dataset.from_file(str(path)))
    tokens = TokenRows(made.data.table, preprocessor)
    log_cut(tokens.cut, f"{len(tokens)} {_inputs(columns)}", preprocessor.max_length)
    return tokens


def log_cut(cut: int, inputs: str, max_length: int) -> None:
    """Say how many of the `inputs` ("90 sentences") are not read to their end, if any."""
    if cut:
        log(f"{cut} of {inputs} are cut: longer than {max_length} tokens")


def _inputs(columns: tuple[str, ...]) -> str:
    return "sentences" if len(columns) == 1 else "pairs"


def _token_batches(
    table: datasets.Dataset, columns: tuple[str, ...], preprocessor: Preprocessor
) -> Iterator[pa.RecordBatch]:
    with tqdm(total=len(table), desc="Tokenizing", leave=False, disable=None) as bar:
        for _, block in blocks(table.select_columns(list(columns)), TEXTS_AT_ONCE):
            yield preprocessor(*(block[column].to_pylist() for column in columns))
            bar.update(len(block))


def training_tokens(
    table: datasets.Dataset, columns: tuple[str, ...], preprocessor: Preprocessor
) -> TokenRows | TextRows:
    """Return the inputs of a training: up to `TOKENIZED_ROWS` are tokenized now, more of them when their batch comes.

    The tokens are the same either way. Which rows make a batch is not: it depends on `lengths`.
    """
    rows_of = tokenize if len(table) <= TOKENIZED_ROWS else TextRows
    return rows_of(table, columns, preprocessor)


def unique_sentences(
    table: datasets.Dataset, columns: tuple[str, ...] = PAIRS
) -> tuple[datasets.Dataset, list[np.ndarray]]:
    """Return each distinct sentence once, and for every column the index of each row's sentence (int32 [rows]).

    Both are kept in the `datasets` cache, memory-mapped. Sentences are told apart by 64-bit hashes, see `row_hashes`.
    """
    key = cache_key(table._fingerprint, columns)
    return cached(
        [f"unique-{key}.arrow", f"unique-{key}.npy"],
        lambda text, places: _write_unique(table.select_columns(list(columns)), text, places),
        lambda text, places: (datasets.Dataset.from_file(str(text)), list(np.load(places, mmap_mode="r"))),
    )


def _write_unique(table: datasets.Dataset, text: Path, places: Path) -> None:
    """Write what `unique_sentences` keeps, block by block, from the columns of `table`, all of them sentences.

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
    with pa.OSFile(str(text), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
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
    np.save(places, indices)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast to the type of checked tables, which offsets of 32 bits do not limit."""
    return column.cast(pa.large_string())


def swapped(table: datasets.Dataset) -> datasets.Dataset:
    """Return the pairs with their sentences exchanged."""
    renamed = table.rename_columns({"sentence1": "sentence2", "sentence2": "sentence1"})
    return renamed.select_columns(table.column_names)
