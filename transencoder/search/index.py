"""An index of sentences on disk, and search in two steps: a bi-encoder retrieves, a cross-encoder re-ranks.

INDEX/index.faiss        vectors of unit length, by inner product
INDEX/sentences.arrow    the sentences, in the same order
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
from transencoder.data.tables import SENTENCES, content_checksum, without_repeats
from transencoder.data.tokens import tokenize
from transencoder.embeddings import embed, embed_texts
from transencoder.encoders import BiEncoder, CrossEncoder
from transencoder.errors import InputError
from transencoder.inference import Inference
from transencoder.model_files import ModelOptions, model_options, prompts_of
from transencoder.runtime.files import read_json, replacing, write_json
from transencoder.runtime.optional import load_optional
from transencoder.runtime.records import model_identity
from transencoder.runtime.shards import Shards
from transencoder.scoring import score_texts
from transencoder.search import neighbours
from transencoder.search.neighbours import METRICS, empty_clusters, exact_index

if TYPE_CHECKING:
    import faiss

INDEX_FILE, SENTENCES_FILE, METADATA_FILE = "index.faiss", "sentences.arrow", "index.json"


@dataclass(frozen=True)
class Hit:
    """A result.

    Args:
        score: the bi-encoder's.
        rerank: the cross-encoder's mean score of both orders, where there is one.
    """

    sentence: str
    score: float
    rerank: float | None = None


@dataclass
class SentenceIndex:
    """What an index's folder holds.

    Args:
        vectors: FAISS index of the sentences' vectors.
        sentences: memory-mapped, column sentence.
    """

    vectors: faiss.Index
    sentences: pa.Table

    def __len__(self) -> int:
        return len(self.sentences)

    def texts(self, rows: np.ndarray) -> list[str]:
        """Return the sentences of `rows`."""
        return self.sentences["sentence"].take(pa.array(rows)).to_pylist()

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the `k` nearest sentences, nearest first: similarities (float32) and rows (int64), [queries, k]."""
        found, rows = self.vectors.search(np.ascontiguousarray(queries), k)
        if self.vectors.metric_type == load_optional("faiss").METRIC_L2:
            found = -np.sqrt(np.maximum(found, 0))
        return found, rows


def index_metadata(bi_encoder: str, options: ModelOptions) -> dict[str, Any]:
    """Return what the vectors of an index depend on, beside its sentences."""
    return {"model": model_identity(bi_encoder, options.pooling), "prompts": list(prompts_of(bi_encoder, options))}


def vector_shards(
    output: Path, sentences: datasets.Dataset, arguments: ToolArguments, accelerator: Accelerator
) -> Shards:
    """Return where the vectors of `sentences` are kept until `output` is written; those of other ones are deleted."""
    metadata = index_metadata(arguments.bi_encoder, model_options(arguments))
    metadata |= {"read": content_checksum(sentences), "mixed_precision": arguments.mixed_precision}
    return Shards(output, metadata, arguments.shard_rows, accelerator)


def check_index(folder: Path, bi_encoder: str, options: ModelOptions) -> dict[str, Any] | None:
    """Read index.json; returns None where there is no index yet.

    Raises:
        InputError: foreign files, a damaged index, one that another model made, or no FAISS.
    """
    load_optional("faiss")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        metadata = read_json(folder / METADATA_FILE)
        made_by, size = {"model": metadata["model"], "prompts": metadata["prompts"]}, metadata["sentences"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--index {folder}: not an index that search.py made; choose another folder") from error
    now = index_metadata(bi_encoder, options)
    if made_by["model"] != now["model"]:
        name = metadata.get("name", "another model")
        raise InputError(f"--index {folder}: made with {name}, not with {bi_encoder}; make one in another folder")
    if made_by != now:
        prompts = made_by["prompts"]
        raise InputError(
            f"--index {folder}: made with the prompts {prompts}; give the same, or make one in another folder"
        )
    return {"sentences": size}


def check_searchable(encoder: BiEncoder) -> None:
    """Raise `InputError` for a bi-encoder whose similarity no index finds."""
    if encoder.similarity not in METRICS:
        raise InputError(f"{encoder.name}: compares by {encoder.similarity}; an index has {', '.join(METRICS)}")


def load_index(folder: Path) -> SentenceIndex:
    """Open an index: vectors in clusters and sentences stay on disk."""
    faiss = load_optional("faiss")
    try:
        vectors = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP)
        return SentenceIndex(vectors, feather.read_table(folder / SENTENCES_FILE, memory_map=True))
    except (RuntimeError, OSError, pa.ArrowException) as error:
        raise InputError(f"--index {folder}: damaged; delete it and make it again from --sentences") from error


def new_sentences(found: SentenceIndex | None, sentences: datasets.Dataset) -> datasets.Dataset:
    """Return those of `sentences` (column sentence, distinct) that are not in the index yet."""
    if found is None:
        return sentences
    there = datasets.Dataset(datasets.table.InMemoryTable(found.sentences))
    joined = without_repeats(datasets.concatenate_datasets([there, sentences.cast(there.features)]))
    return joined.select(np.arange(len(there), len(joined)))


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
    shards = vector_shards(folder, sentences, arguments, inference.accelerator)
    inference = dataclasses.replace(inference, shards=shards)
    tokens = tokenize(sentences, SENTENCES, encoder.preprocessor(side=1))
    added = embed([(encoder, [tokens])], shards.folder / "added.vec", inference)
    tables = [pa.table({"sentence": pa.chunked_array(_texts(sentences))})]
    if found is not None:
        tables.insert(0, found.sentences.cast(tables[0].schema))
    table = pa.concat_tables(tables)
    faiss = load_optional("faiss")
    before = faiss.read_index(str(folder / INDEX_FILE)) if found else None  # what is memory-mapped cannot grow
    index = grown(before, added, encoder.similarity, arguments.seed)

    with replacing(folder) as temporary:
        temporary.mkdir()
        faiss.write_index(index, str(temporary / INDEX_FILE))
        feather.write_feather(table, str(temporary / SENTENCES_FILE), compression="uncompressed")
        write_json(temporary / METADATA_FILE, {**metadata, "sentences": len(table)})
    shards.remove()
    return load_index(folder)


def _texts(sentences: datasets.Dataset) -> Iterator[pa.Array]:
    for batch in sentences.with_format("arrow").iter(100_000):
        yield from batch["sentence"].cast(pa.large_string()).chunks


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
    """Retrieve, and re-rank if there is a cross-encoder."""

    index: SentenceIndex
    bi_encoder: BiEncoder
    cross_encoder: CrossEncoder | None
    inference: Inference
    candidates: int

    def search(self, query: str, top_k: int) -> tuple[list[Hit], list[Hit], dict[str, float]]:
        """Find the best sentences for a query, and note how long it took.

        Returns:
            As re-ranked; as retrieved (the same without a cross-encoder); milliseconds of retrieving and re-ranking.
        """
        started = time.perf_counter()
        vector = embed_texts(self.bi_encoder, [query], self.inference)
        k = min(self.candidates if self.cross_encoder else top_k, len(self.index))
        similarities, rows = self.index.nearest(vector, k)
        there = rows[0] >= 0
        texts = self.index.texts(rows[0][there])
        retrieved = [Hit(text, float(score)) for text, score in zip(texts, similarities[0][there], strict=True)]
        milliseconds = {"retrieve_ms": 1000 * (time.perf_counter() - started)}
        if not self.cross_encoder:
            return retrieved, retrieved, milliseconds
        started = time.perf_counter()
        scores = score_texts(self.cross_encoder, [query] * len(texts), texts, self.inference)
        # The mean of both encoders is better than either, an ensemble; but it takes scores that are on one scale.
        on_one_scale = self.bi_encoder.similarity == "cosine" and self.cross_encoder.is_bounded
        by = scores + similarities[0][there] if on_one_scale else scores
        order = np.argsort(-by, kind="stable")[:top_k]
        reranked = [Hit(retrieved[i].sentence, retrieved[i].score, float(scores[i])) for i in order]
        milliseconds["rerank_ms"] = 1000 * (time.perf_counter() - started)
        return reranked, retrieved[:top_k], milliseconds


def partners(pairs: datasets.Dataset) -> dict[str, set[str]]:
    """Map each sentence of labelled pairs to those that it has label 1 with, in either order."""
    found: dict[str, set[str]] = {}
    for first, second, label in zip(pairs["sentence1"], pairs["sentence2"], pairs["label"], strict=True):
        if label == 1 and first != second:
            found.setdefault(first, set()).add(second)
            found.setdefault(second, set()).add(first)
    return found


def recall(hits: list[Hit], relevant: set[str], query: str, k: int) -> float:
    """Return the share of the relevant sentences among the first `k` hits, without the query itself; 0 to 1."""
    first = [hit.sentence for hit in hits if hit.sentence != query][:k]
    return len(relevant.intersection(first)) / len(relevant)
