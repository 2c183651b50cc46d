"""Turning tokens into batches: what each step reads, and the order it reads it in."""

import math
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from transencoder.config.arguments import TrainingArguments
from transencoder.data import tokens
from transencoder.data.tables import PAIRS, SENTENCES, numbers, sides
from transencoder.data.tokens import pad, training_tokens, turned, unique_sentences
from transencoder.errors import InputError


class PairInputs(Dataset):
    """Step 2: two sentences in one input, and their pseudo-label. With `swap`, every pair is there in both orders.

    Args:
        table: columns sentence1, sentence2 and score.
    """

    def __init__(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, swap: bool):
        if swap:
            table = datasets.concatenate_datasets([table, turned(table)])
        self.tokenizer = tokenizer
        self.tokens = training_tokens(table, PAIRS, tokenizer, max_length)
        self.scores = numbers(table, "score", np.float32)
        self.lengths = self.tokens.lengths

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        indices = np.asarray(indices)
        return {"inputs": pad(self.tokens, indices, self.tokenizer), "scores": torch.from_numpy(self.scores[indices])}


class SentencePairs(Dataset):
    """Step 3: the first, then the second sentences of a batch, in one padded batch, and their pseudo-labels."""

    def __init__(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if len(table) <= tokens.TOKENIZED_ROWS:
            sentences, (self.first, self.second) = unique_sentences(table)
        else:  # what is not tokenised beforehand need not be looked at twice either
            sentences = datasets.concatenate_datasets(sides(table))
            self.first, self.second = np.arange(2 * len(table), dtype=np.int32).reshape(2, -1)
        self.tokenizer = tokenizer
        self.tokens = training_tokens(sentences, SENTENCES, tokenizer, max_length)
        self.scores = numbers(table, "score", np.float32)
        self.lengths = np.maximum(self.tokens.lengths[self.first], self.tokens.lengths[self.second])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        both = np.concatenate([self.first[indices], self.second[indices]])
        return {"inputs": pad(self.tokens, both, self.tokenizer), "scores": torch.from_numpy(self.scores[indices])}


class DropoutViews(Dataset):
    """Step 1, SimCSE: every sentence of the batch twice; dropout makes the two differ."""

    def __init__(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.tokens = training_tokens(table, SENTENCES, tokenizer, max_length)
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
        self.lengths = training_tokens(table, SENTENCES, tokenizer, max_length).lengths
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


def count_pieces(rows: int, arguments: TrainingArguments, num_processes: int) -> int:
    """Gradient accumulation steps that the batch size needs.

    Raises:
        InputError: fewer rows than one batch, or a batch that the processes cannot share equally.
    """
    total = arguments.total_batch_size
    if rows < total:
        raise InputError(f"{rows} examples are fewer than one batch; lower --total_batch_size (now {total})")
    if total % num_processes:
        raise InputError(f"--total_batch_size {total}: not divisible by {num_processes} processes")
    share = total // num_processes
    pieces = math.ceil(share / min(arguments.micro_batch_size or share, share))
    if share % pieces:
        raise InputError(
            f"--micro_batch_size {arguments.micro_batch_size}: {share} examples of each process do not split into "
            f"{pieces} equal parts"
        )
    return pieces
