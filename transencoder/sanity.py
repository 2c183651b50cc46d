"""Numbers that say nothing: a training that breaks down, an encoder that tells no text from another, known answers."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from transencoder.errors import BrokenRun, InputError
from transencoder.runtime.accelerator import log

if TYPE_CHECKING:
    from transencoder.encoders import BiEncoder, CrossEncoder

# What every encoder has to tell apart. The first two begin alike, which is all that a decoder's first token sees.
TEXTS = ["a", "a day at the sea, and it rains", "what is the time"]
# Shares of the largest output: below the first, two are the same; above the second, it is not padding's rounding.
SAME, ROUNDING = 1e-6, 1e-3
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


@torch.no_grad()
def check_outputs(name: str, encoder: "BiEncoder | CrossEncoder") -> None:
    """Let an encoder read a few texts, and look at what it makes of them; it is in evaluation mode afterwards.

    Raises:
        InputError: outputs that are not finite, that are the same for two texts, or that depend on the padding.
    """
    encoder.eval()
    columns = [TEXTS, TEXTS[1:] + TEXTS[:1]][: 1 if encoder.kind == "bi" else 2]
    for side in range(len(set(encoder.prompts))):
        preprocessor = encoder.preprocessor(side)
        together, alone = (
            encoder(**preprocessor.batch(*(column[:rows] for column in columns))).reshape(rows, -1)
            for rows in (len(TEXTS), 1)
        )
        if not together.isfinite().all():
            raise InputError(f"{name}: gives numbers that are not finite (NaN or inf); see the values in config.json")
        size, apart = together.abs().max(), (together - together.roll(1, dims=0)).abs().amax(dim=1)
        # A cross-encoder that collapsed in its training is warned of by its scores, and a run goes on.
        same = apart.max() == 0 if encoder.kind == "cross" else apart.min() <= SAME * size
        if same:
            raise InputError(
                f"{name}: gives different texts the same output; a decoder needs --pooling lasttoken or mean, and any "
                "other model is not whole: download or train it again"
            )
        if (together[:1] - alone).abs().max() > ROUNDING * size:
            raise InputError(f"{name}: its output for a text depends on the padding; see pad_token and pad_token_id")


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
