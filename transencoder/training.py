"""The training loop: one for all three stages. What differs between them is the data and the loss."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce, set_seed
from torch import nn
from torch.utils.data import Dataset
from transformers import get_scheduler

from transencoder.batches import LengthWindowSampler, make_loader
from transencoder.config.arguments import TrainingArguments
from transencoder.data.tasks import Task
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.errors import BrokenRun
from transencoder.evaluation import DevSet, shown_value
from transencoder.runtime.accelerator import log, log_idle_cores, progress_bar, start_trackers
from transencoder.runtime.backends import backend_name, precision, set_batch
from transencoder.runtime.checkpoints import Checkpoints, check_sealed, seal
from transencoder.runtime.cuda_graphs import RecordedStep, cuda_graphs
from transencoder.runtime.files import replacing
from transencoder.runtime.records import place
from transencoder.runtime.signals import StopSignal, stop_here
from transencoder.runtime.speed import keep_freed_memory, release_freed_memory, use_cpu_dropout
from transencoder.sanity import LossWatch, broken_weights
from transencoder.selection import select_by

LOG_STEPS = 10
Batch = dict[str, Any]
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]  # with a memory: see `cuda_graphs`


@dataclass
class Progress:
    """How far a run is, and what it has seen.

    Args:
        history: one entry for each evaluation: step, epoch, loss (mean since the last entry), dev and agreement (x
            100, where there are such pairs).
        loss_sum: of the micro-batches since the last entry, on this process; stays on the device.
        resumed_at: the steps that the run went on from.
    """

    loss_sum: torch.Tensor
    loss_count: int = 0
    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)

    def mean_loss(self) -> torch.Tensor:
        """Return the mean of this process since the last evaluation."""
        return self.loss_sum / max(self.loss_count, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps. All processes call it: the loss is their mean, as their number may vary."""
        return dict(vars(self), loss_sum=reduce(self.loss_sum, "mean").item())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        loss_sum = torch.full_like(self.loss_sum, state["loss_sum"])
        vars(self).update(state, loss_sum=loss_sum, resumed_at=[*state["resumed_at"], state["step"]])


class Trainer:
    """A training run, which leaves the kept checkpoint in `arguments.output_dir`.

    Args:
        rows: gives whole batches by `__getitems__`, and has `lengths`.
        loss_of: the model as Accelerate prepared it, and a batch -> mean loss over this process's part of the batch.
        dev: labelled pairs, measured at every evaluation.
        held_out: pairs with the teacher's scores, the same; what chooses the checkpoint is `arguments.select_by`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: BiEncoder | CrossEncoder,
        rows: Dataset,
        loss_of: LossFunction,
        arguments: TrainingArguments,
        dev: Task | None,
        held_out: Task | None = None,
    ):
        self.accelerator, self.rows, self.loss_of, self.arguments = accelerator, rows, loss_of, arguments
        self.sets = {
            name: DevSet(task, encoder, accelerator, arguments.eval_batch_tokens)
            for name, task in (("dev", dev), ("agreement", held_out))
            if task is not None
        }
        self.select_by = select_by(arguments)
        self.keep_best = self.select_by in self.sets
        self.micro_batches = arguments.count_micro_batches(len(rows.lengths), accelerator.num_processes)
        set_batch(accelerator, arguments.total_batch_size, self.micro_batches, arguments.max_grad_norm)
        self.sampler = LengthWindowSampler(
            rows.lengths,
            arguments.total_batch_size,
            self.micro_batches,
            arguments.length_window,
            arguments.seed,
            getattr(rows, "groups", None),
        )
        self.total_steps = arguments.num_epochs * self.sampler.batches
        if arguments.max_steps:
            self.total_steps = min(self.total_steps, arguments.max_steps)
        release_freed_memory()
        if accelerator.device.type == "cpu":
            use_cpu_dropout(encoder)
            keep_freed_memory()
        optimizer = make_optimizer(encoder, arguments)
        warmup = round(arguments.warmup_ratio * self.total_steps)
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=self.total_steps)
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            encoder, optimizer, scheduler, make_loader(rows, self.sampler)
        )
        graphs = cuda_graphs(accelerator, self.micro_batches, loss_of) if arguments.cuda_graphs == "auto" else None
        self.recorded = graphs and RecordedStep(self.model, loss_of, optimizer, arguments.max_grad_norm, graphs)
        set_seed(arguments.seed, device_specific=True)  # each process its own dropout
        self.watch = LossWatch(accelerator, LOG_STEPS)
        self.best: dict[str, torch.Tensor] = {}  # weights of the best model so far, on the main process
        self.best_is_written = True
        self.progress = Progress(loss_sum=torch.zeros((), device=accelerator.device))
        self.checkpoints = Checkpoints(
            accelerator, arguments.output_dir, self.progress, arguments.checkpoints_total_limit
        )

    def run(self) -> dict[str, Any]:
        """Train all epochs, from the newest checkpoint on if there is one, and place the kept model.

        Returns:
            What happened, for run.json: steps, kept step, its dev score, the history, examples per second.
        """
        self.checkpoints.load_newest()
        log_idle_cores(self.accelerator)
        self.bar = progress_bar(self.accelerator, self.total_steps, "Training", self.progress.step)
        start_trackers(self.accelerator, self.arguments)
        self.model.train()
        self.first_step, self.started, self.pauses = self.progress.step, time.perf_counter(), 0.0
        with StopSignal() as stop:
            for batch in self.batches():
                self.train_step(batch)
                evaluates = self.is_time_to_evaluate()
                if evaluates:
                    self.checked()  # waits for the steps that a GPU has still to do: they are no pause
                pause = time.perf_counter()
                if evaluates:
                    self.evaluate()
                self.save_if_due(stop)
                self.pauses += time.perf_counter() - pause
        self.bar.close()
        rate = self.examples_per_second()
        self.finish()
        return self.outcome(rate)

    def batches(self) -> Iterator[list[Batch]]:
        """Yield the batches that are still to come, each as its micro-batches."""
        while self.progress.step < self.total_steps:
            self.sampler.epoch = self.rows.epoch = self.progress.step // self.sampler.batches
            done = self.progress.step % self.sampler.batches * self.micro_batches
            micro_batches = []
            for micro_batch in self.accelerator.skip_first_batches(self.loader, done) if done else self.loader:
                micro_batches.append(micro_batch)
                if len(micro_batches) == self.micro_batches:
                    yield micro_batches
                    micro_batches = []
                if self.progress.step == self.total_steps:
                    break

    def train_step(self, micro_batches: list[Batch]) -> None:
        """Do the forward and backward passes of a batch's micro-batches, and one optimizer step."""
        progress = self.progress
        if self.recorded:
            loss, norm = self.recorded(*micro_batches)
            losses = [loss]
            self.scheduler.step()
        else:
            losses, norm = self.eager_step(micro_batches)
        progress.step += 1
        progress.loss_sum += sum(losses)
        progress.loss_count += len(losses)
        self.watch.note(progress.step, sum(losses))
        self.bar.update()
        if progress.step % LOG_STEPS == 0:
            self.report(losses[-1], norm)

    def eager_step(self, micro_batches: list[Batch]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Take a step as every backend can; return the micro-batches' losses, and the gradients' norm."""
        accelerator = self.accelerator
        if len(micro_batches) > 1 and hasattr(self.loss_of, "look_ahead"):
            self.loss_of.look_ahead(self.model, micro_batches)
        losses = []
        for micro_batch in micro_batches:
            with accelerator.accumulate(self.model):
                loss = self.loss_of(self.model, micro_batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        return losses, norm

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Update the progress bar and the trackers, every `LOG_STEPS` steps."""
        step, (value,) = self.progress.step, self.checked(loss)
        self.bar.set_postfix(loss=f"{value:.4f}")
        values = {
            "train/loss": value,
            "train/learning_rate": self.scheduler.get_last_lr()[0],
            "train/grad_norm": float(norm),
            "train/examples_per_second": self.examples_per_second(),
        }
        self.accelerator.log(values, step=step)

    def checked(self, *values: torch.Tensor) -> list[float]:
        """Return the means of scalars over the processes, once the losses of the last steps are known to be finite.

        Raises:
            BrokenRun: one is not; the message names the step, its batch and the last checkpoint.
        """
        broken, means = self.watch.look(self.progress.step, *values)
        if broken:
            step, loss = broken
            self.stop_broken(step, f"the loss is {loss}")
        return means

    def check_weights(self) -> None:
        """Raise `BrokenRun` unless everything is finite: no model and no checkpoint is kept without this."""
        (broken,) = self.checked(broken_weights(self.model))
        if broken:
            self.stop_broken(self.progress.step, "the weights are not finite after this step")

    def stop_broken(self, step: int, what: str) -> None:
        """Say in one line where a training broke down, and what is left of it."""
        self.bar.close()
        self.sampler.epoch, place = divmod(step - 1, self.sampler.batches)
        batches = itertools.islice(self.sampler, place * self.micro_batches, (place + 1) * self.micro_batches)
        examples = [row + 1 for micro_batch in batches for row in micro_batch]
        shown = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        last = self.checkpoints.newest()
        left = f"the last good checkpoint is {last}" if last else "no checkpoint had been written before"
        raise BrokenRun(
            f"step {step} of {self.total_steps}: {what}; its batch is the examples {shown} ({len(examples)} of "
            f"{len(self.rows.lengths)}); {left}; lower --learning_rate or use --mixed_precision no, with --overwrite"
        )

    def examples_per_second(self) -> float:
        """Return the mean since this process began to train; evaluation and checkpoints are not counted."""
        seconds = time.perf_counter() - self.started - self.pauses
        return (self.progress.step - self.first_step) * self.arguments.total_batch_size / seconds

    def is_time_to_evaluate(self) -> bool:
        """Return whether to evaluate: every `eval_steps`, and at each epoch's end."""
        step = self.progress.step
        return step % self.arguments.eval_steps == 0 or step % self.sampler.batches == 0 or step == self.total_steps

    def evaluate(self) -> None:
        """Note the mean loss and the dev score; keep the model if it is the best so far."""
        progress = self.progress
        self.check_weights()
        (mean,) = self.checked(progress.mean_loss())
        progress.loss_sum.zero_()
        progress.loss_count = 0
        entry = {"step": progress.step, "epoch": round(progress.step / self.sampler.batches, 3), "loss": mean}
        shown = ""
        for name, measured in self.sets.items():
            entry[name] = measured.score(self.model)  # None if every pair got the same score
            self.accelerator.log({f"{name}/{measured.metric}": entry[name]}, step=progress.step)
            shown += f", {name} {measured.metric} {shown_value(entry[name])}"
        progress.history.append(entry)
        log(f"step {progress.step}/{self.total_steps}: loss {mean:.4f}{shown}")
        value = entry.get(self.select_by)
        if value is not None and value > progress.best:
            progress.best, progress.best_step = value, progress.step
            self.keep()

    def keep(self) -> None:
        """Copy the model as it is now, the best so far, into main memory; copying does not wait for the device."""
        state = self.accelerator.get_state_dict(self.model)  # on every process: sharded weights are gathered
        for name, value in state.items() if self.accelerator.is_main_process else ():
            if name not in self.best:
                self.best[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.best[name].copy_(value, non_blocking=True)
        self.best_is_written = False

    def write_best(self) -> None:
        """Write the best model so far, unless it is on disk already."""
        encoder = self.accelerator.unwrap_model(self.model)
        encoder.state_dict()  # makes FSDP put its shards in place: on every process, and before the model is written
        if self.accelerator.is_main_process and not self.best_is_written:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            with replacing(self.checkpoints.best(self.progress.best_step)) as temporary:
                encoder.save_pretrained(temporary, self.best)
                seal(temporary)
        self.best_is_written = True
        self.accelerator.wait_for_everyone()

    def save_if_due(self, stop: StopSignal) -> None:
        """Save a checkpoint every `checkpointing_steps`, and when a signal asks to stop, which ends the process."""
        step, every = self.progress.step, self.arguments.checkpointing_steps
        # Asking the other processes costs a synchronisation, so it is not done at every step.
        asked = self.accelerator.num_processes == 1 or step % LOG_STEPS == 0
        stopping = asked and step < self.total_steps and stop.on_any_process(self.accelerator)
        if stopping or (every and step % every == 0 and step < self.total_steps):
            self.check_weights()
            self.write_best()
            self.checkpoints.save(step, self.progress.best_step)
        if stopping:
            self.bar.close()
            stop_here(self.accelerator, stop, f"step {step} of {self.total_steps}")

    def finish(self) -> None:
        """Put the kept model where it belongs. Checkpoints stay until run.json says that it is complete."""
        if self.keep_best and not self.progress.best_step:
            raise BrokenRun(f"the model gave every {self.select_by} pair the same score; lower --learning_rate")
        if not self.keep_best:
            self.progress.best_step = self.total_steps
            self.keep()
        self.write_best()
        if self.accelerator.is_main_process:
            check_sealed(self.checkpoints.best(self.progress.best_step))
            place(self.checkpoints.best(self.progress.best_step), Path(self.arguments.output_dir))
        self.accelerator.wait_for_everyone()

    def outcome(self, examples_per_second: float) -> dict[str, Any]:
        """Return what happened, for run.json."""
        progress = self.progress
        best = {}
        if self.keep_best:
            best = {self.select_by: progress.best, f"{self.select_by}_metric": self.sets[self.select_by].metric}
        return dict(
            kept_step=progress.best_step,
            **best,
            steps=self.total_steps,
            examples=len(self.rows.lengths),
            world_size=self.accelerator.num_processes,
            gradient_accumulation_steps=self.micro_batches,
            backend=backend_name(self.accelerator),
            mixed_precision=precision(self.accelerator),
            examples_per_second=round(examples_per_second, 1),
            resumed_at_steps=progress.resumed_at,
            history=progress.history,
        )


def make_optimizer(model: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Return AdamW, fused; no weight decay on biases and norms. A parameter may have a `learning_rate` of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [p for p in trained if hasattr(p, "learning_rate")]
    trained = [p for p in trained if not hasattr(p, "learning_rate")]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        *({"params": [p], "weight_decay": 0.0, "lr": p.learning_rate} for p in own),
    ]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, fused=True)
