"""Paraphrases in a pile of sentences: neighbours by a bi-encoder, confirmed by a cross-encoder, as communities."""

import datasets
import numpy as np

from transencoder.data.tables import PAIRS
from transencoder.runtime.optional import load_optional
from transencoder.search.neighbours import search_vectors

THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def candidate_pairs(index, vectors: np.ndarray, neighbours: int, rows_at_once: int = 8192) -> np.ndarray:
    """Pair each sentence with its nearest neighbours: distinct int64 [pairs, 2], the smaller row first, ascending.

    Args:
        index: FAISS index of `vectors`.
        vectors: float32 [sentences, d], of unit length.
    """
    found = []
    for start in range(0, len(vectors), rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, len(vectors)))
        k = min(neighbours + 1, len(vectors))  # one of them is the sentence itself
        others = search_vectors(index, vectors[rows], k)
        pairs = np.stack([np.broadcast_to(rows[:, None], others.shape), others], axis=-1).reshape(-1, 2)
        found.append(pairs[(pairs[:, 1] >= 0) & (pairs[:, 0] != pairs[:, 1])])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def texts_of(pairs: np.ndarray, sentences: datasets.Dataset) -> datasets.Dataset:
    """Return the sentences of pairs of rows, as a table of pairs."""
    return datasets.Dataset.from_dict({name: sentences[pairs[:, i]]["sentence"] for i, name in enumerate(PAIRS)})


def communities(pairs: np.ndarray, scores: np.ndarray, threshold: float, seed: int) -> list[list[tuple[int, float]]]:
    """Group the sentences that are paraphrases of one another, largest first.

    Sentences are joined where their score reaches the threshold; Louvain communities, not connected parts, so that a
    chain of near misses does not join two groups.

    Args:
        pairs: int64 [pairs, 2].
        scores: float32 [pairs].
    Returns:
        For each group its rows, the most central first, each with its mean score to those that it is joined with.
    """
    nx = load_optional("networkx")
    graph = nx.Graph()
    kept = scores >= threshold
    graph.add_weighted_edges_from(
        (int(one), int(other), float(score)) for (one, other), score in zip(pairs[kept], scores[kept], strict=True)
    )
    groups = []
    for members in nx.community.louvain_communities(graph, seed=seed):
        joined = graph.subgraph(members)
        strength = dict(joined.degree(weight="weight"))
        order = sorted((row for row in members if strength[row]), key=lambda row: (-strength[row], row))
        if len(order) > 1:
            groups.append([(row, strength[row] / joined.degree(row)) for row in order])
    return sorted(groups, key=lambda group: (-len(group), group[0][0]))


def rows_of(places: np.ndarray) -> list[list[int]]:
    """Return the rows of each sentence; `places`: int [rows], the sentence of each row."""
    ends = np.cumsum(np.bincount(places))
    return [rows.tolist() for rows in np.split(np.argsort(places, kind="stable"), ends[:-1])]


def repeated(members: list[list[int]], groups: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """Return the rows of each sentence that is there more than once and in none of `groups`, each with the score 1.

    Args:
        members: as `rows_of` returns them.
    """
    similar = {sentence for group in groups for sentence, _ in group}
    return [
        [(row, 1.0) for row in rows]
        for sentence, rows in enumerate(members)
        if len(rows) > 1 and sentence not in similar
    ]


def sweep(pairs: np.ndarray, scores: np.ndarray, sentences: datasets.Dataset, seed: int) -> str:
    """Return a table of thresholds: the groups that they give, and two pairs that are just above each.

    Args:
        pairs: int64 [pairs, 2].
        scores: float32 [pairs].
        sentences: column sentence.
    """
    lines, above, rng = ["threshold  groups  sentences  just above it"], np.inf, np.random.default_rng(seed)
    for threshold in THRESHOLDS:
        groups = communities(pairs, scores, threshold, seed)
        lines.append(f"{threshold:9.2f}  {len(groups):6}  {sum(map(len, groups)):9}")
        between = np.flatnonzero((scores >= threshold) & (scores < above))
        for pair in np.sort(rng.choice(between, min(2, len(between)), replace=False)):
            lines.append(f"{scores[pair]:36.3f}  {' | '.join(sentences[pairs[pair]]['sentence'])}")
        above = threshold
    return "\n".join(lines)
