"""The losses of the three steps, with those of the paper's ablation, and the targets of step 2.

All compute in float32, whatever the autocast type. A new loss is an entry in a registry at the end of this file.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from scipy import special
from torch import nn

from transencoder.config.options import Choice


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the contrastive loss of step 1 (paper section 2.1): each row of `first` against all rows of `second`.

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
    """Compute `info_nce` of a batch that may come in several micro-batches: the cached contrastive loss.

    In-batch negatives need the embeddings of the whole batch. So a step of micro-batches is computed twice (GradCache,
    Gao et al. 2021). The first pass has no gradients; it gives the loss and its derivative by every embedding. The
    second pass gives the derivatives by the weights, each micro-batch with the dropout of the first pass.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.cached: list[tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]] = []

    def look_ahead(self, model: nn.Module, micro_batches: list[dict[str, Any]]) -> None:
        """Compute the loss of the whole batch; the calls that follow, one for each micro-batch, draw on it."""
        random_states, outputs = [], []
        for micro_batch in micro_batches:
            random_states.append(_random_state(micro_batch["inputs"]["input_ids"].device))
            with torch.no_grad():
                outputs.append(model(**micro_batch["inputs"]))
        views = [output.requires_grad_() for output in outputs]
        first, second = zip(*(view.chunk(2) for view in views), strict=True)
        loss = info_nce(torch.cat(first), torch.cat(second), self.temperature)
        gradients = torch.autograd.grad(loss, views)
        # Backward takes the mean over the micro-batches.
        self.cached = [
            (state, gradient * len(micro_batches), loss.detach())
            for state, gradient in zip(random_states, gradients, strict=True)
        ]

    def __call__(self, model: nn.Module, micro_batch: dict[str, Any]) -> torch.Tensor:
        """Return the mean loss of this process's share of the batch; its gradient is that of `micro_batch`."""
        if not self.cached:
            first, second = model(**micro_batch["inputs"]).chunk(2)
            return info_nce(first, second, self.temperature)
        random_state, gradient, loss = self.cached.pop(0)
        _set_random_state(random_state, gradient.device)
        product = (model(**micro_batch["inputs"]) * gradient).sum()
        return loss + product - product.detach()


class QueueLoss:
    """Compute how far the similarities of a sentence to a queue of others are from a teacher's (ConGen, 2022).

    Each encoder's similarities become a distribution over the queue. What is taken is the Kullback-Leibler divergence
    of the student's from the teacher's. The queue is the same in the whole training, and its vectors are the teacher's
    in both: the student learns where it puts the sentence among them.

    Args:
        queue: float [queue, d], the teacher's vectors, of unit length.
        reduced: float [queue, w], the same with as many dimensions as the student has, of unit length.
        temperature, teacher_temperature: divide the student's and the teacher's cosines.
    """

    def __init__(self, queue: torch.Tensor, reduced: torch.Tensor, temperature: float, teacher_temperature: float):
        self.queue, self.reduced = queue, reduced
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the mean over a batch of `contrastive.TeacherViews`."""
        vectors = F.normalize(model(**batch["inputs"]).float(), dim=-1)
        if self.queue.device != vectors.device:
            self.queue, self.reduced = self.queue.to(vectors.device), self.reduced.to(vectors.device)
        # A sentence of the queue is not compared with itself: nothing else would count.
        own = batch["places"][:, None] == torch.arange(len(self.queue), device=vectors.device)
        student, teacher = (
            (similarities / temperature).masked_fill(own, -1e4).log_softmax(dim=-1)
            for similarities, temperature in (
                (vectors @ self.reduced.T, self.temperature),
                (batch["teacher"] @ self.queue.T, self.teacher_temperature),
            )
        )
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the random state that dropout on `device` depends on."""
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_random_state(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def bce_targets(scores: np.ndarray, rescale: str, negatives: str) -> np.ndarray:
    """Return a teacher's scores as targets of step 2, which must lie in [0, 1].

    Args:
        scores: float [n], cosines.
        rescale: a key of `RESCALINGS`.
        negatives: a key of `NEGATIVES`.
    """
    return NEGATIVES[negatives].function(RESCALINGS[rescale].function(scores))


def as_they_are(scores: np.ndarray) -> np.ndarray:
    """Return `scores` unchanged."""
    return scores


def logistic(scores: np.ndarray) -> np.ndarray:
    """Return the sigmoid of twice the standard score, in the same order as `scores` (float [n]).

    Cosines fill a narrow range around an arbitrary middle, and a student spends its first steps on finding it. Here
    the middle is 0.5, and about 95 % of normally distributed scores lie between 0.02 and 0.98.
    """
    if np.ptp(scores) == 0:
        return scores
    return special.expit(2 * (scores - scores.mean()) / scores.std())


def shifted(scores: np.ndarray) -> np.ndarray:
    """Map the lowest cosine to 0 and keep 1 at 1, linearly; without negative cosines change nothing.

    The paper takes the raw cosine and does not say what becomes of a negative one. Binary cross-entropy has no minimum
    there: the logit would be pushed to minus infinity.
    """
    lowest = min(float(scores.min()), 0.0)
    return clipped((scores - lowest) / (1.0 - lowest))


def clipped(scores: np.ndarray) -> np.ndarray:
    """Make every negative cosine 0."""
    return scores.clip(0.0, 1.0)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Return where each score stands among all: float64 [n], above 0 and below 1; equal scores have the same rank."""
    from scipy import stats  # its import takes a second

    return (stats.rankdata(scores) - 0.5) / len(scores)


def standard_scores(scores: np.ndarray) -> np.ndarray:
    """Return the distances from the mean, in standard deviations: float64 [n]; 0 where all are equal."""
    return (scores - scores.mean(dtype=np.float64)) / (scores.std(dtype=np.float64) or 1.0)


def soft_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of step 2 (paper section 2.2): binary cross-entropy of the logit and the bi-encoder's score.

    Args:
        logits: float [n].
        targets: float [n], in [0, 1]; see `bce_targets`.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def soft_mse(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the ablation of step 2: mean squared error, with which a student copies its teacher's errors too.

    Args:
        logits: float [n].
        targets: float [n], in [0, 1].
    """
    return F.mse_loss(logits.float().sigmoid(), targets.float())


def margin_mse(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of the differences between pairs: of their scores, and of their targets.

    How high the scores lie as a whole does not matter to it.

    Args:
        logits: float [n], whose sigmoids are the scores.
        targets: float [n], in [0, 1].
    Returns:
        Scalar, the mean over all two different pairs of the batch; 0 where there is one.
    """
    errors = logits.float().sigmoid() - targets.float()
    return 2 * errors.var(correction=0) * len(errors) / max(len(errors) - 1, 1)


def pairwise_logistic(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the logistic loss of the order of every two pairs (RankNet), weighted by how far their targets differ.

    Args:
        logits: float [n].
        targets: float [n], on any scale.
    Returns:
        Scalar, the weighted mean over all two pairs of the batch.
    """
    weights = (targets[:, None] - targets).float().clamp(min=0)
    terms = F.softplus(logits.float() - logits.float()[:, None])
    return (weights * terms).sum() / weights.sum().clamp(min=1e-6)


def cosine_mse(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return the loss of step 3 (paper section 2.3): mean squared error of the cosine and the cross-encoder's score.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n], in [0, 1].
    """
    return F.mse_loss(F.cosine_similarity(first.float(), second.float(), dim=-1), scores.float())


def cosine_bce(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return the ablation of step 3: binary cross-entropy, with the cosine as the logit.

    A cosine reaches from -1 to 1, its sigmoid from 0.27 to 0.73 only: most scores are out of reach, and the paper
    finds that this does not converge.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n]; a cosine below 0 counts as 0.
    """
    cosines = F.cosine_similarity(first.float(), second.float(), dim=-1)
    return F.binary_cross_entropy_with_logits(cosines, scores.float().clamp(0.0, 1.0))


def scaled_bce(
    first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor, scaling: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Return binary cross-entropy with a logit that reaches every score: scale x cosine + bias.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n]; a cosine below 0 counts as 0.
        scaling: float [2], the logarithm of the scale, and the bias; see `Scaling`.
    """
    cosines = F.cosine_similarity(first.float(), second.float(), dim=-1)
    logits = scaling[0].exp() * cosines + scaling[1]
    return F.binary_cross_entropy_with_logits(logits, scores.float().clamp(0.0, 1.0))


def cosent(
    first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor, temperature: float, **_: Any
) -> torch.Tensor:
    """Return CoSENT (Su 2022): the order of the cosines, as Spearman's correlation sees it, and not their values.

    log(1 + sum over all two pairs of exp((cosine of the lower - cosine of the higher score) / temperature)).

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n], on any scale; equal ones are not compared.
    """
    cosines = F.cosine_similarity(first.float(), second.float(), dim=-1) / temperature
    in_order = scores[:, None] <= scores  # of the row's pair and the column's, which should be the lower one
    terms = (cosines - cosines[:, None]).masked_fill(in_order, -torch.inf).flatten()
    return torch.cat([terms.new_zeros(1), terms]).logsumexp(dim=0)


def listwise(
    first: torch.Tensor,
    second: torch.Tensor,
    scores: torch.Tensor,
    temperature: float,
    anchors: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of the cosines of a first sentence's pairs from their scores.

    Both become a distribution over these pairs, by a softmax with the temperature.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n].
        anchors: int [n], equal for pairs with the same first sentence.
    Returns:
        Scalar, the mean over the pairs that are not alone with their first sentence.
    """
    apart = anchors[:, None] != anchors

    def log_shares(values: torch.Tensor) -> torch.Tensor:
        rows = (values.float() / temperature).expand(len(values), -1).masked_fill(apart, -torch.inf)
        return rows.log_softmax(dim=-1).masked_fill(apart, 0.0)

    cosines = F.cosine_similarity(first.float(), second.float(), dim=-1)
    terms = F.kl_div(log_shares(cosines), log_shares(scores), log_target=True, reduction="none").sum(dim=-1)
    return terms.sum() / ((~apart).sum(dim=-1) > 1).sum().clamp(min=1)


def contrastive(
    first: torch.Tensor,
    second: torch.Tensor,
    scores: torch.Tensor,
    temperature: float,
    above: float,
    anchors: torch.Tensor,
    others: torch.Tensor,
) -> torch.Tensor:
    """Return InfoNCE over the pairs that a teacher finds alike: the second sentences of the batch are candidates.

    Args:
        first, second: float [n, d], embeddings of the two sentences of n pairs.
        scores: float [n].
        above: a pair counts whose score is higher.
        anchors, others: int [n], which sentences they are, of both sides together: a second sentence is no candidate
            for a pair that has it, too, or shares a first one with its own pair.
    Returns:
        Scalar, the mean over these pairs; 0 where there is none.
    """
    first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    own = torch.eye(len(first), dtype=torch.bool, device=first.device)
    shared = (anchors[:, None] == anchors) | (others[:, None] == others) | (anchors[:, None] == others)
    shared &= ~own
    cosines = (first @ second.T).masked_fill(shared, -torch.inf)
    terms = -(cosines / temperature).log_softmax(dim=-1).diagonal()
    alike = scores > above
    return (terms * alike).sum() / alike.sum().clamp(min=1)


class Scaling(nn.Module):
    """Two numbers that a bi-encoder learns in training, for `scaled_bce`; as its head they are never saved.

    They stand behind every embedding, so that every backend trains them as it does the model. The first cosines of 0.5
    become scores of 0.5.
    """

    LEARNING_RATE = 1e-2  # at a language model's they would stay where they are

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([math.log(10.0), -5.0]))
        self.values.learning_rate = self.LEARNING_RATE

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return [n, d + 2] for [n, d]."""
        return torch.cat([embeddings, self.values.expand(len(embeddings), 2)], dim=1)


class CosineLoss:
    """Compute the loss of step 3: one of `BI_LOSSES`, and a share of `contrastive`.

    What compares pairs with one another does so within the micro-batch of one process.

    Args:
        name: a key of `BI_LOSSES`.
        temperature: of the losses that have one.
        contrastive_share: from 0 to 1; the other loss has the rest.
        above: as of `contrastive`.
    """

    def __init__(self, name: str, temperature: float, contrastive_share: float = 0.0, above: float = 0.0):
        self.name, self.temperature, self.share, self.above = name, temperature, contrastive_share, above

    def head(self) -> nn.Module | None:
        """Return what the loss puts on the bi-encoder in training."""
        return Scaling() if self.name == "bce_scaled" else None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the mean loss of a batch of `batches.SentencePairs`."""
        first, second = model(**batch["inputs"]).chunk(2)
        of_batch = {"temperature": self.temperature, "anchors": batch["anchors"]}
        if self.name == "bce_scaled":
            first, second, of_batch["scaling"] = first[:, :-2], second[:, :-2], first[0, -2:]
        loss = BI_LOSSES[self.name].function(first, second, batch["scores"], **of_batch)
        if self.share:
            where = (self.temperature, self.above, batch["anchors"], batch["others"])
            loss = (1 - self.share) * loss + self.share * contrastive(first, second, batch["scores"], *where)
        return loss


BCE, MSE = "binary cross-entropy with soft targets", "mean squared error"

# Step 1: a loss takes the model and a batch of `contrastive.py`.
CONTRASTIVE_LOSSES = {
    "info_nce": Choice(
        InfoNCE,
        "two views of a sentence are close, others far",
        "two views of a sentence are close, and other sentences far (contrastive learning with InfoNCE)",
    ),
    "teacher": Choice(
        QueueLoss,
        "a sentence is as similar to others as it is to --teacher",
        "a sentence is as similar to others as a teacher finds it (divergence of two distributions over a queue)",
    ),
}

# Step 2: a loss takes the logits and the targets, float [n] both.
CROSS_LOSSES = {
    "bce": Choice(soft_bce, "binary cross-entropy, the paper's", BCE),
    "mse": Choice(soft_mse, "mean squared error, the paper's ablation", MSE),
    "margin_mse": Choice(margin_mse, "MSE of the differences between pairs", "mean squared error of margins"),
    "pairwise_logistic": Choice(pairwise_logistic, "the order of every two pairs", "pairwise logistic loss"),
}
RESCALINGS = {
    "none": Choice(as_they_are, "as they are"),
    "logistic": Choice(logistic, "sigmoid of twice the standard score, which spreads them"),
}
SCALES = {
    "none": Choice(as_they_are, "scores as they are"),
    "rank": Choice(ranks, "a score's rank among all, from 0 to 1"),
    "standard": Choice(
        standard_scores,
        "distance from the mean in standard deviations; the mean of all becomes logistic, as --rescale",
    ),
}
NEGATIVES = {
    "shift": Choice(shifted, "map [lowest, 1] to [0, 1], so that no difference is lost"),
    "clip": Choice(clipped, "they become 0"),
}

# Step 3: a loss takes the embeddings of both sentences, float [n, d], the scores, float [n], and by name what else a
# `CosineLoss` has.
BI_LOSSES = {
    "mse": Choice(cosine_mse, "mean squared error, the paper's", MSE),
    "bce": Choice(cosine_bce, "binary cross-entropy, the paper's ablation", BCE),
    "bce_scaled": Choice(scaled_bce, "the same with a learned scale and bias", f"{BCE}, a learned scale and bias"),
    "cosent": Choice(cosent, "the order of every two pairs", "CoSENT"),
    "listwise": Choice(
        listwise, "KL divergence over the pairs with the same first sentence", "listwise Kullback-Leibler divergence"
    ),
}
