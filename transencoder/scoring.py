"""Encoders and pairs -> scores, sharded over processes; a bi-encoder sees each sentence once."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from transencoder.data.tables import MAPPED_BYTES, PAIRS, RANDOM_ROWS, SENTENCES, release_pages
from transencoder.data.tokens import tokenize, turned, unique_sentences
from transencoder.embeddings import unit, write_vectors
from transencoder.encoders import BiEncoder, CrossEncoder, load_encoder
from transencoder.inference import each_part, run_sharded
from transencoder.lexical import lexical_scores
from transencoder.runtime.optional import load_optional
from transencoder.runtime.shards import Parts
from transencoder.sanity import check_scores

COSINE_ROWS = RANDOM_ROWS // 2  # pairs whose embeddings are gathered at a time


class PreparedPairs:
    """Pairs tokenised for one encoder, so that scoring them again (dev evaluation) costs forward passes only.

    Args:
        pairs: columns sentence1 and sentence2.
    """

    def __init__(self, encoder: BiEncoder | CrossEncoder, pairs: datasets.Dataset):
        self.size = len(pairs)
        if encoder.kind == "bi":
            sentences, (self.first, self.second) = unique_sentences(pairs)
            self.tokens = tokenize(sentences, SENTENCES, encoder.tokenizer, encoder.max_length)
        else:
            self.tokens = tokenize(pairs, PAIRS, encoder.tokenizer, encoder.max_length)


def score_prepared(
    model: nn.Module,
    prepared: PreparedPairs,
    accelerator: Accelerator,
    batch_tokens: int | None,
    title: str = "Scoring",
) -> np.ndarray:
    """Scores of prepared pairs.

    Args:
        model: a bi- or cross-encoder, as it is or as `accelerator.prepare` returned it.
        batch_tokens: tokens, padding included, in one forward pass; None chooses what suits the hardware.
    Returns:
        float32 [pairs], the same on every process; see `as_scores`.
    """
    encoder = accelerator.unwrap_model(model)
    training = model.training
    model.eval()
    rows = np.arange(len(prepared.tokens))
    outputs = run_sharded(model, encoder, prepared.tokens, rows, accelerator, batch_tokens, title)
    model.train(training)
    return as_scores(encoder, prepared, outputs)


def as_scores(encoder: BiEncoder | CrossEncoder, prepared: PreparedPairs, outputs: torch.Tensor) -> np.ndarray:
    """Scores from what the encoder made of the prepared rows.

    Args:
        outputs: float32 [sentences, d], embeddings, or [pairs], logits.
    Returns:
        float32 [pairs]: cosines in [-1, 1], or sigmoids of the logits, taken in float32 because half precision ties
        the scores near 0 and 1.
    """
    if encoder.kind == "cross":
        return outputs.sigmoid().cpu().numpy()
    return cosines(unit(outputs.cpu().numpy()), prepared.first, prepared.second)


def cosines(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of vectors, block by block.

    Args:
        vectors: float32 [sentences, d], of unit length; may be memory-mapped.
        first, second: int [pairs], rows of `vectors`.
    Returns:
        float32 [pairs].
    """
    found = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(found), COSINE_ROWS):
        rows = slice(start, start + COSINE_ROWS)
        if vectors.nbytes > MAPPED_BYTES:  # looking for pages to give back takes as long as many cosines
            release_pages()
        found[rows] = (vectors[first[rows]] * vectors[second[rows]]).sum(axis=1)
    return found


def score_in_parts(
    encoder: BiEncoder | CrossEncoder,
    pairs: datasets.Dataset,
    accelerator: Accelerator,
    batch_tokens: int | None,
    parts: Parts,
    label: str,
    title: str,
) -> np.ndarray:
    """As `score_prepared`, for any number of pairs: in memory is a number for each, all else lies on disk.

    Args:
        parts: where what is done is kept, under the name `label`, and a bi-encoder's embeddings.
    """
    if encoder.kind == "bi":
        sentences, places = unique_sentences(pairs)
        path = parts.folder / f"{label}.vec"
        widths = [encoder.backbone.config.hidden_size]
        vectors = write_vectors([encoder], widths, sentences, path, accelerator, batch_tokens, parts, [title])
        scores = cosines(vectors, *places)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            path.unlink()
        return scores
    tokens = tokenize(pairs, PAIRS, encoder.tokenizer, encoder.max_length)
    scores, row = np.empty(len(pairs), dtype=np.float32), 0
    for part in each_part(encoder, tokens, accelerator, batch_tokens, title, parts, label):
        scores[row : row + len(part)] = torch.from_numpy(part).sigmoid()
        row += len(part)
    return scores


@dataclass
class Teachers:
    """Encoders whose mean score is taken. This mean is all there is to mutual distillation.

    Args:
        names: folders or Hub ids of bi- and cross-encoders.
        weights: of the encoders in the mean, in any unit; equal by default.
        pooling: of those that are plain language models.
        both_orders: a cross-encoder's score is the mean of those of (a, b) and (b, a).
        lexical_weight: share of `lexical_scores` in the score.
    """

    names: list[str]
    weights: list[float] | None = None
    pooling: str | None = None
    both_orders: bool = False
    lexical_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.lexical_weight:
            load_optional("sklearn.feature_extraction.text")  # before an encoder is loaded

    def shares(self) -> np.ndarray:
        """The weights as parts of one."""
        weights = np.ones(len(self.names)) if self.weights is None else np.asarray(self.weights)
        return weights / weights.sum()


def score_with(
    teachers: Teachers,
    sets: list[datasets.Dataset],
    accelerator: Accelerator,
    batch_tokens: int | None,
    parts: Parts | None = None,
) -> list[np.ndarray]:
    """Mean scores of the encoders, which are loaded one after another.

    Args:
        sets: sets of pairs.
        parts: where what is done is kept, for a single set.
    Returns:
        For each set, float32 [pairs].
    """
    totals = [np.zeros(len(pairs)) for pairs in sets]
    for number, (name, share) in enumerate(zip(teachers.names, teachers.shares(), strict=True)):
        encoder = load_encoder(name, teachers.pooling).to(accelerator.device).eval()
        title = f"Scoring with {Path(name).name}"
        for total, pairs in zip(totals, sets, strict=True):
            orders = [pairs, turned(pairs)] if teachers.both_orders and encoder.kind == "cross" else [pairs]
            for turn, order in enumerate(orders):
                if parts is None:
                    scores = score_prepared(encoder, PreparedPairs(encoder, order), accelerator, batch_tokens, title)
                else:
                    label = f"encoder-{number}-{turn}"
                    scores = score_in_parts(encoder, order, accelerator, batch_tokens, parts, label, title)
                check_scores(name, scores)
                total += share / len(orders) * scores
    weight = teachers.lexical_weight
    if weight:
        totals = [(1 - weight) * total + weight * lexical_scores(p) for total, p in zip(totals, sets, strict=True)]
    return [total.astype(np.float32) for total in totals]
