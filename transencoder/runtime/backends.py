"""What differs between the distributed backends: one process, DDP, FSDP and DeepSpeed. No other file knows.

Weights are float32 and forward passes are autocast under each, so that all compute the same numbers. FSDP's and
DeepSpeed's own mixed precision keeps or gathers half-precision weights, which costs quality.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import DistributedType, InitProcessGroupKwargs, str_to_bool
from transformers.integrations import unset_hf_deepspeed_config

from transencoder.errors import InputError
from transencoder.runtime.waiting import timeout

TORCH_TYPES = {"bf16": "bfloat16", "fp16": "float16"}  # as DeepSpeed's configuration names them


def without_gpu() -> bool:
    """Tell whether this process works on the CPU."""
    return not torch.cuda.is_available() or _is_set("ACCELERATE_USE_CPU")


def cpu_cores() -> int:
    """Return the number of physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or 1, allowed or 1)


def spelled_out(launcher: str) -> str:
    """Return a launcher with the defaults of `accelerate launch`, which each log would begin with a list of.

    Where a file of settings has them, they are left to it.
    """
    given = launcher.split()
    if given[:2] != ["accelerate", "launch"]:
        return launcher
    words = ["accelerate", "launch", "--quiet"]
    kept = os.path.isfile(default_config_file) and "--cpu" not in given
    if not kept and not any(word.startswith("--config_file") for word in given):
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        if len(given) == 2:
            devices = torch.accelerator.device_count()
            words += ["--num_processes", str(max(devices, 1)), *(["--multi_gpu"] if devices > 1 else [])]
    return " ".join([*words, *given[2:]])


def idle_cores(accelerator: Accelerator) -> int:
    """Count the cores without work: `accelerate launch` gives a process one thread unless it is told otherwise."""
    one_of_one = accelerator.device.type == "cpu" and accelerator.num_processes == 1 and torch.get_num_threads() == 1
    return cpu_cores() - 1 if one_of_one else 0


def process_group() -> list[InitProcessGroupKwargs]:
    """Return how Accelerate connects the processes: how long they wait, and on CPUs that they talk by gloo.

    Without gloo, DeepSpeed and Accelerate disagree about the number of processes. Accelerate knows FSDP on GPUs only,
    and on CPUs would not connect the processes at all.
    """
    if not without_gpu():
        return [InitProcessGroupKwargs(timeout=timeout())]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it chose it
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return []
    if _is_set("ACCELERATE_USE_FSDP"):
        PartialState(backend="gloo").distributed_type = DistributedType.MULTI_GPU
    return [InitProcessGroupKwargs(backend="gloo", timeout=timeout())]


def is_set_up_once() -> bool:
    """Return whether the launcher chose FSDP or DeepSpeed, which a process can set up only once."""
    return _is_set("ACCELERATE_USE_FSDP") or _is_set("ACCELERATE_USE_DEEPSPEED")


def accelerate_precision(precision: str) -> str:
    """Return what `Accelerator(mixed_precision=...)` gets: "no" under DeepSpeed, where `autocast` takes its place."""
    return "no" if _is_set("ACCELERATE_USE_DEEPSPEED") else precision


def set_up_backend(accelerator: Accelerator, precision: str) -> None:
    """Let FSDP and DeepSpeed autocast to `precision`, in place of their own mixed precision."""
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Under ZeRO-3 transformers would shard every model that it loads: teachers, which only score, and students,
        # whose parameters then look one-dimensional. `accelerator.prepare` shards what is trained.
        unset_hf_deepspeed_config()
        # An empty list of modules: gradients too are summed in float32.
        accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"] = {
            "enabled": precision != "no",
            "dtype": TORCH_TYPES.get(precision, "bfloat16"),
            "lower_precision_safe_modules": [],
        }


def precision(accelerator: Accelerator) -> str:
    """Return the autocast type: "no", "bf16" or "fp16"."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    setting = accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]
    return {name: short for short, name in TORCH_TYPES.items()}[setting["dtype"]] if setting["enabled"] else "no"


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Return the context of a forward pass of a model that was not prepared for training."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.autocast()
    chosen = precision(accelerator)
    dtype = getattr(torch, TORCH_TYPES.get(chosen, ""), None)
    return torch.autocast(accelerator.device.type, dtype) if dtype else nullcontext()


def set_batch(accelerator: Accelerator, total_batch_size: int, micro_batches: int, max_grad_norm: float) -> None:
    """Tell the backend what batch the loader will bring, before `accelerator.prepare`.

    Args:
        micro_batches: gradient accumulation steps.
    """
    accelerator.gradient_accumulation_steps = micro_batches
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=total_batch_size // micro_batches // accelerator.num_processes,
            gradient_accumulation_steps=micro_batches,
            gradient_clipping=max_grad_norm,
        )


def backend_name(accelerator: Accelerator) -> str:
    """Return what can read a checkpoint: "plain" (one process or DDP), "fsdp", "deepspeed-zero2" or "-zero3"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"deepspeed-zero{accelerator.deepspeed_plugin.zero_stage}"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "plain"


def choose_precision(choice: str) -> str:
    """Return `choice`, or for "auto" what the launcher says, else bf16 where the hardware computes in it."""
    if choice != "auto":
        return choice
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher == "fp8":
        raise InputError("mixed_precision fp8 in the Accelerate configuration: not supported; use bf16")
    if launcher != "no":
        return launcher
    if not without_gpu():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_computes_bf16() else "no"


def cpu_computes_bf16() -> bool:
    """Return whether the CPU has instructions for bf16; without them it is emulated, and slow."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _is_set(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable) or "no"))
