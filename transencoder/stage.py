"""The frame of a stage: arguments, processes, and the output that is claimed before and marked complete afterwards.

A script fills it with what it reads, loads and computes.
"""

import shlex
import sys
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Dataset

from transencoder.config.parsing import parse_stage
from transencoder.config.stages import STAGES
from transencoder.data.pools import input_files
from transencoder.data.scores import check_output, is_made
from transencoder.data.tasks import Task, load_dev
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.errors import InputError, is_first_process
from transencoder.inference import Inference
from transencoder.merging import merge_with_start
from transencoder.model_files import ModelOptions, model_options
from transencoder.runtime.accelerator import end, log, log_next, start, start_trackers
from transencoder.runtime.checkpoints import check_resumable, remove_checkpoints
from transencoder.runtime.locks import lock
from transencoder.runtime.records import RESULTS_FILE, claim, identity, write_run
from transencoder.selection import merged_by, select_by
from transencoder.training import LossFunction, Trainer


class Stage:
    """What all stages share.

    Args:
        name: the script's, without ".py".
        description: the script's docstring, for --help.
        words: of its command line; the process's own by default.

    Attributes:
        arguments: of the command line, the recipe and the defaults.
        options: how models are read.
        accelerator: of this process, from `start` on.
    """

    accelerator: Accelerator

    def __init__(self, name: str, description: str | None, words: list[str] | None = None):
        self.name, self.arguments = name, parse_stage(name, description, words)
        self.options: ModelOptions = model_options(self.arguments)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the result, as it was when the stage began."""
        return identity(self.arguments, input_files(self.arguments))

    @property
    def inference(self) -> Inference:
        """Forward passes as the arguments want them."""
        return Inference(self.accelerator, self.arguments.eval_batch_tokens)

    def log(self, message: str) -> None:
        """Write a line on stderr, from the first process."""
        log(message)

    def log_next(self, made: str) -> None:
        """Suggest what can be done with what was made to somebody at a terminal."""
        log_next(STAGES[self.name].next.format(shlex.quote(made)))


class FileStage(Stage):
    """A stage that writes one Parquet file.

    Attributes:
        output: the file.
        metadata: what its content depends on; it goes into the file.
    """

    def start(self, what: str, **metadata: Any) -> None:
        """Start the processes, unless the file is made already, which ends the stage.

        Args:
            what: is in the file.
            metadata: that the arguments do not say.
        """
        self.output = Path(self.arguments.output)
        check_output(self.output)
        self.metadata = {**self.identity, **metadata}
        if any(Path(name).resolve() == self.output.resolve() for name in self.identity["inputs"]):
            raise InputError(f"--output {self.output}: is an input; choose another name")
        if is_made(self.output, self.metadata, what, self.arguments.overwrite):
            log(f"{self.output} is complete already")
            sys.exit(0)
        self.accelerator = start(self.arguments)

    def finish(self) -> None:
        """Suggest what comes next, and end the processes."""
        self.log_next(self.arguments.output)
        end(self.accelerator)


class EvaluationStage(Stage):
    """A stage that fills a folder with results."""

    def start(self) -> None:
        """Start the processes, unless the folder holds this very run's results, which ends the stage."""
        self.output = Path(self.arguments.output_dir)
        if claim(self.arguments, self.name, self.identity, RESULTS_FILE):
            log(f"{self.output / RESULTS_FILE} is complete already")
            sys.exit(0)
        self.accelerator = start(self.arguments)

    def begin(self) -> None:
        """Make the folder this run's, once its input is known to be good."""
        write_run(self.arguments, self.name, "running", self.identity)

    def start_trackers(self) -> None:
        """Begin a run in each experiment tracker."""
        start_trackers(self.accelerator, self.arguments)

    def finish(self) -> None:
        """Mark the folder as complete, and end the processes."""
        if self.accelerator.is_main_process:
            write_run(self.arguments, self.name, "complete", self.identity, world_size=self.accelerator.num_processes)
        end(self.accelerator)


class TrainingStage(Stage):
    """A stage that trains a model into a folder of its own.

    Args:
        hub: the module transencoder.hub.push, which publishes the model where that was asked for.

    Attributes:
        dev: the labelled pairs of --dev, for choosing a checkpoint; None without.
    Raises:
        InputError: the arguments do not go together, or the folder holds something else.
    """

    def __init__(self, name: str, description: str | None, words: list[str] | None, hub: ModuleType):
        super().__init__(name, description, words)
        arguments, folder, self.hub = self.arguments, Path(self.arguments.output_dir), hub
        select_by(arguments)
        hub.check_hub(arguments)
        if claim(arguments, name, self.identity):
            log(f"{folder} is complete already")
            if is_first_process():
                remove_checkpoints(arguments.output_dir)  # a kill may have come in between
                hub.push_stage(arguments)
            sys.exit(0)
        self.accelerator = start(arguments)
        if arguments.overwrite and self.accelerator.is_main_process:
            if folder.exists():
                lock(folder)
            remove_checkpoints(arguments.output_dir)
        self.accelerator.wait_for_everyone()
        check_resumable(arguments.output_dir, self.accelerator)
        self.dev = load_dev(arguments)

    def begin(self, examples: int, what: str) -> None:
        """Make the folder this run's, once its input is known to be good.

        Args:
            examples: to train on, of which there must be enough for a batch.
            what: says in a line what was read.
        """
        self.arguments.count_micro_batches(examples, self.accelerator.num_processes)
        log(what)
        write_run(self.arguments, self.name, "running", self.identity)

    def train(
        self,
        encoder: BiEncoder | CrossEncoder,
        rows: Dataset,
        loss_of: LossFunction,
        held_out: Task | None = None,
        **metadata: Any,
    ) -> None:
        """Train `encoder`, mark the folder as complete, say what is in it, and push it where that was asked for.

        Args as of `Trainer`; `metadata` goes into run.json.
        """
        arguments = self.arguments
        trainer = Trainer(self.accelerator, encoder, rows, loss_of, arguments, self.dev, held_out)
        found, by = trainer.run(), merged_by(arguments)
        if by != "off":
            task = {"dev": self.dev, "agreement": held_out}.get(by)
            found |= merge_with_start(arguments, trainer.checkpoints.best(found["kept_step"]), task, self.inference)
        end(self.accelerator)
        if self.accelerator.is_main_process:
            write_run(arguments, self.name, "complete", self.identity, **found, **metadata)
            remove_checkpoints(arguments.output_dir)
        by = next((name for name in ("dev", "agreement") if name in found), None)
        score = f", {by} {found[f'{by}_metric']} {found[by]:.2f}" if by else ""
        kept = f"step {found['kept_step']} of {found['steps']}{score}"
        log(f"{arguments.output_dir}: {kept}, {found['examples_per_second']} examples/s")
        self.log_next(arguments.output_dir)
        if self.accelerator.is_main_process:
            self.hub.push_stage(arguments)
