"""Many inputs -> what a model makes of them: batches of similar length, shared out to processes, kept in shards."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from transencoder.data.tables import release_pages
from transencoder.data.tokens import TokenRows
from transencoder.encoders import BiEncoder, CrossEncoder, load_encoder
from transencoder.model_files import NO_OPTIONS, ModelOptions
from transencoder.runtime.accelerator import log, log_idle_cores, progress_bar
from transencoder.runtime.backends import autocast
from transencoder.runtime.shards import Shards
from transencoder.runtime.signals import StopSignal, stop_here

# Tokens in a forward pass, unless somebody says another number: a CPU is fastest where a layer's states stay in its
# cache, a GPU where there is enough to do.
BATCH_TOKENS, CPU_BATCH_TOKENS = 65536, 2048
TEXTS_AT_ONCE = 64  # of a few texts that are not worth sorting by length


@functools.cache  # once, as there may be thousands of queries
def _log_cut(name: str, max_length: int) -> None:
    log(f"{name}: what is longer than {max_length} tokens is cut, as some of these texts are")


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield row indices, longest first, cut so that rows x longest row stays within `batch_tokens` (at least one)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


@dataclass(frozen=True)
class Inference:
    """Where forward passes run, how large they are, and where finished work is kept.

    Args:
        accelerator: of this process.
        batch_tokens: tokens, padding included, in one forward pass; None chooses what suits the hardware.
        shards: keep what is done on disk, for inputs that take long; None keeps nothing.
    """

    accelerator: Accelerator
    batch_tokens: int | None = None
    shards: Shards | None = None

    def load(self, name: str, options: ModelOptions = NO_OPTIONS) -> BiEncoder | CrossEncoder:
        """Load an encoder onto the device, for scoring."""
        return load_encoder(name, options).to(self.accelerator.device).eval()

    @torch.inference_mode()
    def run(self, model: nn.Module, tokens: TokenRows, title: str, rows: np.ndarray | None = None) -> torch.Tensor:
        """Return the model's outputs for `rows` (all by default), on every process: float32 [rows] or [rows, d].

        Every process runs the same number of forward passes (a short process repeats its last batch and drops the
        result), as sharded models need; the shares are put together by a sum over processes, each row being filled by
        one of them.
        """
        accelerator, rows = self.accelerator, np.arange(len(tokens)) if rows is None else rows
        on_cpu = accelerator.device.type == "cpu"
        batch_tokens = self.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else BATCH_TOKENS)
        batches = list(token_batches(tokens.lengths[rows], batch_tokens))
        rounds = -(-len(batches) // accelerator.num_processes)
        ends = np.cumsum([len(batch) for batch in batches])
        places = torch.from_numpy(np.concatenate(batches)).to(accelerator.device)
        filled: torch.Tensor | None = None
        log_idle_cores(accelerator)
        bar = progress_bar(accelerator, rounds, title)
        for round_ in range(rounds):
            mine = round_ * accelerator.num_processes + accelerator.process_index
            batch = batches[min(mine, len(batches) - 1)]
            outputs = self._forward(model, tokens.batch(rows[batch]))
            if filled is None:
                filled = torch.zeros((len(rows), *outputs.shape[1:]), dtype=torch.float32, device=outputs.device)
            if mine < len(batches):
                filled[places[ends[mine] - len(batch) : ends[mine]]] = outputs
            bar.update()
        bar.close()
        return accelerator.reduce(filled, "sum") if accelerator.num_processes > 1 else filled

    def by_shard(self, model: nn.Module, tokens: TokenRows, title: str, name: str) -> Iterator[np.ndarray]:
        """Yield the outputs of all rows, shard by shard: each is kept on disk, and never computed again.

        A signal to stop is obeyed at the end of a shard.

        Args:
            name: of the shards' files.
        """
        shards = self.shards
        starts = range(0, len(tokens), shards.rows)
        with StopSignal() as stop:
            for number, start in enumerate(starts):
                release_pages()
                rows = np.arange(start, min(start + shards.rows, len(tokens)))
                shard = shards.load(name, number, len(rows))
                if shard is None:
                    where = f"{title} ({number + 1} of {len(starts)})" if len(starts) > 1 else title
                    shard = self.run(model, tokens, where, rows).cpu().numpy()
                    shards.save(name, number, shard)
                    if number + 1 < len(starts) and stop.on_any_process(self.accelerator):
                        stop_here(self.accelerator, stop, f"shard {number + 1} of {len(starts)} ({title})")
                yield shard

    @torch.inference_mode()
    def run_texts(self, encoder: BiEncoder | CrossEncoder, *columns: list[str], side: int = 0) -> torch.Tensor:
        """Return what an encoder makes of a few texts, or pairs (two columns), without any file: float32, on the CPU.

        Args:
            side: of the pair that single texts are on, for its prompt.
        """
        preprocessor, outputs, cut = encoder.preprocessor(side), [], 0
        for start in range(0, len(columns[0]), TEXTS_AT_ONCE):
            tokens = preprocessor.rows(*(column[start : start + TEXTS_AT_ONCE] for column in columns))
            outputs.append(self._forward(encoder, tokens.batch(np.arange(len(tokens)))).float().cpu())
            cut += tokens.cut
        if cut:
            _log_cut(encoder.name, preprocessor.max_length)
        return torch.cat(outputs)

    def _forward(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        device = self.accelerator.device
        if device.type == "cuda":  # pinned, so that the next batch is made while the GPU computes this one
            batch = {name: value.pin_memory().to(device, non_blocking=True) for name, value in batch.items()}
        with autocast(self.accelerator):
            return model(**batch)
