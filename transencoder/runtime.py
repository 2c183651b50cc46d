"""What every stage sets up before it works: the Accelerator, seeds, logging, trackers."""

import importlib.util
import logging
import os
import sys
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tqdm.auto import tqdm

from transencoder.arguments import StageArguments
from transencoder.errors import InputError, is_first_process

TRACKERS = ("tensorboard", "wandb", "trackio")


def start(arguments: StageArguments) -> Accelerator:
    """Make the Accelerator of this process and seed everything.

    Raises:
        InputError: the tracker asked for is not installed.
    """
    log_with = trackers(getattr(arguments, "report_to", "none"))
    quiet_libraries()
    handlers = []
    if _without_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it chose it
    if _without_gpu() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Without it DeepSpeed and Accelerate disagree about the number of processes on a machine without a GPU.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(arguments.mixed_precision),
        # The batch size is that of all processes together; each takes its part of every batch.
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        log_with=log_with or None,
        project_dir=getattr(arguments, "output_dir", None),
        kwargs_handlers=handlers,
    )
    set_seed(arguments.seed)
    return accelerator


def progress_bar(accelerator: Accelerator, total: int, title: str) -> tqdm:
    """A bar on the first process's terminal; none in a log file, and none that stays when the work is short."""
    return tqdm(total=total, desc=title, leave=False, disable=None if accelerator.is_main_process else True)


def log(message: str) -> None:
    """Write a line on stderr, from the first process only."""
    if is_first_process():
        print(message, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notes away from ours."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("datasets", "huggingface_hub", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _without_gpu() -> bool:
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _mixed_precision(choice: str) -> str:
    """`choice`, or for "auto": what the launcher says, else bf16 where the hardware computes in it."""
    if choice != "auto":
        return choice
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher != "no":
        return launcher
    if not _without_gpu():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # bf16 is emulated, and slow, on a CPU without these instructions.
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def trackers(report_to: str) -> list[str]:
    """The trackers to use; raises `InputError` for one that is not installed."""
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    if report_to == "all":
        return installed
    if report_to != "none" and report_to not in installed:
        raise InputError(f"--report_to {report_to}: not installed; pip install {report_to}")
    return [] if report_to == "none" else [report_to]


def as_plain(arguments: Any) -> dict[str, Any]:
    """Arguments as numbers and strings, which is what trackers take."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(arguments).items()}
