"""A running mean of the weights, which is often a better model than the weights of any one step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of a model's trained parameters.

    In the first steps the mean is shorter, (1 + step) / (10 + step), so that it forgets the weights that training
    began with.

    Args:
        model: as Accelerate prepared it, whole on every process.
        decay: weight of the mean so far in each step, below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.means = [parameter.detach().clone() for parameter in self.parameters]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.means, [parameter.detach() for parameter in self.parameters], None)
        self.steps += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean weights inside, and its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(own)

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint: the means and the number of steps."""
        return {"means": [mean.cpu() for mean in self.means], "steps": self.steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """What `state_dict` gave."""
        for mean, saved in zip(self.means, state["means"], strict=True):
            mean.copy_(saved)
        self.steps = state["steps"]
