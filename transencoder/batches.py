"""Tokens -> batches: what each step reads, and the order it reads it in."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from transencoder.data import tokens
from transencoder.data.tables import PAIRS, SENTENCES, numbers, sides
from transencoder.data.tokens import swapped, training_tokens, unique_sentences
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.losses import bce_targets


class PairInputs(Dataset):
    """Step 2: two sentences in one input, and their pseudo-label. With `swap`, every pair is there in both orders.

    Args:
        table: columns sentence1, sentence2 and score.
        max_length: most tokens of a pair.
        rescale, negatives: what becomes of the scores before they are targets, as of `bce_targets`.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        encoder: CrossEncoder,
        max_length: int,
        swap: bool,
        rescale: str = "none",
        negatives: str = "shift",
    ):
        if swap:
            table = datasets.concatenate_datasets([table, swapped(table)])
        self.tokens = training_tokens(table, PAIRS, encoder.preprocessor(max_length=max_length))
        self.scores = bce_targets(numbers(table, "score", np.float32), rescale, negatives)
        self.lengths = self.tokens.lengths

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        indices = np.asarray(indices)
        return {"inputs": self.tokens.batch(indices), "scores": torch.from_numpy(self.scores[indices])}


class SentencePairs(Dataset):
    """Step 3: the first, then the second sentences of a batch, in one padded batch, and their pseudo-labels.

    Args:
        table: columns sentence1, sentence2 and score.
        max_length: most tokens of a sentence.
        together: pairs with the same first sentence come in one batch.
        known: whether the loss asks which sentences are the same.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        encoder: BiEncoder,
        max_length: int,
        together: bool = False,
        known: bool = False,
    ):
        if together or known or len(table) <= tokens.TOKENIZED_ROWS:
            sentences, (self.first, self.second) = unique_sentences(table)
        else:  # what is not tokenized beforehand need not be looked at twice either
            sentences = datasets.concatenate_datasets(sides(table))
            self.first, self.second = np.arange(2 * len(table), dtype=np.int32).reshape(2, -1)
        self.tokens = training_tokens(sentences, SENTENCES, encoder.preprocessor(max_length=max_length))
        self.scores = numbers(table, "score", np.float32)
        self.lengths = np.maximum(self.tokens.lengths[self.first], self.tokens.lengths[self.second])
        self.groups = self.first if together else None

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        first, second = self.first[indices], self.second[indices]
        values = {"scores": self.scores[indices], "anchors": first, "others": second}
        inputs = self.tokens.batch(np.concatenate([first, second]))
        return {"inputs": inputs, **{name: torch.from_numpy(value) for name, value in values.items()}}


class LengthWindowSampler(Sampler[list[int]]):
    """Batches of rows of similar length, drawn anew each epoch: a shuffle, cut into windows of `window` batches, each
    window sorted by length, and the order of the batches shuffled again. The incomplete last batch is left out, so
    that every step averages over the same number of rows, whatever the world size.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimizer step, over all processes.
        micro_batches: equal parts that a batch is given out in, one after another (gradient accumulation).
        window: batches in a window; 1 is a plain shuffle.
        groups: int [rows], rows of the same number follow one another, but for where a batch ends; None for no groups.
    """

    drop_last = True

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        micro_batches: int,
        window: int,
        seed: int,
        groups: np.ndarray | None = None,
    ):
        self.groups = groups
        if groups is not None:  # sorted by the longest row of each group, no group is torn apart
            longest = np.zeros(groups.max() + 1, dtype=lengths.dtype)
            np.maximum.at(longest, groups, lengths)
            lengths = longest[groups]
        self.lengths, self.full_batch, self.micro_batches = lengths, batch_size, micro_batches
        self.window, self.seed = window, seed
        self.batch_size = batch_size // micro_batches
        self.epoch = 0

    @property
    def batches(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.lengths) // self.full_batch

    def __len__(self) -> int:
        return self.batches * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        if self.groups is not None:
            order = order[np.argsort(random.permutation(self.groups.max() + 1)[self.groups[order]], kind="stable")]
        order = order[: self.batches * self.full_batch]
        width = self.window * self.full_batch
        if self.window > 1:
            order = np.concatenate(
                [
                    part[np.argsort(self.lengths[part], kind="stable")]
                    for part in (order[start : start + width] for start in range(0, len(order), width))
                ]
            )
        for batch in order.reshape(self.batches, self.full_batch)[random.permutation(self.batches)]:
            for micro_batch in np.split(batch, self.micro_batches):
                yield micro_batch.tolist()


def make_loader(rows: Dataset, sampler: LengthWindowSampler) -> DataLoader:
    """Return a loader whose batches the dataset pads itself, for `accelerator.prepare` with `split_batches=True`.

    With a generator of its own it draws nothing from torch's, which a resumed run must find as it was.
    """
    return DataLoader(rows, batch_sampler=sampler, collate_fn=lambda batch: batch, generator=torch.Generator())
