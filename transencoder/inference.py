"""Many inputs -> what a model makes of them: batches of similar length, shared out to processes, kept in parts."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from transencoder.data.tables import release_pages
from transencoder.data.tokens import TokenRows, pad
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.runtime.accelerator import log_idle_cores, progress_bar
from transencoder.runtime.backends import autocast
from transencoder.runtime.shards import Parts
from transencoder.runtime.signals import StopSignal, stop_here

# Tokens in a forward pass, unless somebody says another number: a processor is fastest where a layer's states stay in
# its cache, a GPU where there is enough to do.
BATCH_TOKENS, PROCESSOR_BATCH_TOKENS = 16384, 2048


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Row indices, longest first, cut so that rows x longest row stays within `batch_tokens` (at least one row)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def run_sharded(
    model: nn.Module,
    encoder: BiEncoder | CrossEncoder,
    tokens: TokenRows,
    rows: np.ndarray,
    accelerator: Accelerator,
    batch_tokens: int | None,
    title: str,
) -> torch.Tensor:
    """The model's output for `rows`, on every process: float32 [rows] or [rows, d].

    Every process runs the same number of forward passes (a short process repeats its last batch and drops the result),
    as sharded models need; the parts are put together by a sum over processes, each row being filled by one of them.
    """
    if batch_tokens is None:
        batch_tokens = PROCESSOR_BATCH_TOKENS if accelerator.device.type == "cpu" else BATCH_TOKENS
    batches = list(token_batches(tokens.lengths[rows], batch_tokens))
    rounds = -(-len(batches) // accelerator.num_processes)
    filled: torch.Tensor | None = None
    log_idle_cores(accelerator)
    bar = progress_bar(accelerator, rounds, title)
    for round_ in range(rounds):
        mine = round_ * accelerator.num_processes + accelerator.process_index
        batch = batches[min(mine, len(batches) - 1)]
        inputs = pad(tokens, rows[batch], encoder.tokenizer)
        with autocast(accelerator):
            outputs = model(**{name: value.to(accelerator.device) for name, value in inputs.items()})
        if filled is None:
            filled = torch.zeros((len(rows), *outputs.shape[1:]), dtype=torch.float32, device=outputs.device)
        if mine < len(batches):
            filled[torch.from_numpy(batch).to(filled.device)] = outputs
        bar.update()
    bar.close()
    return accelerator.reduce(filled, "sum") if accelerator.num_processes > 1 else filled


def each_part(
    model: nn.Module,
    tokens: TokenRows,
    accelerator: Accelerator,
    batch_tokens: int | None,
    title: str,
    parts: Parts,
    name: str,
) -> Iterator[np.ndarray]:
    """`run_sharded` for all rows, part by part: each is kept on disk when it is done, and never computed again.

    A signal to stop is obeyed at the end of a part.
    """
    starts = range(0, len(tokens), parts.rows)
    with StopSignal() as stop:
        for number, start in enumerate(starts):
            release_pages()
            rows = np.arange(start, min(start + parts.rows, len(tokens)))
            part = parts.load(name, number, len(rows))
            if part is None:
                where = f"{title} ({number + 1} of {len(starts)})" if len(starts) > 1 else title
                part = run_sharded(model, model, tokens, rows, accelerator, batch_tokens, where).cpu().numpy()
                parts.save(name, number, part)
                if number + 1 < len(starts) and stop.on_any_process(accelerator):
                    stop_here(accelerator, stop, f"part {number + 1} of {len(starts)} ({title})")
            yield part
