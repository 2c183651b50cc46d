"""What every stage sets up before it works: the Accelerator, seeds, logging, trackers."""

import importlib.util
import logging
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, parse_flag_from_env, set_seed
from torch.distributed import DistError
from tqdm.auto import tqdm

from transencoder.config.options import StageArguments
from transencoder.errors import BrokenRun, InputError, is_first_process, printable
from transencoder.runtime.backends import (
    accelerate_precision,
    choose_precision,
    idle_cores,
    process_group,
    set_up_backend,
)
from transencoder.runtime.speed import keep_few_primitives

PROJECT = "trans-encoder"
DRIVER_VARIABLE = "TRANSENCODER_RUN"  # run_transencoder.sh sets it for its stages
TRACKERS = ("tensorboard", "wandb", "trackio")
_group_is_shared = False


def start(arguments: StageArguments) -> Accelerator:
    """Make the Accelerator of this process and seed everything.

    Raises:
        InputError: the tracker asked for is not installed, or TRANSENCODER_TIMEOUT is not a number.
        BrokenRun: another process of the run ended before all had met.
    """
    log_with = trackers(getattr(arguments, "report_to", "none"))
    quiet_libraries()
    precision = choose_precision(arguments.mixed_precision)
    keep_few_primitives(precision)
    try:
        accelerator = Accelerator(
            mixed_precision=accelerate_precision(precision),
            # The batch size is that of all processes together; each takes its share of every batch.
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            # Every batch has all its micro-batches: the last one of an epoch needs no special care.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            log_with=log_with or None,
            project_dir=getattr(arguments, "output_dir", None),
            # No weight is used twice in a forward pass, and a recorded step must not find casts of an earlier one.
            kwargs_handlers=[*process_group(), AutocastKwargs(cache_enabled=False)],
        )
    except DistError as error:
        raise _unreachable(error) from error
    set_up_backend(accelerator, precision)
    set_seed(arguments.seed)
    return accelerator


def share_process_group() -> PartialState:
    """Connect the processes for several stages, none of which then ends the process group."""
    global _group_is_shared
    _group_is_shared = True
    options = {name: value for handler in process_group() for name, value in handler.to_kwargs().items()}
    try:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)  # as Accelerator does
    except DistError as error:
        raise _unreachable(error) from error


def end(accelerator: Accelerator) -> None:
    """Close a stage's trackers, and the process group where it is the stage's own."""
    for tracker in accelerator.trackers:
        tracker.finish()
    if not _group_is_shared:
        accelerator.state.destroy_process_group()


def _unreachable(error: DistError) -> BrokenRun:
    reason = str(error).partition("\n")[0]
    return BrokenRun(f"the processes of this run do not reach one another, or one has ended: {reason}")


def progress_bar(accelerator: Accelerator, total: int, title: str, done: int = 0) -> tqdm:
    """Show a bar on the first process's terminal; none in a log file, and none that stays when it is full."""
    hidden = None if accelerator.is_main_process else True
    return tqdm(total=total, desc=title, initial=done, leave=False, disable=hidden)


def log(message: str) -> None:
    """Write a line on stderr, from the first process only."""
    if is_first_process():
        print(printable(message), file=sys.stderr, flush=True)


def log_idle_cores(accelerator: Accelerator) -> None:
    """Say once, when the work begins, that cores have nothing to do. (Bad input gets no line but its own.)"""
    if idle := idle_cores(accelerator):
        _log_idle_cores(idle)


@cache
def _log_idle_cores(idle: int) -> None:
    cores = idle + 1
    log(f"{idle} of {cores} cores idle: OMP_NUM_THREADS={cores} in the environment uses them all")


def log_found(message: str) -> None:
    """Log what was found in the data, but not in a stage of the driver, whose first step has said it."""
    if DRIVER_VARIABLE not in os.environ:
        log(message)


def log_next(command: str) -> None:
    """Suggest the next command to somebody at a terminal; not in a log, and not under the driver."""
    if sys.stderr.isatty() and DRIVER_VARIABLE not in os.environ:
        log(f"next: {command}")


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notes away from ours."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("datasets", "huggingface_hub", "sentence_transformers", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What these warn of does not happen here: nothing is added in place to a model's output ...
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # ... and this is between DeepSpeed and PyTorch.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def trackers(report_to: str) -> list[str]:
    """Return the trackers to use; raises `InputError` for one that is not installed."""
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    if report_to == "all" and not installed:
        raise InputError(f"--report_to all: none is installed; pip install {' or '.join(TRACKERS)}")
    if report_to == "all":
        return installed
    if report_to != "none" and report_to not in installed:
        raise InputError(f"--report_to {report_to}: not installed; pip install {report_to}")
    return [] if report_to == "none" else [report_to]


def start_trackers(accelerator: Accelerator, arguments: Any) -> None:
    """Begin a run in each tracker, named like the output folder, with the stage's arguments as its configuration."""
    name = "/".join(Path(arguments.output_dir).absolute().parts[1:][-4:])
    options = {"wandb": {"name": name, "dir": arguments.output_dir}, "trackio": {"name": name}}
    accelerator.init_trackers(PROJECT, config=as_plain(arguments), init_kwargs=options)


def as_plain(arguments: Any) -> dict[str, Any]:
    """Return arguments as numbers and strings, which is what trackers take."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(arguments).items()}
