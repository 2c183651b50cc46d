"""What two sentences have in common as strings: a teacher that needs no training."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
from scipy.sparse import csr_matrix

from transencoder.data.cache import cache_folder
from transencoder.data.tables import RANDOM_ROWS, blocks, release_pages
from transencoder.data.tokens import unique_sentences
from transencoder.runtime.optional import load_optional

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

COSINE_ROWS = RANDOM_ROWS // 2  # pairs whose vectors are gathered at a time
NGRAMS = (2, 4)  # characters, inside words: word forms and spellings of one word share most of them


def lexical_scores(pairs: datasets.Dataset) -> np.ndarray:
    """Return the cosines of the sentences' TF-IDF vectors over character n-grams, weighted by the pairs' own counts.

    The vectors lie on disk while they are needed; in memory are the n-grams, and a few bytes for each pair.

    Args:
        pairs: columns sentence1 and sentence2.
    Returns:
        float32 [pairs], in [0, 1].
    """
    sentences, (first, second) = unique_sentences(pairs)
    scores = np.zeros(len(pairs), dtype=np.float32)
    vectorizer = _fitted(sentences)
    if vectorizer is None:  # no sentence has two characters
        return scores
    with cache_folder() as cache, tempfile.TemporaryDirectory(dir=cache) as folder:
        vectors = SparseRows(vectorizer, sentences, Path(folder))
        for start in range(0, len(pairs), COSINE_ROWS):
            release_pages()
            rows = slice(start, start + COSINE_ROWS)
            cosines = vectors.at(first[rows]).multiply(vectors.at(second[rows])).sum(axis=1)
            scores[rows] = np.asarray(cosines).ravel()
    return scores.clip(0.0, 1.0)


def _fitted(sentences: datasets.Dataset) -> TfidfVectorizer | None:
    """Fit as `TfidfVectorizer.fit` does, but without a matrix of all sentences; None if there is no n-gram at all."""
    sklearn = load_optional("sklearn.feature_extraction.text")
    settings = dict(analyzer="char_wb", ngram_range=NGRAMS, dtype=np.float32)
    analyze, counts = sklearn.TfidfVectorizer(**settings).build_analyzer(), Counter()
    for _, block in blocks(sentences):
        for text in block["sentence"].to_pylist():
            counts.update(set(analyze(text)))
    if not counts:
        return None
    ngrams = sorted(counts)
    vectorizer = sklearn.TfidfVectorizer(**settings, vocabulary=ngrams)
    found_in = np.array([counts[ngram] for ngram in ngrams])
    vectorizer.idf_ = np.log((1 + len(sentences)) / (1 + found_in)) + 1
    return vectorizer


class SparseRows:
    """A sparse vector for each sentence, memory-mapped.

    Args:
        sentences: column sentence.
        folder: for two files.
    """

    def __init__(self, vectorizer: TfidfVectorizer, sentences: datasets.Dataset, folder: Path):
        self._width = len(vectorizer.vocabulary_)
        sizes, paths = [np.zeros(1, dtype=np.int64)], (folder / "columns.vec", folder / "values.vec")
        with paths[0].open("wb") as columns, paths[1].open("wb") as values:
            for _, block in blocks(sentences):
                matrix = vectorizer.transform(block["sentence"].to_pylist())
                matrix.indices.astype(np.int32).tofile(columns)
                matrix.data.astype(np.float32).tofile(values)
                sizes.append(np.diff(matrix.indptr).astype(np.int64))
        self._ends = np.cumsum(np.concatenate(sizes))
        self._columns, self._values = np.memmap(paths[0], np.int32, "r"), np.memmap(paths[1], np.float32, "r")

    def at(self, rows: np.ndarray) -> csr_matrix:
        """Return the vectors of `rows`: float32 [rows, n-grams]."""
        starts, sizes = self._ends[rows], self._ends[rows + 1] - self._ends[rows]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        places = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], sizes)
        return csr_matrix((self._values[places], self._columns[places], ends), shape=(len(rows), self._width))
