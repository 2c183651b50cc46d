"""Sentences -> unit vectors: on disk, memory-mapped, for many; at once for a few."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig

from transencoder.data.tables import RANDOM_ROWS, SENTENCES
from transencoder.data.tokens import tokenize
from transencoder.encoders import BiEncoder, CrossEncoder, load_encoder
from transencoder.errors import writing
from transencoder.inference import each_part
from transencoder.runtime.backends import autocast
from transencoder.runtime.shards import Parts

TEXTS_AT_ONCE = 64  # of a few texts that are not worth sorting by length


def embed(
    names: list[str],
    sentences: datasets.Dataset,
    path: Path,
    accelerator: Accelerator,
    batch_tokens: int | None,
    parts: Parts,
    pooling: str | None = None,
) -> np.ndarray:
    """Vectors whose inner product is the cosine, or with several encoders the mean of their cosines.

    Args:
        names: bi-encoders, which are loaded one after another.
        sentences: column sentence.
        path: file to write in NumPy's format, from the first process.
        parts: where what is done is kept; `path`'s stem tells several sets of sentences apart.
    Returns:
        float32 [sentences, d], memory-mapped, d being the sum of the encoders' dimensions.
    """
    encoders = (load_encoder(name, pooling).to(accelerator.device).eval() for name in names)
    widths = [AutoConfig.from_pretrained(name).hidden_size for name in names]
    titles = [f"Encoding with {Path(name).name}" for name in names]
    return write_vectors(encoders, widths, sentences, path, accelerator, batch_tokens, parts, titles)


def write_vectors(
    encoders: Iterable[BiEncoder],
    widths: list[int],
    sentences: datasets.Dataset,
    path: Path,
    accelerator: Accelerator,
    batch_tokens: int | None,
    parts: Parts,
    titles: list[str],
) -> np.ndarray:
    """As `embed`, with encoders that are loaded already, or while one goes through them.

    Args:
        widths: the encoders' dimensions.
        titles: what the progress bars say.
    """
    target, column = None, 0
    if accelerator.is_main_process:
        shape = (len(sentences), sum(widths))
        target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        # A write to mapped memory that the disk has no room for would end the process without a word.
        with contextlib.suppress(OSError), writing(path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for number, (encoder, width, title) in enumerate(zip(encoders, widths, titles, strict=True)):
        tokens = tokenize(sentences, SENTENCES, encoder.tokenizer, encoder.max_length)
        row = 0
        for part in each_part(encoder, tokens, accelerator, batch_tokens, title, parts, f"{path.stem}-{number}"):
            for start in range(0, 0 if target is None else len(part), RANDOM_ROWS):
                some = part[start : start + RANDOM_ROWS]  # few enough that copies of them are nothing
                rows = slice(row + start, row + start + len(some))
                target[rows, column : column + width] = unit(some) / np.sqrt(len(widths))
            row += len(part)
        column += width
    if target is not None:
        target.flush()
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32 [rows, d]; a row of zeros stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@torch.inference_mode()
def run_on_texts(encoder: BiEncoder | CrossEncoder, *columns: list[str], accelerator: Accelerator) -> np.ndarray:
    """What an encoder makes of a few texts, without any file: of sentences float32 [texts, d], unit vectors; of pairs
    (two columns) float32 [pairs], in (0, 1).
    """
    outputs = []
    for start in range(0, len(columns[0]), TEXTS_AT_ONCE):
        texts = [column[start : start + TEXTS_AT_ONCE] for column in columns]
        inputs = encoder.tokenizer(
            *texts, truncation=True, max_length=encoder.max_length, padding=True, return_tensors="pt"
        )
        with autocast(accelerator):
            outputs.append(encoder(**inputs.to(accelerator.device)).float().cpu())
    joined = torch.cat(outputs)
    return joined.sigmoid().numpy() if encoder.kind == "cross" else unit(joined.numpy())


def score_texts(
    encoder: BiEncoder | CrossEncoder, first: list[str], second: list[str], accelerator: Accelerator
) -> np.ndarray:
    """Scores of a few pairs: cosines, or a cross-encoder's mean of both orders; float32 [pairs]."""
    if encoder.kind == "bi":
        one, other = (run_on_texts(encoder, texts, accelerator=accelerator) for texts in (first, second))
        return (one * other).sum(axis=1)
    orders = [run_on_texts(encoder, *pair, accelerator=accelerator) for pair in ((first, second), (second, first))]
    return np.mean(orders, axis=0)
