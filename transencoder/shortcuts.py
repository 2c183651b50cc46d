"""The same results with less work. docs/performance.md says what each of these brings."""

import ctypes
import sys

import torch
from torch import nn
from transformers import PreTrainedModel

# Where a layer's attention ends and what follows treats each token by itself, by model_type. None for models that add
# the attention's input once more behind it (ModernBERT), which would need it at the first token only, too.
ATTENTION_ENDS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), "attention.output"),
    "distilbert": "sa_layer_norm",
    "mpnet": "attention.LayerNorm",
}
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def read_first_token_only(backbone: PreTrainedModel) -> None:
    """Let the last layer compute its first token only, where that is all that is read of it.

    Its keys and values are those of all tokens; what comes behind its attention, three quarters of a layer's
    multiplications, is done for one token of each input. Unknown architectures stay as they are.

    Args:
        backbone: changed in place: its last hidden state becomes [n, 1, d].
    """
    end = ATTENTION_ENDS.get(backbone.config.model_type)
    if end is None:
        return
    *_, last = (module for name, module in backbone.named_modules() if name.endswith(f".{end}"))
    last.register_forward_pre_hook(lambda module, inputs: tuple(states[:, :1] for states in inputs))


class ProcessorDropout(nn.Dropout):
    """Dropout from 16 random bits an element, for a processor: PyTorch draws 64 there, one after another.

    The probability is rounded to a multiple of 2^-16. The bits are those of torch's generator, so that seeds and
    checkpoints mean what they always do.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Any shape and float type, the same out."""
        if not self.training or self.p in (0, 1):
            return super().forward(states)
        words = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: states.numel()].view(states.shape)
        kept = bits >= round(self.p * 2**16) - 2**15
        return torch.where(kept, states, 0.0) * (1 / (1 - self.p))  # backward keeps one byte an element


def use_processor_dropout(model: nn.Module) -> None:
    """Put `ProcessorDropout` in the place of every dropout layer, in place."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = ProcessorDropout


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, for the next step, which wants the same again.

    By default it gives every large block back to the kernel, which clears it before it hands it out once more. Does
    nothing outside of Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
