"""Numbers that say nothing: a training that breaks down, an encoder that tells no pair from another, known answers."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from transencoder.errors import BrokenRun
from transencoder.runtime.accelerator import log

# Standard deviation of scores below which they are nearly the same. Cosines of embeddings that are alike but for the
# rounding of bfloat16 have one of 1e-6; those of a trained encoder, of a few hundredths and more.
ALIKE = 1e-4


class LossWatch:
    """The losses of the last steps, kept on the device: looking at them costs a synchronisation, noting them does not.

    Args:
        size: how many steps are remembered; it must be looked at as often.
    """

    def __init__(self, accelerator: Accelerator, size: int):
        self.accelerator = accelerator
        self.losses = torch.zeros(size, device=accelerator.device)

    def note(self, step: int, loss: torch.Tensor) -> None:
        """Remember the loss (a scalar on the device) of `step`, counted from 1."""
        self.losses[(step - 1) % len(self.losses)] = loss

    def look(self, step: int, *others: torch.Tensor) -> tuple[tuple[int, float] | None, list[float]]:
        """Return the first of the last steps up to `step` whose loss is not finite, and that loss; None where all are.

        All processes call it. The second value are the means of the scalars `others` over the processes, which come
        along at no cost.
        """
        together = torch.cat([self.losses, *(other.reshape(1).to(self.losses) for other in others)])
        means = self.accelerator.reduce(together, "mean").tolist()
        losses = means[: len(self.losses)]
        last = range(max(step - len(losses), 0) + 1, step + 1)
        bad = next((number for number in last if not math.isfinite(losses[(number - 1) % len(losses)])), None)
        found = None if bad is None else (bad, losses[(bad - 1) % len(losses)])
        return found, means[len(self.losses) :]


def broken_weights(model: nn.Module) -> torch.Tensor:
    """Count this process's weights' tensors that hold NaN or infinite values: a scalar on the device."""
    return torch.stack([(~part.isfinite().all()).float() for part in _parts_here(model)]).sum()


@torch.no_grad()
def _parts_here(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield each weight, or the part of it that this process holds (DeepSpeed ZeRO-3, FSDP)."""
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter).detach()
        yield part.to_local() if isinstance(part, DTensor) else part


def check_scores(name: str, scores: np.ndarray) -> None:
    """Stop at scores that are no numbers, and say it where they tell no pair from another.

    Args:
        name: of the encoder.
        scores: float [pairs].
    Raises:
        BrokenRun: a score is NaN or infinite.
    """
    (broken,) = np.nonzero(~np.isfinite(scores))
    if len(broken):
        row = broken[0]
        raise BrokenRun(
            f"{name}: the score of pair {row + 1} is {scores[row]} ({len(broken)} such scores in {len(scores)}); "
            "try --mixed_precision no"
        )
    if len(scores) > 1 and scores.std() < ALIKE:
        log(
            f"warning: {name} gives all of {len(scores)} pairs nearly the same score ({scores.mean():.4f}, standard "
            f"deviation {scores.std():.1g}): it may have collapsed; rounding can reorder them, and they teach little"
        )
