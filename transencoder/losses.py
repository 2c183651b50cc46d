"""The three losses of the method, and what the paper's ablation puts in their places.

All compute in float32, whatever the autocast type.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from scipy import special
from torch import nn


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Contrastive loss of step 1 (paper section 2.1): row i of `second` against its other rows, for row i of `first`.

    The rows of `second` of every process are candidates, and gradients flow back to the process they came from. With
    the mean over processes that data-parallel training takes, the gradient is that of one process with the whole
    batch.

    Args:
        first, second: float [n, d], two views of the same n sentences; n is the same on every process.
        temperature: divides the cosines.
    Returns:
        Scalar, the mean over this process's n rows.
    """
    first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    offset = 0
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        offset = dist.get_rank() * len(first)
        second = torch.cat(torch.distributed.nn.functional.all_gather(second.contiguous()))
    targets = torch.arange(offset, offset + len(first), device=first.device)
    return F.cross_entropy(first @ second.T / temperature, targets)


class InfoNCE:
    """`info_nce` as the loss of a training step whose batch may come in several pieces (gradient accumulation).

    In-batch negatives need the embeddings of the whole batch. So a step in pieces is computed twice (GradCache, Gao et
    al. 2021): once without gradients, for the loss and its derivative by every embedding; then piece by piece, each
    with the dropout it had the first time, for the derivatives by the weights.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.cached: list[tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]] = []

    def look_ahead(self, model: nn.Module, pieces: list[dict[str, Any]]) -> None:
        """Compute the loss of the whole batch; the calls that follow, one for each piece, draw on it."""
        random_states, outputs = [], []
        for piece in pieces:
            random_states.append(_random_state(piece["inputs"]["input_ids"].device))
            with torch.no_grad():
                outputs.append(model(**piece["inputs"]))
        views = [output.requires_grad_() for output in outputs]
        first, second = zip(*(view.chunk(2) for view in views), strict=True)
        loss = info_nce(torch.cat(first), torch.cat(second), self.temperature)
        gradients = torch.autograd.grad(loss, views)
        # Backward takes the mean over the pieces.
        self.cached = [
            (state, gradient * len(pieces), loss.detach())
            for state, gradient in zip(random_states, gradients, strict=True)
        ]

    def __call__(self, model: nn.Module, piece: dict[str, Any]) -> torch.Tensor:
        """Mean loss of this process's part of the batch, with the gradient of `piece`'s share."""
        if not self.cached:
            first, second = model(**piece["inputs"]).chunk(2)
            return info_nce(first, second, self.temperature)
        random_state, gradient, loss = self.cached.pop(0)
        _set_random_state(random_state, gradient.device)
        share = (model(**piece["inputs"]) * gradient).sum()
        return loss + share - share.detach()


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """What dropout on `device` depends on."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_random_state(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def bce_targets(scores: np.ndarray, negatives: str) -> np.ndarray:
    """Cosines as targets of binary cross-entropy, which must lie in [0, 1].

    The paper takes the raw cosine and does not say what becomes of a negative one. Its loss has no minimum: the logit
    would be pushed to minus infinity.

    Args:
        scores: float [n], cosines.
        negatives: "shift" maps the lowest cosine to 0 and leaves 1 at 1, linearly, so that every difference between
            two pairs is kept; "clip" makes every negative cosine 0. Without negative cosines both change nothing.
    """
    if negatives == "shift":
        lowest = min(float(scores.min()), 0.0)
        scores = (scores - lowest) / (1.0 - lowest)
    return scores.clip(0.0, 1.0)


def rescaled(scores: np.ndarray, how: str) -> np.ndarray:
    """A teacher's scores on another scale, in the same order.

    Cosines fill a narrow range around an arbitrary middle, and a student spends its first steps on finding it.

    Args:
        scores: float [n].
        how: "none"; or "logistic": sigmoid of twice the standard score, so that the middle is 0.5 and about 95 % of
            normally distributed scores lie between 0.02 and 0.98.
    """
    if how == "none" or np.ptp(scores) == 0:
        return scores
    return special.expit(2 * (scores - scores.mean()) / scores.std())


def soft_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of step 2 (paper section 2.2): binary cross-entropy of the logit against the bi-encoder's score.

    Args:
        logits: float [n].
        targets: float [n], in [0, 1]; see `bce_targets`.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def soft_mse(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Ablation of step 2: mean squared error of the score, with which a student copies its teacher's errors too.

    Args:
        logits: float [n].
        targets: float [n], in [0, 1].
    """
    return F.mse_loss(logits.float().sigmoid(), targets.float())


def cosine_mse(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Loss of step 3 (paper section 2.3): mean squared error of the cosine against the cross-encoder's score.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n], in [0, 1].
    """
    return F.mse_loss(F.cosine_similarity(first.float(), second.float(), dim=-1), scores.float())


def cosine_bce(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Ablation of step 3: binary cross-entropy, with the cosine as the logit.

    A cosine reaches from -1 to 1, its sigmoid from 0.27 to 0.73 only: most scores are out of reach, and the paper
    finds that this does not converge.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n]; a cosine below 0 counts as 0.
    """
    cosines = F.cosine_similarity(first.float(), second.float(), dim=-1)
    return F.binary_cross_entropy_with_logits(cosines, scores.float().clamp(0.0, 1.0))


CROSS_LOSSES = {"bce": soft_bce, "mse": soft_mse}
BI_LOSSES = {"mse": cosine_mse, "bce": cosine_bce}
