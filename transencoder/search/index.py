"""An index of sentences on disk, and search in two steps: a bi-encoder retrieves, a cross-encoder re-ranks.

INDEX/index.faiss        vectors of unit length, by inner product
INDEX/sentences.arrow    the sentences in the same order, with their rows in their files, and the columns that are kept
INDEX/index.json         which model made it
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from pyarrow import feather

from transencoder.config.tools import SearchArguments, ToolArguments
from transencoder.data.cache import checksum
from transencoder.data.tables import SENTENCES, blocks, content_checksum, first_rows, without_repeats
from transencoder.data.tokens import tokenize
from transencoder.embeddings import embed, embed_texts, similarities
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.model_files import ModelOptions, model_options, prompts_of
from transencoder.runtime.files import read_json, replacing, write_json
from transencoder.runtime.optional import load_optional
from transencoder.runtime.records import changed_inputs, model_identity
from transencoder.runtime.shards import Shards
from transencoder.scoring import score_texts
from transencoder.search import neighbours
from transencoder.search.neighbours import METRICS, LexicalIndex, empty_clusters, exact_index, words_of

if TYPE_CHECKING:
    import faiss

RANKS_BEFORE = 60  # of reciprocal rank fusion, as its authors have it (Cormack et al., 2009)
INDEX_FILE, SENTENCES_FILE, METADATA_FILE = "index.faiss", "sentences.arrow", "index.json"


@dataclass
class Hit:
    """A result: a sentence, and those in the index that have the same words in the same order.

    Args:
        rows: as the index has them: sentence, file, row, and the columns that are kept; the nearest first.
        score: what the results are ordered by: the mean of both encoders where their scores are on one scale.
        bi_encoder: its similarity.
        cross_encoder: its mean score of both orders, where there is one.
    """

    rows: list[dict[str, Any]]
    score: float
    bi_encoder: float
    cross_encoder: float | None = None

    @property
    def sentence(self) -> str:
        """Return the sentence itself."""
        return self.rows[0]["sentence"]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON can hold it."""
        scores = {"score": self.score, "bi_encoder": self.bi_encoder, "cross_encoder": self.cross_encoder}
        found = {name: value for name, value in {**self.rows[0], **scores}.items() if value is not None}
        return {**found, "alike": self.rows[1:]} if self.rows[1:] else found


@dataclass
class SentenceIndex:
    """What an index's folder holds.

    Args:
        vectors: FAISS index of the sentences' vectors.
        sentences: memory-mapped, column sentence and those of `data.tables.read_rows`.
    """

    vectors: faiss.Index
    sentences: pa.Table

    def __len__(self) -> int:
        return len(self.sentences)

    def rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Return what the index has of the sentences `numbers`."""
        return self.sentences.take(pa.array(numbers)).to_pylist()

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the `k` nearest sentences, nearest first: similarities (float32) and numbers (int64), [queries, k]."""
        found, rows = self.vectors.search(np.ascontiguousarray(queries), k)
        if self.vectors.metric_type == load_optional("faiss").METRIC_L2:
            found = -np.sqrt(np.maximum(found, 0))
        return found, rows


def index_metadata(bi_encoder: str, options: ModelOptions) -> dict[str, Any]:
    """Return what the vectors of an index depend on, beside its sentences."""
    return {"model": model_identity(bi_encoder, options.pooling), "prompts": list(prompts_of(bi_encoder, options))}


def vector_shards(
    output: Path, sentences: datasets.Dataset, arguments: ToolArguments, accelerator: Accelerator, **more: Any
) -> Shards:
    """Return where the vectors of `sentences` are kept until `output` is written; those of other ones are deleted.

    Args:
        more: what else that is kept there depends on.
    """
    metadata = index_metadata(arguments.bi_encoder, model_options(arguments))
    metadata |= {"read": content_checksum(sentences), "mixed_precision": arguments.mixed_precision, **more}
    return Shards(output, metadata, arguments.shard_rows, accelerator)


def check_index(folder: Path, bi_encoder: str, options: ModelOptions, keep: list[str] | None = None) -> bool:
    """Return whether there is an index already.

    Args:
        keep: columns that sentences which are added bring along; None where none are added.
    Raises:
        InputError: foreign files, a damaged index, one that another model made or that keeps others, or no FAISS.
    """
    load_optional("faiss")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        metadata = read_json(folder / METADATA_FILE)
        made_by, kept = {"model": metadata["model"], "prompts": metadata["prompts"]}, list(metadata.get("keep", []))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--index {folder}: not an index that search.py made; choose another folder") from error
    now = index_metadata(bi_encoder, options)
    if made_by["model"] != now["model"]:
        name, there, here = metadata.get("name", "another model"), made_by["model"], now["model"]
        changed = name == bi_encoder and changed_inputs(*({name: found.get("files", "")} for found in (there, here)))
        why = ", ".join(changed[:3]) if changed else f"made with {name}, not with {bi_encoder}"
        raise InputError(f"--index {folder}: {why}; make one in another folder")
    if made_by != now:
        prompts = made_by["prompts"]
        raise InputError(
            f"--index {folder}: made with the prompts {prompts}; give the same, or make one in another folder"
        )
    if keep is not None and keep != kept:
        made = f"--keep {' '.join(map(str, kept))}" if kept else "no --keep"
        raise InputError(f"--index {folder}: made with {made}; give the same, or make one in another folder")
    return True


def check_searchable(encoder: BiEncoder) -> None:
    """Raise `InputError` for a bi-encoder whose similarity no index finds."""
    if encoder.similarity not in METRICS:
        raise InputError(f"{encoder.name}: compares by {encoder.similarity}; an index has {', '.join(METRICS)}")


def load_index(folder: Path) -> SentenceIndex:
    """Open an index: vectors in clusters and sentences stay on disk."""
    faiss, reason = load_optional("faiss"), None
    try:
        metadata = read_json(folder / METADATA_FILE)
        if whole := metadata.get("checksum") in (None, _checksum(folder)):  # older ones have none
            vectors = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP)
            found = SentenceIndex(vectors, feather.read_table(folder / SENTENCES_FILE, memory_map=True))
        if read_json(folder / METADATA_FILE) != metadata:  # replaced in between
            return load_index(folder)
        if whole:
            return found
    except (RuntimeError, OSError, pa.ArrowException) as error:
        reason = error
    raise InputError(f"--index {folder}: damaged; delete it and make it again from --sentences") from reason


def _checksum(folder: Path) -> str:
    return checksum(folder / INDEX_FILE, folder / SENTENCES_FILE)


def new_rows(found: SentenceIndex | None, rows: datasets.Dataset, keep: list[str]) -> datasets.Dataset:
    """Return those of `rows` (as of `read_rows`) that are not in the index yet, each once, by sentence and `keep`."""
    names = ["sentence", *keep]
    if found is None:
        return without_repeats(rows, names)
    there = datasets.Dataset(datasets.table.InMemoryTable(found.sentences.select(names)))
    both = datasets.concatenate_datasets([there, rows.select_columns(names)])
    first = first_rows(both, names)
    return rows.select(first[first >= len(there)] - len(there))


def add_sentences(
    folder: Path,
    found: SentenceIndex | None,
    sentences: datasets.Dataset,
    encoder: BiEncoder,
    arguments: SearchArguments,
    inference: Inference,
) -> SentenceIndex:
    """Encode sentences and write the index with them; whoever opens the folder meets the old one or the new one."""
    metadata = {**index_metadata(arguments.bi_encoder, model_options(arguments)), "name": arguments.bi_encoder}
    metadata |= {"keep": arguments.keep or []}
    shards = vector_shards(folder, sentences, arguments, inference.accelerator)
    inference = dataclasses.replace(inference, shards=shards)
    tokens = tokenize(sentences, SENTENCES, encoder.preprocessor(side=1))
    added = embed([(encoder, [tokens])], shards.folder / "added.vec", inference)
    table = pa.concat_tables(block for _, block in blocks(sentences))
    if found is not None:  # an older index has fewer columns
        table = pa.concat_tables([found.sentences, table], promote_options="permissive")
    faiss = load_optional("faiss")
    before = faiss.read_index(str(folder / INDEX_FILE)) if found else None  # what is memory-mapped cannot grow
    index = grown(before, added, encoder.similarity, arguments.seed)

    with replacing(folder) as temporary:
        temporary.mkdir()
        faiss.write_index(index, str(temporary / INDEX_FILE))
        feather.write_feather(table, str(temporary / SENTENCES_FILE), compression="uncompressed")
        sums = {"sentences": len(table), "checksum": _checksum(temporary)}
        write_json(temporary / METADATA_FILE, {**metadata, **sums})
    shards.remove()
    return load_index(folder)


def grown(index: faiss.Index | None, vectors: np.ndarray, similarity: str, seed: int) -> faiss.Index:
    """Add rows to an index: exact as long as it is small, then in clusters.

    Args:
        index: the one before, if any; it may be changed.
        vectors: float32 [rows, d], `comparable`, what is added.
    """
    before = index.ntotal if index else 0
    if before + len(vectors) <= neighbours.EXACT_ROWS:
        larger = exact_index(vectors.shape[1], similarity)
        if index:
            larger.add(index.reconstruct_n(0, before))
    elif before > neighbours.EXACT_ROWS:
        larger = index
    else:
        vectors = np.concatenate([index.reconstruct_n(0, before), vectors]) if before else vectors
        larger = empty_clusters(vectors, seed, similarity)
    for start in range(0, len(vectors), neighbours.ROWS_AT_ONCE):
        larger.add(np.ascontiguousarray(vectors[start : start + neighbours.ROWS_AT_ONCE]))
    return larger


@dataclass
class Searcher:
    """Retrieve, and re-rank if there is a cross-encoder.

    Args:
        by_mean: re-rank by the mean of both encoders, not by the cross-encoder alone.
        words: finds by words, too; None for the bi-encoder alone.
        candidates: results that are retrieved.
    """

    index: SentenceIndex
    bi_encoder: BiEncoder
    cross_encoder: CrossEncoder | None
    inference: Inference
    candidates: int
    words: LexicalIndex | None = None
    by_mean: bool = True

    def search(self, query: str) -> tuple[list[Hit], list[Hit], dict[str, float]]:
        """Find the best sentences for a query, and note how long it took.

        Returns:
            As re-ranked; as retrieved (the same without a cross-encoder); milliseconds of retrieving and re-ranking.
        """
        started = time.perf_counter()
        retrieved = self._retrieve(query)
        milliseconds = {"retrieve_ms": 1000 * (time.perf_counter() - started)}
        if not self.cross_encoder:
            return retrieved, retrieved, milliseconds
        started = time.perf_counter()
        texts = [hit.sentence for hit in retrieved]
        scores = score_texts(self.cross_encoder, [query] * len(texts), texts, self.inference).tolist()
        # The mean of both encoders is an ensemble, which most often is better than either; but it takes one scale.
        mean = self.by_mean and self.bi_encoder.similarity == "cosine" and self.cross_encoder.is_bounded
        reranked = [
            Hit(hit.rows, (cross + hit.bi_encoder) / 2 if mean else cross, hit.bi_encoder, cross)
            for hit, cross in zip(retrieved, scores, strict=True)
        ]
        reranked.sort(key=lambda hit: -hit.score)
        milliseconds["rerank_ms"] = 1000 * (time.perf_counter() - started)
        return reranked, retrieved, milliseconds

    def _retrieve(self, query: str) -> list[Hit]:
        """Return the candidates, best first, each with those in the index that have the same words."""
        vector, k = embed_texts(self.bi_encoder, [query], self.inference), self.candidates
        while True:
            k = min(k, len(self.index))
            hits: dict[Any, Hit] = {}
            for row, score, similarity in self._ranked(query, vector, k):
                key = tuple(words_of(row["sentence"])) or row["sentence"]
                hits.setdefault(key, Hit([], score, similarity)).rows.append(row)
            if len(hits) >= self.candidates or k == len(self.index):
                return list(hits.values())[: self.candidates]
            k *= 4  # too many of them were alike

    def _ranked(self, query: str, vector: np.ndarray, k: int) -> Iterator[tuple[dict[str, Any], float, float]]:
        """Yield the nearest rows and those found by words, best first: the row, its score, and its similarity."""
        similarity, rows = (found[0] for found in self.index.nearest(vector, k))
        similarity, rows = similarity[rows >= 0], rows[rows >= 0]
        score = similarity
        if self.words:
            found = self.words.search([query], k)[0]
            found = found[found >= 0]
            if len(more := np.setdiff1d(found, rows)):
                texts = [row["sentence"] for row in self.index.rows(more)]
                vectors = np.concatenate([vector, embed_texts(self.bi_encoder, texts, self.inference, side=1)])
                places = np.arange(1, len(vectors))
                added = similarities(vectors, np.zeros_like(places), places, self.bi_encoder.similarity)
                rows, similarity = np.concatenate([rows, more]), np.concatenate([similarity, added])
            score = reciprocal_ranks(rows, [rows[np.argsort(-similarity, kind="stable")], found])
        order = np.lexsort((rows, -score))
        yield from zip(self.index.rows(rows[order]), score[order].tolist(), similarity[order].tolist(), strict=True)


def reciprocal_ranks(rows: np.ndarray, rankings: list[np.ndarray]) -> np.ndarray:
    """Fuse rankings, the best first, by the sum of 1 / (60 + rank); float64 [rows], 1 for what is first in all.

    Args:
        rows: int64 [rows], of which each ranking has some.
    """
    score = np.zeros(len(rows))
    for ranking in rankings:
        ranks = {row: rank for rank, row in enumerate(ranking.tolist(), start=1)}
        score += [1 / (RANKS_BEFORE + ranks[row]) if row in ranks else 0.0 for row in rows.tolist()]
    return score * (RANKS_BEFORE + 1) / len(rankings)


def partners(pairs: datasets.Dataset) -> dict[str, set[str]]:
    """Map each sentence of labelled pairs to those that it has label 1 with, in either order."""
    found: dict[str, set[str]] = {}
    for first, second, label in zip(pairs["sentence1"], pairs["sentence2"], pairs["label"], strict=True):
        if label == 1 and first != second:
            found.setdefault(first, set()).add(second)
            found.setdefault(second, set()).add(first)
    return found


def recall(hits: list[Hit], relevant: set[str], query: str, k: int) -> float:
    """Return the share of the relevant sentences among the first `k` found, without the query itself; 0 to 1."""
    found = dict.fromkeys(row["sentence"] for hit in hits for row in hit.rows)
    found.pop(query, None)
    return len(relevant.intersection(list(found)[:k])) / len(relevant)
