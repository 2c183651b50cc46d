"""A training step as CUDA graphs: recorded once for each shape of a batch, and replayed from then on.

At the paper's batch sizes a GPU waits for Python, which launches some hundred kernels a step. A replay is one launch.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from transencoder.runtime.accelerator import log
from transencoder.runtime.backends import backend_name

WARM_UP = 3  # steps of a shape before it is recorded, in which the libraries choose and load their kernels
Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class CUDAGraphs:
    """Records steps on the current device; the recordings share their memory, as one is replayed at a time."""

    failed: list[torch.cuda.CUDAGraph] = []  # kept, as PyTorch's allocator goes on asking them

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step eagerly, on the stream that it will be recorded on; return what it returns."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = step()
        current.wait_stream(self.stream)
        return outputs

    def record(self, step: Step) -> Step:
        """Record a step, which computes nothing; return what takes it, with outputs that the next one overwrites.

        Raises:
            RuntimeError: something in it cannot be recorded, or there is no memory for it.
        """
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        random_state = generator.clone_state()
        try:
            # Where recording fails, `graph` does not leave its stream; the context around it does.
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, self.pool, self.stream):
                outputs = step()
        except RuntimeError:
            generator.graphsafe_set_state(random_state)  # the other one waits for the end of the recording
            self.failed.append(graph)
            raise

        def replay() -> tuple[torch.Tensor, torch.Tensor]:
            graph.replay()
            return outputs

        return replay


class RecordedStep:
    """A whole training step of one process: forward pass, loss, backward pass, clipping, optimizer.

    The first `WARM_UP` batches of a shape are steps of the training like any other. The next one is recorded, and it
    and all that follow are copied into the recorded tensors and replayed. Dropout goes on where it was, as the graphs
    know the random generator. What cannot be recorded is computed eagerly from then on, which one line says.

    Args:
        model, loss_of: as of the Trainer.
        optimizer: the plain one. Between steps its groups are as they always are, so that the schedule and the
            checkpoints need not know of this.
        graphs: `CUDAGraphs`, or what takes its place where there is no GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Any], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        graphs: Any,
    ):
        self.model, self.loss_of, self.optimizer = model, loss_of, optimizer
        self.max_grad_norm, self.graphs = max_grad_norm, graphs
        device = next(model.parameters()).device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.seen: Counter[Any] = Counter()
        self.recorded: dict[Any, tuple[list[torch.Tensor], Step]] = {}

    def __call__(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step with `batch` (tensors on the device, in dicts); return the loss and the gradients' norm."""
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])  # what is recorded reads the learning rate from the device
        tensors = tree_leaves(batch)
        shape = tuple(tensor.shape for tensor in tensors)
        if self.graphs is not None and self.seen[shape] == WARM_UP:
            self.record(shape, batch)
        self.seen[shape] += 1
        if shape in self.recorded:
            inputs, replay = self.recorded[shape]
            for recorded, new in zip(inputs, tensors, strict=True):
                recorded.copy_(new, non_blocking=True)
            return replay()
        if self.graphs is not None:
            return self.graphs.warm_up(lambda: self.compute(batch))
        return self.compute(batch)

    def record(self, shape: Any, batch: Any) -> None:
        """Record the step of a shape, or give up recording."""
        inputs = tree_map(torch.clone, batch)
        try:
            self.recorded[shape] = tree_leaves(inputs), self.graphs.record(lambda: self.compute(inputs))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            log(f"Training goes on without CUDA graphs, more slowly: a step cannot be recorded ({reason})")
            self.graphs = None
            self.recorded.clear()
            self.optimizer.zero_grad()  # gradients of half a recording

    def compute(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step, eagerly or while it is recorded."""
        loss = self.loss_of(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm, foreach=True)
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            self.optimizer.step()
        finally:
            for group, rate in zip(groups, before, strict=True):
                group.update(lr=rate, capturable=False)
        self.optimizer.zero_grad()
        return loss.detach(), norm


def cuda_graphs(accelerator: Accelerator, micro_batches: int, loss_of: Any) -> CUDAGraphs | None:
    """Return what records steps; None on a CPU, and where something is in the way, which one line says.

    Args:
        micro_batches: gradient accumulation steps.
        loss_of: a loss that keeps something in Python from step to step says so by `is_recordable = False`.
    """
    if accelerator.device.type != "cuda":
        return None
    reasons = {
        f"{accelerator.num_processes} processes": accelerator.num_processes > 1,
        backend_name(accelerator): backend_name(accelerator) != "plain",
        "gradient accumulation": micro_batches > 1,
        "fp16, which scales the loss": accelerator.scaler is not None,
        "a loss with a memory": not getattr(loss_of, "is_recordable", True),
    }
    obstacles = [reason for reason, holds in reasons.items() if holds]
    if obstacles:
        log(f"Training without CUDA graphs, which do not go with {' and '.join(obstacles)}")
    return None if obstacles else CUDAGraphs()
