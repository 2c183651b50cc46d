"""Turning checked tables into tokens, and tokens into batches. Tokens are made once and kept memory-mapped."""

import json
import os
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from transencoder.errors import InputError
from transencoder.files import temporary_folder
from transencoder.tables import PAIRS, SENTENCES, cache_folder, cache_key, local_main_process_first

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
    names = ["input_ids"]
    if len(columns) == 2 and "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    types = {
        "input_ids": datasets.List(datasets.Value("int32")),
        "token_type_ids": datasets.List(datasets.Value("int8")),
    }
    fingerprint = cache_key(table._fingerprint, columns, max_length, names, vocabulary)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)
        return {name: encoded[name] for name in names}

    target = cache_folder() / f"tokens-{fingerprint}.arrow"
    with local_main_process_first():
        if not target.exists():
            # In a folder of its own: what `datasets` has half written is found by nobody, and removed.
            with temporary_folder(target) as folder:
                table.map(
                    encode,
                    batched=True,
                    batch_size=10_000,
                    remove_columns=table.column_names,
                    features=datasets.Features({name: types[name] for name in names}),
                    cache_file_name=str(folder / target.name),
                    new_fingerprint=fingerprint,
                    desc="Tokenizing",
                )
                os.replace(folder / target.name, target)
    return TokenRows(datasets.Dataset.from_file(str(target)))


def pad(tokens: TokenRows, indices: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """The rows at `indices`, right-padded, as int64 [rows, longest]: input_ids, attention_mask, token_type_ids."""
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
    """Each distinct sentence once, and for every column the index of each row's sentence (int64 [rows])."""
    joined = pa.chunked_array([chunk for name in columns for chunk in in_order(table).data.column(name).chunks])
    encoded = joined.combine_chunks().dictionary_encode()
    indices = encoded.indices.to_numpy().astype(np.int64)
    unique = datasets.Dataset(pa.table({"sentence": encoded.dictionary}))
    return unique, np.split(indices, len(columns))


def turned(table: datasets.Dataset) -> datasets.Dataset:
    """The pairs with their sentences exchanged."""
    renamed = table.rename_columns({"sentence1": "sentence2", "sentence2": "sentence1"})
    return renamed.select_columns(table.column_names)


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
            table = datasets.concatenate_datasets([table, turned(table)])
        self.tokenizer = tokenizer
        self.tokens = tokenize(table, PAIRS, tokenizer, max_length)
        self.scores = np.asarray(table["score"], dtype=np.float32)
        self.lengths = self.tokens.lengths

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        indices = np.asarray(indices)
        return {"inputs": pad(self.tokens, indices, self.tokenizer), "scores": torch.from_numpy(self.scores[indices])}


class SentencePairs(Dataset):
    """Step 3: the first, then the second sentences of a batch, in one padded batch, and their pseudo-labels."""

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
        span = min(self.span, len(text))
        start = np.random.default_rng((self.seed, self.epoch, index)).integers(len(text) - span + 1)
        return text[:start] + self.tokenizer.mask_token + text[start + span :]

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        texts = [self.texts[index] for index in indices]
        texts += [self.mask_span(text, index) for text, index in zip(texts, indices, strict=True)]
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {"inputs": dict(encoded)}


class LengthWindowSampler(Sampler[list[int]]):
    """Batches of rows of similar length, drawn anew each epoch: a shuffle, cut into windows of `window` batches, each
    window sorted by length, and the order of the batches shuffled again. The incomplete last batch is left out, so
    that every step averages over the same number of rows, whatever the world size.

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
    """A loader whose batches the dataset pads itself, for `accelerator.prepare` with `split_batches=True`.

    With a generator of its own it draws nothing from torch's, which a resumed run must find as it was.
    """
    return DataLoader(rows, batch_sampler=sampler, collate_fn=lambda batch: batch, generator=torch.Generator())
