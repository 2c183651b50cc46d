"""The training loop: one for all three stages. What differs between them is the data and the loss."""

import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import Dataset
from transformers import get_scheduler

from transencoder.arguments import TrainingArguments, parse_stage
from transencoder.averaging import WeightAverage
from transencoder.data import LengthWindowSampler, make_loader
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.errors import InputError
from transencoder.evaluation import DevSet, shown_value
from transencoder.files import claim, move_model, write_folder, write_run
from transencoder.runtime import as_plain, log, progress_bar, start
from transencoder.selection import select_by
from transencoder.tasks import Task

LOG_STEPS = 10
Batch = dict[str, Any]
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass
class Progress:
    """How far a run is, and what it has seen.

    Args:
        history: one entry for each evaluation: step, epoch, loss (mean since the last entry), dev and agreement (x
            100, where there are such pairs).
    """

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def count_pieces(rows: int, arguments: TrainingArguments, num_processes: int) -> int:
    """Gradient accumulation steps that the batch size needs.

    Raises:
        InputError: fewer rows than one batch, or a batch that the processes cannot share equally.
    """
    total = arguments.total_batch_size
    if rows < total:
        raise InputError(f"{rows} examples are fewer than one batch; lower --total_batch_size (now {total})")
    if total % num_processes:
        raise InputError(f"--total_batch_size {total}: not divisible by {num_processes} processes")
    share = total // num_processes
    pieces = math.ceil(share / min(arguments.micro_batch_size or share, share))
    if share % pieces:
        raise InputError(
            f"--micro_batch_size {arguments.micro_batch_size}: {share} examples of each process do not split into "
            f"{pieces} equal parts"
        )
    return pieces


def begin(stage: str, description: str | None) -> tuple[Any, Accelerator]:
    """Read the arguments of a training stage, check its output folder, and start Accelerate.

    Exits with code 0 where the folder already holds the result of this very run.

    Args:
        stage: the script's name without ".py".
        description: the script's docstring, for --help.
    Raises:
        InputError: as `parse_stage`, `select_by`, `claim` and `start` do.
    """
    arguments = parse_stage(stage, description)
    select_by(arguments)
    if claim(arguments, stage):
        log(f"{arguments.output_dir} is complete already")
        sys.exit(0)
    return arguments, start(arguments)


def finish(accelerator: Accelerator, arguments: TrainingArguments, stage: str, facts: dict[str, Any]) -> None:
    """Mark a training stage's output folder as complete, and say what is in it."""
    if accelerator.is_main_process:
        write_run(arguments, stage, "complete", **facts)
    kept = f"step {facts['kept_step']} of {facts['steps']}"
    by = next((name for name in ("dev", "agreement") if name in facts), None)
    score = f", {by} {facts[f'{by}_metric']} {facts[by]:.2f}" if by else ""
    log(f"{arguments.output_dir}: {kept}{score}, {facts['examples_per_second']} examples/s")


def train(
    accelerator: Accelerator,
    encoder: BiEncoder | CrossEncoder,
    rows: Dataset,
    loss_of: LossFunction,
    arguments: TrainingArguments,
    dev: Task | None,
    held_out: Task | None = None,
) -> dict[str, Any]:
    """Train `encoder` and leave the kept checkpoint in `arguments.output_dir`.

    Args:
        rows: gives whole batches by `__getitems__`, and has `lengths`.
        loss_of: the model as Accelerate prepared it, and a batch -> mean loss over this process's part of the batch.
        dev: labelled pairs, measured at every evaluation.
        held_out: pairs with the teacher's scores, the same; what chooses the checkpoint is `arguments.select_by`.
    Returns:
        What happened, for run.json: steps, kept step, its dev score, the history, examples per second.
    """
    return Trainer(accelerator, encoder, rows, loss_of, arguments, dev, held_out).run()


class Trainer:
    """The state of one training run. Arguments as in `train`."""

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
        self.kept = Path(arguments.output_dir) / "checkpoints" / "best"
        self.pieces = count_pieces(len(rows.lengths), arguments, accelerator.num_processes)
        accelerator.gradient_accumulation_steps = self.pieces
        self.sampler = LengthWindowSampler(
            rows.lengths, arguments.total_batch_size, self.pieces, arguments.length_window, arguments.seed
        )
        self.total_steps = arguments.num_epochs * self.sampler.batches
        if arguments.max_steps:
            self.total_steps = min(self.total_steps, arguments.max_steps)
        optimizer = make_optimizer(encoder, arguments)
        warmup = round(arguments.warmup_ratio * self.total_steps)
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=self.total_steps)
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            encoder, optimizer, scheduler, make_loader(rows, self.sampler)
        )
        self.average = WeightAverage(self.model, arguments.ema_decay) if arguments.ema_decay else None
        set_seed(arguments.seed, device_specific=True)  # each process its own dropout
        self.progress = Progress()
        self.loss_sum = torch.zeros((), device=accelerator.device)  # since the last evaluation; stays on the device
        self.loss_count = 0

    def run(self) -> dict[str, Any]:
        """All epochs, and the kept checkpoint into the output folder."""
        self.bar = progress_bar(self.accelerator, self.total_steps, "Training")
        self.accelerator.init_trackers("trans-encoder", config=as_plain(self.arguments))
        self.model.train()
        started, evaluating = time.perf_counter(), 0.0
        while self.progress.step < self.total_steps:
            self.sampler.epoch = self.rows.epoch = self.progress.step // self.sampler.batches
            for batch in self.loader:
                if not self.train_on(batch):
                    continue
                if self.is_time_to_evaluate():
                    pause = time.perf_counter()
                    with self.average.in_place() if self.average else nullcontext():
                        self.evaluate()
                    evaluating += time.perf_counter() - pause
                if self.progress.step == self.total_steps:
                    break
        self.bar.close()
        seconds = time.perf_counter() - started - evaluating
        self.finish()
        return self.facts(seconds)

    def train_on(self, batch: Batch) -> bool:
        """Forward and backward of one piece of a batch; whether it completed an optimizer step."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            loss = self.loss_of(self.model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.loss_sum += loss.detach()
        self.loss_count += 1
        if not accelerator.sync_gradients:
            return False
        if self.average is not None:
            self.average.update()
        self.progress.step += 1
        self.bar.update()
        if self.progress.step % LOG_STEPS == 0:
            self.report(loss, norm)
        return True

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Progress bar and trackers, every `LOG_STEPS` steps; here too a broken run is stopped."""
        step, value = self.progress.step, self.accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; lower --learning_rate or use --mixed_precision no"
            )
        self.bar.set_postfix(loss=f"{value:.4f}")
        rate = self.scheduler.get_last_lr()[0]
        self.accelerator.log(
            {"train/loss": value, "train/learning_rate": rate, "train/grad_norm": float(norm)}, step=step
        )

    def is_time_to_evaluate(self) -> bool:
        """Every `eval_steps`, and at each epoch's end."""
        step = self.progress.step
        return step % self.arguments.eval_steps == 0 or step % self.sampler.batches == 0 or step == self.total_steps

    def evaluate(self) -> None:
        """Note the mean loss and the dev score; keep the model if it is the best so far."""
        progress = self.progress
        mean = self.accelerator.reduce(self.loss_sum / self.loss_count, "mean").item()
        self.loss_sum.zero_()
        self.loss_count = 0
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
            self.save()

    def save(self) -> None:
        """Write the model as it is now to the place of the kept one."""
        state = self.accelerator.get_state_dict(self.model)  # on every process: sharded weights are gathered
        if self.accelerator.is_main_process:
            encoder = self.accelerator.unwrap_model(self.model)
            write_folder(self.kept, lambda folder: encoder.save_pretrained(folder, state))
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Move the kept checkpoint to where it belongs."""
        if self.keep_best and not self.progress.best_step:
            raise FloatingPointError(
                f"the model gave every {self.select_by} pair the same score; lower --learning_rate"
            )
        if not self.keep_best:
            with self.average.in_place() if self.average else nullcontext():
                self.save()
        if self.accelerator.is_main_process:
            output = Path(self.arguments.output_dir)
            move_model(self.kept, output)
            shutil.rmtree(output / "checkpoints")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def facts(self, seconds: float) -> dict[str, Any]:
        """What happened, for run.json."""
        progress = self.progress
        best = {}
        if self.keep_best:
            best = {self.select_by: progress.best, f"{self.select_by}_metric": self.sets[self.select_by].metric}
        return dict(
            kept_step=progress.best_step if self.keep_best else self.total_steps,
            **best,
            steps=self.total_steps,
            examples=len(self.rows.lengths),
            world_size=self.accelerator.num_processes,
            gradient_accumulation_steps=self.pieces,
            mixed_precision=self.accelerator.mixed_precision,
            examples_per_second=round(self.total_steps * self.arguments.total_batch_size / seconds, 1),
            history=progress.history,
        )


def make_optimizer(model: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW, fused; no weight decay on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, fused=True)
