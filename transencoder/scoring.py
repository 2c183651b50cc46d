"""Encoders and pairs -> scores, sharded over processes; a bi-encoder sees each sentence once."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import nn

from transencoder.data.tables import PAIRS, SENTENCES
from transencoder.data.tokens import swapped, tokenize, unique_sentences
from transencoder.embeddings import comparable, device_similarities, embed, embed_texts, similarities, smoothed
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.inference import Inference
from transencoder.lexical import lexical_scores
from transencoder.losses import SCALES, logistic
from transencoder.model_files import NO_OPTIONS, ModelOptions
from transencoder.runtime.accelerator import log
from transencoder.runtime.optional import load_optional
from transencoder.sanity import check_scores


def sides_of(encoder: BiEncoder, pairs: datasets.Dataset) -> tuple[list[datasets.Dataset], np.ndarray, np.ndarray]:
    """Return the distinct sentences of pairs, and each pair's two sentences among them.

    Where both sentences of a pair have the same prompt they are one set, else two, one behind the other.

    Returns:
        Sets with the column sentence; first and second: int [pairs], rows of the sets together.
    """
    if encoder.prompts[0] == encoder.prompts[1]:
        sentences, (first, second) = unique_sentences(pairs)
        return [sentences], first, second
    (one, (first,)), (other, (second,)) = (unique_sentences(pairs, (name,)) for name in PAIRS)
    return [one, other], first, second + len(one)


class PreparedPairs:
    """Pairs tokenized for one encoder, so that scoring them again (dev evaluation) costs forward passes only.

    Args:
        pairs: columns sentence1 and sentence2.
        neighbours: of each sentence among all, over which a bi-encoder's vectors are smoothed; see `smoothed`.
    """

    def __init__(self, encoder: BiEncoder | CrossEncoder, pairs: datasets.Dataset, neighbours: int = 0):
        self.encoder, self.neighbours = encoder, neighbours
        if encoder.kind == "bi":
            sides, self.first, self.second = sides_of(encoder, pairs)
            self.tokens = [tokenize(some, SENTENCES, encoder.preprocessor(n)) for n, some in enumerate(sides)]
        else:
            self.tokens = [tokenize(pairs, PAIRS, encoder.preprocessor())]

    def score(self, model: nn.Module, inference: Inference, title: str = "Scoring") -> np.ndarray:
        """Return the scores of the pairs, float32 [pairs], the same on every process.

        Args:
            model: the encoder, as it is or as `accelerator.prepare` returned it.
        Returns:
            A bi-encoder's similarities (cosines, unless it says otherwise), or a cross-encoder's activations
            (probabilities, unless it says otherwise). Logits are float32: half precision ties the scores near 0 and 1.
        """
        training = model.training
        model.eval()
        outputs = torch.cat([inference.run(model, tokens, title) for tokens in self.tokens])
        model.train(training)
        if self.encoder.kind == "cross":
            return self.encoder.activate(outputs.cpu()).numpy()
        if outputs.device.type != "cpu" and not self.neighbours:
            return device_similarities(outputs, self.first, self.second, self.encoder.similarity)
        return self._compare(comparable(outputs.cpu().numpy(), self.encoder.similarity), inference)

    def score_in_shards(self, inference: Inference, title: str, name: str) -> np.ndarray:
        """Return the same scores, for any number of pairs: all but them lies on disk.

        Args:
            inference: with shards, in which what is done is kept under `name`, and a bi-encoder's embeddings.
        """
        if self.encoder.kind == "cross":
            outputs = inference.by_shard(self.encoder, *self.tokens, title, name)
            return np.concatenate([self.encoder.activate(torch.from_numpy(shard)).numpy() for shard in outputs])
        path, accelerator = inference.shards.folder / f"{name}.vec", inference.accelerator
        scores = self._compare(embed([(self.encoder, self.tokens)], path, inference), inference)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            path.unlink()
        return scores

    def _compare(self, vectors: np.ndarray, inference: Inference) -> np.ndarray:
        if self.neighbours:
            vectors = smoothed(vectors, min(self.neighbours, len(vectors) - 1), inference.accelerator.device)
        return similarities(vectors, self.first, self.second, self.encoder.similarity)


@dataclass
class Teachers:
    """Whoever scores pairs, and the mean of the scores: self- and mutual distillation, and teachers from outside.

    Args:
        names: folders or Hub ids of bi- and cross-encoders.
        weights: of the encoders, then of `given`, in any unit; equal by default.
        options: how they are read.
        both_orders: a cross-encoder's score is the mean of those of (a, b) and (b, a).
        lexical_weight: share of `lexical_scores` in the score.
        scale: a key of `losses.SCALES`, on which scores are put before the mean.
        neighbours: as of `PreparedPairs`.
        given: other tools' scores of the pairs, of a single set: float [pairs] each, NaN for a pair without one.
    """

    names: list[str]
    weights: list[float] | None = None
    options: ModelOptions = NO_OPTIONS
    both_orders: bool = False
    lexical_weight: float = 0.0
    scale: str = "none"
    neighbours: int = 0
    given: Sequence[np.ndarray] = ()

    def __post_init__(self) -> None:
        if self.lexical_weight:
            load_optional("sklearn.feature_extraction.text")  # before an encoder is loaded

    def shares(self) -> np.ndarray:
        """Return the weights as parts of one."""
        size = len(self.names) + len(self.given)
        weights = np.ones(size) if self.weights is None else np.asarray(self.weights)
        return weights / weights.sum()

    def score(self, sets: list[datasets.Dataset], inference: Inference) -> list[np.ndarray]:
        """Return the mean scores of sets of pairs, float32 [pairs] each. Arguments as of `means`."""
        return [mean.scores() for mean in self.means(sets, inference)]

    def means(self, sets: list[datasets.Dataset], inference: Inference) -> list["Mean"]:
        """Score sets of pairs. Encoders are loaded one after another.

        Args:
            inference: its shards, if it has them, are for a single set.
        """
        means = [Mean(len(pairs), self.scale) for pairs in sets]
        shares = (1 - self.lexical_weight) * self.shares()
        for number, (name, share) in enumerate(zip(self.names, shares, strict=False)):
            encoder = inference.load(name, self.options)
            if encoder.kind == "bi" and encoder.similarity != "cosine":
                log(f"{name}: its scores are by {encoder.similarity}, as it says, not cosines")
            title = f"Scoring with {encoder.name}"
            for mean, pairs in zip(means, sets, strict=True):
                both = self.both_orders and encoder.kind == "cross"
                orders = [pairs, swapped(pairs)] if both else [pairs]
                for swap, order in enumerate(orders):
                    prepared = PreparedPairs(encoder, order, self.neighbours)
                    if inference.shards is None:
                        scores = prepared.score(encoder, inference, title)
                    else:
                        scores = prepared.score_in_shards(inference, title, f"encoder-{number}-{swap}")
                    check_scores(name, scores)
                    mean.add(scores, share / len(orders))
        for scores, share in zip(self.given, shares[len(self.names) :], strict=True):
            means[0].add(scores, share)
        if self.lexical_weight:
            for mean, pairs in zip(means, sets, strict=True):
                mean.add(lexical_scores(pairs), self.lexical_weight)
        return means


class Mean:
    """The weighted mean of several teachers' scores, each on the same scale; a pair's is over those that scored it.

    Args:
        size: how many pairs there are.
        scale: a key of `losses.SCALES`.
    """

    def __init__(self, size: int, scale: str):
        self.scale, self.teachers = scale, 0
        self.total, self.squares, self.weights, self.number = (np.zeros(size) for _ in range(4))

    def add(self, scores: np.ndarray, weight: float) -> None:
        """Take a teacher in. `scores`: float [pairs], NaN for those that it has not scored."""
        there = ~np.isnan(scores)
        scaled = SCALES[self.scale].function(scores[there]).astype(np.float64)
        self.total[there] += weight * scaled
        self.squares[there] += weight * scaled**2
        self.weights[there] += weight
        self.number[there] += 1
        self.teachers += 1

    def scores(self) -> np.ndarray:
        """Return the mean, float32 [pairs]; from 0 to 1 on the scales that are not "none"."""
        mean = self.total / self.weights
        return (logistic(mean) if self.scale == "standard" else mean).astype(np.float32)

    def disagreement(self) -> np.ndarray | None:
        """Return the weighted standard deviation of a pair's scores on their scale, float32 [pairs].

        Of a single score nobody knows: it has the median of the others. None where there is one teacher: both orders
        of a cross-encoder are two.
        """
        if self.teachers < 2:
            return None
        found = np.sqrt((self.squares / self.weights - (self.total / self.weights) ** 2).clip(0))
        several = self.number > 1
        return np.where(several, found, np.median(found[several])).astype(np.float32)


def score_texts(
    encoder: BiEncoder | CrossEncoder, first: list[str], second: list[str], inference: Inference
) -> np.ndarray:
    """Return the scores of a few pairs, float32 [pairs]: similarities, or a cross-encoder's mean of both orders."""
    if encoder.kind == "bi":
        vectors = [embed_texts(encoder, texts, inference, side) for side, texts in enumerate((first, second))]
        places = np.arange(len(first))
        return similarities(np.concatenate(vectors), places, places + len(first), encoder.similarity)
    orders = [encoder.activate(inference.run_texts(encoder, *pair)) for pair in ((first, second), (second, first))]
    return torch.stack(orders).mean(dim=0).numpy()
