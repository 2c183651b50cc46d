"""Optimizations that change no result. docs/performance.md says what each of these brings."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import nn

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedModel

# Where a layer's attention ends and what follows treats each token by itself, by model_type. None for models that add
# the attention's input once more behind it (ModernBERT), which would need it at the first token only, too.
ATTENTION_ENDS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), "attention.output"),
    "distilbert": "sa_layer_norm",
    "mpnet": "attention.LayerNorm",
}
# What the steps of a training use, by precision; oneDNN's own number is 1,024.
PRIMITIVES = {"no": 8, "bf16": 24}
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def read_first_token_only(backbone: "PreTrainedModel") -> None:
    """Let the last layer compute its first token only, where that is all that is read of it.

    Keys and values still come from all tokens. What follows the attention, three quarters of a layer's work, is
    computed for one token of each input. Unknown architectures stay as they are.

    Args:
        backbone: changed in place: its last hidden state becomes [n, 1, d].
    """
    end = ATTENTION_ENDS.get(backbone.config.model_type)
    if end is None:
        return
    *_, last = (module for name, module in backbone.named_modules() if name.endswith(f".{end}"))
    last.register_forward_pre_hook(lambda module, inputs: tuple(states[:, :1] for states in inputs))


class CPUDropout(nn.Dropout):
    """Dropout from 16 random bits an element, for CPUs: PyTorch draws 64 there, one after another.

    The probability is rounded to a multiple of 2^-16. The bits are those of torch's generator, so that seeds and
    checkpoints mean what they always do.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Drop and rescale `states`, of any shape and float type; returns the same shape and type."""
        if not self.training or self.p in (0, 1):
            return super().forward(states)
        words = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: states.numel()].view(states.shape)
        kept = bits >= round(self.p * 2**16) - 2**15
        return torch.where(kept, states, 0.0).mul_(1 / (1 - self.p))  # backward keeps one byte an element


def use_cpu_dropout(model: nn.Module) -> None:
    """Put `CPUDropout` in the place of every dropout layer, in place."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = CPUDropout


def release_freed_memory() -> None:
    """Return freed memory to the system, which Arrow and the C library keep for more, after reading and tokenizing."""
    pa.default_memory_pool().release_unused()
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next training step, which needs as much again.

    By default it returns every large block to the kernel, which clears it before it hands it out once more. Nothing
    happens outside of Linux with glibc.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _libc(name: str) -> Any:
    """Return a function of glibc; None outside of Linux, or with another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def keep_few_primitives(precision: str) -> None:
    """Let oneDNN keep the code of its last `PRIMITIVES` functions only. Must come before the first computation.

    On CPUs it computes GELU in float32, and in bf16 the matrix products as well. It compiles a function for each shape
    of a batch. There are hundreds here, of one or two megabytes each. Scoring hardly meets a shape twice and gets
    faster, too. Training compiles again when the length changes, which takes a third of a millisecond a function and
    only shows with a tiny model. What the user has set stays.
    """
    if precision in PRIMITIVES:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES[precision]))
