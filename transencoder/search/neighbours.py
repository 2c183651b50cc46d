"""Neighbours of sentences: by shared words (BM25) and by the cosine of their vectors (FAISS)."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transencoder.runtime.optional import load_optional

if TYPE_CHECKING:
    import faiss

EXACT_ROWS = 100_000  # up to so many vectors are all compared; more are looked for in some of their clusters
ROWS_AT_ONCE = 200_000  # vectors that are in memory while the index of more of them is built
MOST_CLUSTERS = 8192
CLUSTERS_SEARCHED = 32
SAMPLES_PER_CLUSTER = 40  # FAISS warns below 39
# Characters of scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Kana and Han.
UNSPACED = re.compile(
    r"([\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+)"
)
# What finds the most similar vectors, by the similarity of a bi-encoder. FAISS has no index of Manhattan distances.
METRICS = {"cosine": "METRIC_INNER_PRODUCT", "dot": "METRIC_INNER_PRODUCT", "euclidean": "METRIC_L2"}


class LexicalIndex:
    """Sentences by their words (see `words_of`), all in memory: meant for 100,000 of them.

    No words are left out as too frequent, which would need to know the language: BM25 gives them next to no weight.
    """

    def __init__(self, sentences: list[str]):
        self.size = len(sentences)
        words = [words_of(sentence) for sentence in sentences]
        self._index = load_optional("bm25s").BM25() if any(words) else None
        if self._index:
            self._index.index(words, show_progress=False)

    def search(self, queries: list[str], k: int) -> np.ndarray:
        """Find the rows of the `k` sentences that are most like each query, the best first.

        Returns:
            int64 [queries, k]; -1 behind the last sentence that shares a word with the query.
        """
        found = np.full((len(queries), k), -1, dtype=np.int64)
        if self._index:
            words = [words_of(query) for query in queries]
            rows, scores = self._index.retrieve(words, k=min(k, self.size), show_progress=False)
            found[:, : rows.shape[1]] = np.where(scores > 0, rows, -1)
        return found


class _Letters(dict):
    """A table for `str.translate`: letters, marks and digits stay, joiners inside words go, all else separates."""

    def __missing__(self, code: int) -> int | str | None:
        category = unicodedata.category(chr(code))
        self[code] = code if category[0] in "LMN" else None if category == "Cf" else " "
        return self[code]


_LETTERS = _Letters()


def words_of(sentence: str) -> list[str]:
    """Return the words of a sentence in any script; where words have no spaces between them, pairs of characters."""
    words = []
    for run in UNSPACED.split(sentence.lower().translate(_LETTERS)):
        if UNSPACED.match(run):
            words += [run[place : place + 2] for place in range(max(1, len(run) - 1))]
        else:
            words += run.split()
    return words


def vector_index(vectors: np.ndarray, folder: Path, seed: int, similarity: str = "cosine") -> faiss.Index:
    """Build an index, exact up to `EXACT_ROWS`, else in clusters, of which some are searched.

    Args:
        vectors: float32 [rows, d], as `embeddings.comparable` gives them; may be memory-mapped.
        similarity: a key of `METRICS`.
        folder: for the clusters' files, which must stay while the index is used. Memory does not grow with the rows.
    """
    if len(vectors) > EXACT_ROWS:
        return _clustered_index(vectors, folder, seed, similarity)
    index = exact_index(vectors.shape[1], similarity)
    index.add(np.ascontiguousarray(vectors))
    return index


def exact_index(width: int, similarity: str) -> faiss.Index:
    """Make an index without any rows that compares every vector, of `width` dimensions."""
    faiss = load_optional("faiss")
    return faiss.IndexFlat(width, getattr(faiss, METRICS[similarity]))


def empty_clusters(vectors: np.ndarray, seed: int, similarity: str) -> faiss.IndexIVF:
    """Train an index without any rows: a byte for each dimension of a vector, clusters drawn from a sample.

    Args:
        vectors: float32 [rows, d].
    """
    faiss, rows = load_optional("faiss"), len(vectors)
    clusters = max(1, min(int(4 * rows**0.5), MOST_CLUSTERS, rows // SAMPLES_PER_CLUSTER))
    index = faiss.index_factory(vectors.shape[1], f"IVF{clusters},SQ8", getattr(faiss, METRICS[similarity]))
    index.cp.seed = seed % 2**31
    chosen = np.random.default_rng(seed).choice(rows, min(rows, clusters * SAMPLES_PER_CLUSTER), replace=False)
    index.train(np.ascontiguousarray(vectors[np.sort(chosen)]))
    index.nprobe = CLUSTERS_SEARCHED
    return index


def _clustered_index(vectors: np.ndarray, folder: Path, seed: int, similarity: str) -> faiss.IndexIVF:
    """Build the clusters of all vectors block by block, merged on disk and memory-mapped."""
    faiss, index = load_optional("faiss"), empty_clusters(vectors, seed, similarity)
    trained = str(folder / "trained.faiss")
    faiss.write_index(index, trained)
    blocks = []
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block, rows = faiss.read_index(trained), vectors[start : start + ROWS_AT_ONCE]
        block.add_with_ids(np.ascontiguousarray(rows), np.arange(start, start + len(rows)))
        blocks.append(str(folder / f"block-{start}.faiss"))
        faiss.write_index(block, blocks[-1])
    load_optional("faiss.contrib.ondisk").merge_ondisk(index, blocks, str(folder / "clusters"))
    for block in blocks:
        Path(block).unlink()
    return index


def search_vectors(index: faiss.Index, queries: np.ndarray, k: int) -> np.ndarray:
    """Find the rows of the `k` nearest vectors of each query, nearest first: int64 [queries, k], -1 at the end."""
    return index.search(np.ascontiguousarray(queries), k)[1]
