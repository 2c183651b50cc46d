#!/usr/bin/env python3
r"""Search sentences: a bi-encoder retrieves, a cross-encoder re-ranks.

python scripts/search.py --index runs/mine/index --bi_encoder runs/mine/best/bi-encoder --sentences sentences.txt \
    --cross_encoder runs/mine/best/cross-encoder --query "where is my parcel"

The index is made once; later calls leave --sentences out, or give more of them. Without a query, a prompt opens.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import numpy as np

from transencoder.config.tools import SearchArguments, parse_tool
from transencoder.data.tables import read_pairs, read_sentences, sentence_parts
from transencoder.errors import InputError, one_line_errors, printable
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_cross_encoder
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log, start
from transencoder.runtime.files import write_text
from transencoder.search.index import (
    Hit,
    Searcher,
    add_sentences,
    check_index,
    check_searchable,
    load_index,
    new_sentences,
    partners,
    recall,
)


def open_searcher(arguments: SearchArguments) -> Searcher:
    """Check everything, bring the index up to date, load the models."""
    options = model_options(arguments)
    check_bi_encoder(arguments.bi_encoder, options)
    if arguments.cross_encoder:
        check_cross_encoder(arguments.cross_encoder, "--cross_encoder", options)
    folder = Path(arguments.index)
    there = check_index(folder, arguments.bi_encoder, options)
    if not there and not arguments.sentences:
        raise InputError(f"--index {folder}: there is none yet; give --sentences FILE to make it")
    sentences = read_sentences(arguments.sentences, arguments) if arguments.sentences else []
    index = load_index(folder) if there else None
    fresh = new_sentences(index, sentences) if len(sentences) else []
    size = (len(index) if index else 0) + len(fresh)
    if arguments.top_k > size:
        raise InputError(f"--top_k {arguments.top_k}: the index holds {size} sentences")
    accelerator = start(arguments)
    inference = Inference(accelerator, arguments.eval_batch_tokens)
    bi_encoder = inference.load(arguments.bi_encoder, options)
    check_searchable(bi_encoder)
    if len(fresh):
        index = add_sentences(folder, index, fresh, bi_encoder, arguments, inference)
        log(f"{folder}: {len(index)} sentences, {len(fresh)} of them new")
    cross_encoder = inference.load(arguments.cross_encoder, options) if arguments.cross_encoder else None
    return Searcher(index, bi_encoder, cross_encoder, inference, arguments.candidates)


def queries_in(path: str | None) -> list[str]:
    """The lines of a file of queries."""
    return [query for part in sentence_parts(path) for query in part["sentence"]] if path else []


def typed() -> Iterator[str]:
    """Queries from a prompt, until an empty one or the end of the input."""
    while True:
        try:
            query = input("query> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not query:
            return
        yield query


def table(query: str, hits: list[Hit], milliseconds: dict[str, float]) -> str:
    """Results as lines of text."""
    lines = [query] + [
        f"{'' if hit.rerank is None else f'{hit.rerank:7.3f}'} {hit.score:7.3f}  {hit.sentence}" for hit in hits
    ]
    return "\n".join(
        [*lines, ", ".join(f"{name.replace('_ms', '')} {value:.0f} ms" for name, value in milliseconds.items())]
    )


def report_recall(searcher: Searcher, pairs, top_k: int) -> None:
    """Print the mean share of each sentence's partners among its first results, retrieved and re-ranked."""
    relevant = partners(pairs)
    if not relevant:
        raise InputError("--relevant: no pair has label 1")
    values = []
    for query, others in relevant.items():
        # One more, as the query itself is in most indices.
        reranked, retrieved, _ = searcher.search(query, top_k + 1)
        values.append([recall(hits, others, query, top_k) for hits in (retrieved, reranked)])
    means = 100 * np.mean(values, axis=0)
    print(f"recall@{top_k} of {len(values)} queries: retrieved {means[0]:.2f}, re-ranked {means[1]:.2f}")


@one_line_errors
def main() -> None:
    arguments = parse_tool(SearchArguments, __doc__)
    pairs = read_pairs([arguments.relevant], "label") if arguments.relevant else None
    queries = (arguments.query or []) + queries_in(arguments.queries)
    searcher = open_searcher(arguments)
    if pairs is not None:
        return report_recall(searcher, pairs, arguments.top_k)
    results = []
    for query in queries or typed():
        hits, _, milliseconds = searcher.search(query, arguments.top_k)
        results.append(
            json.dumps({"query": query, "hits": [vars(hit) for hit in hits], **milliseconds}, ensure_ascii=False)
        )
        if not arguments.output:
            print(printable(table(query, hits, milliseconds)), flush=True)
    if arguments.output:
        write_text(Path(arguments.output), "\n".join(results) + "\n")
        log(f"{arguments.output}: the results of {len(results)} queries")


if __name__ == "__main__":
    main()
