"""Sentences -> vectors whose similarity is taken: on disk, memory-mapped, for many; at once for a few."""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from transencoder.data.tables import MAPPED_BYTES, RANDOM_ROWS, release_pages
from transencoder.data.tokens import TokenRows
from transencoder.encoders import BiEncoder
from transencoder.errors import writing
from transencoder.inference import Inference

SIMILARITY_ROWS = RANDOM_ROWS // 2  # pairs whose vectors are gathered at a time
NEAREST_ROWS, NEAREST_COLUMNS = 1024, 65536  # cosines that are taken at a time: 256 MB


def embed(sources: list[tuple[BiEncoder, list[TokenRows]]], path: Path, inference: Inference) -> np.ndarray:
    """Encode sentences into a file in NumPy's format, which the first process writes.

    Args:
        sources: bi-encoders, each with the tokens of the same sentences, in one or several parts. With several
            encoders, the inner product of two vectors is the mean of their cosines.
        inference: with shards; the stem of `path` tells its files from those of other sentences.
    Returns:
        float32 [sentences, d], memory-mapped, d being the sum of the encoders' widths; see `comparable`.
    """
    accelerator, target, column = inference.accelerator, None, 0
    if accelerator.is_main_process:
        shape = (sum(map(len, sources[0][1])), sum(encoder.width for encoder, _ in sources))
        with writing(path):
            target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        # A write to mapped memory that the disk has no room for would end the process without a word.
        with contextlib.suppress(OSError), writing(path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for number, (encoder, parts) in enumerate(sources):
        row, similarity = 0, "cosine" if len(sources) > 1 else encoder.similarity
        for part, tokens in enumerate(parts):
            name = f"{path.stem}-{number}-{part}"
            for shard in inference.by_shard(encoder, tokens, f"Encoding with {encoder.name}", name):
                for start in range(0, 0 if target is None else len(shard), RANDOM_ROWS):
                    some = shard[start : start + RANDOM_ROWS]  # few enough that copies of them are nothing
                    rows = slice(row + start, row + start + len(some))
                    target[rows, column : column + encoder.width] = comparable(some, similarity) / len(sources) ** 0.5
                row += len(shard)
        column += encoder.width
    if target is not None:
        target.flush()
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")


def comparable(embeddings: np.ndarray, similarity: str) -> np.ndarray:
    """Return embeddings (float32 [rows, d]) as `similarities` takes them: of unit length where cosines are taken."""
    if similarity != "cosine":
        return embeddings
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def similarities(vectors: np.ndarray, first: np.ndarray, second: np.ndarray, similarity: str) -> np.ndarray:
    """Return the similarity of each pair of vectors, float32 [pairs], block by block.

    Args:
        vectors: float32 [sentences, d], `comparable`; may be memory-mapped.
        first, second: int [pairs], rows of `vectors`.
        similarity: "cosine" or "dot", "euclidean" or "manhattan" (both negative distances), as sentence-transformers
            defines them.
    """
    found = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(found), SIMILARITY_ROWS):
        rows = slice(start, start + SIMILARITY_ROWS)
        if vectors.nbytes > MAPPED_BYTES:  # looking for pages to give back takes as long as many cosines
            release_pages()
        one, other = vectors[first[rows]], vectors[second[rows]]
        if similarity == "euclidean":
            found[rows] = -np.linalg.norm(one - other, axis=1)
        elif similarity == "manhattan":
            found[rows] = -np.abs(one - other).sum(axis=1)
        else:
            found[rows] = (one * other).sum(axis=1)
    return found


def device_similarities(
    embeddings: torch.Tensor, first: np.ndarray, second: np.ndarray, similarity: str
) -> np.ndarray:
    """Return the same of embeddings (float32 [sentences, d]) where they are: only the numbers leave the device."""
    from sentence_transformers.util import SimilarityFunction

    one, other = (
        embeddings[torch.from_numpy(rows.astype(np.int64)).to(embeddings.device)] for rows in (first, second)
    )
    return SimilarityFunction.to_similarity_pairwise_fn(similarity)(one, other).cpu().numpy()


def embed_texts(encoder: BiEncoder, texts: list[str], inference: Inference, side: int = 0) -> np.ndarray:
    """Return the vectors of a few texts, float32 [texts, d], `comparable`; without any file."""
    return comparable(inference.run_texts(encoder, texts, side=side).numpy(), encoder.similarity)


@torch.inference_mode()
def smoothed(vectors: np.ndarray, neighbours: int, device: torch.device) -> np.ndarray:
    """Return vectors that their neighbourhood speaks for, too: sentences that mean the same have the same neighbours.

    A vector becomes itself, less the mean of all, plus the mean of its nearest `neighbours` (by the cosine, without
    itself). It takes sentences x sentences x d multiplications.

    Args:
        vectors: float [sentences, d], of distinct sentences.
        neighbours: fewer than there are sentences.
        device: where it is computed.
    Returns:
        float32 [sentences, d], of unit length.
    """
    centred = torch.tensor(np.asarray(vectors, np.float32), device=device)
    centred = F.normalize(centred - centred.mean(dim=0), dim=1)
    found = torch.empty_like(centred)
    for start in range(0, len(centred), NEAREST_ROWS):
        rows = torch.arange(start, min(start + NEAREST_ROWS, len(centred)), device=device)
        best = torch.empty(len(rows), 0, device=device)
        places = torch.empty(len(rows), 0, dtype=torch.long, device=device)
        for first in range(0, len(centred), NEAREST_COLUMNS):
            cosines = centred[rows] @ centred[first : first + NEAREST_COLUMNS].T
            inside = (rows >= first) & (rows < first + NEAREST_COLUMNS)
            cosines[inside, rows[inside] - first] = -torch.inf
            top = cosines.topk(min(neighbours, cosines.shape[1]))
            best = torch.cat([best, top.values], dim=1)
            places = torch.cat([places, top.indices + first], dim=1)
            best, kept = best.topk(min(neighbours, best.shape[1]))
            places = places.gather(1, kept)
        found[rows] = F.normalize(centred[rows] + centred[places].mean(dim=1), dim=1)
    return found.cpu().numpy()
