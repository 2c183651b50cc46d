"""Paraphrases in a pile of sentences: neighbours by a bi-encoder, confirmed by a cross-encoder, as communities."""

import numpy as np

from transencoder.runtime.optional import load_optional
from transencoder.search.neighbours import search_vectors


def candidate_pairs(index, vectors: np.ndarray, neighbours: int, rows_at_once: int = 8192) -> np.ndarray:
    """Pair each sentence with its nearest neighbours: distinct int64 [pairs, 2], the smaller row first, ascending.

    Args:
        index: FAISS index of `vectors`.
        vectors: float32 [sentences, d], of unit length.
    """
    found = []
    for start in range(0, len(vectors), rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, len(vectors)))
        others = search_vectors(index, vectors[rows], neighbours + 1)  # one of them is the sentence itself
        pairs = np.stack([np.broadcast_to(rows[:, None], others.shape), others], axis=-1).reshape(-1, 2)
        found.append(pairs[(pairs[:, 1] >= 0) & (pairs[:, 0] != pairs[:, 1])])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


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
