#!/usr/bin/env python3
r"""Search sentences: a bi-encoder retrieves, a cross-encoder re-ranks.

python scripts/search.py --index runs/mine/index --bi_encoder runs/mine/best/bi-encoder --sentences sentences.txt \
    --cross_encoder runs/mine/best/cross-encoder --query "where is my parcel"

The index is made once; later calls leave --sentences out, or give more of them. Without a query, a prompt opens.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.options import is_text
from transencoder.config.tools import SearchArguments, parse_tool
from transencoder.data.formats import write_rows
from transencoder.data.scores import check_rows_output
from transencoder.data.tables import read_pairs, read_rows, sentence_parts
from transencoder.errors import InputError, one_line_errors, printable
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_cross_encoder
from transencoder.model_files import model_options
from transencoder.run.layout import SEARCH_FILE
from transencoder.runtime.accelerator import log, progress_bar, start
from transencoder.runtime.files import read_json
from transencoder.runtime.optional import load_optional
from transencoder.search.index import (
    Hit,
    Searcher,
    add_sentences,
    check_index,
    check_searchable,
    load_index,
    new_rows,
    partners,
    recall,
)
from transencoder.search.neighbours import LexicalIndex

if TYPE_CHECKING:
    from datasets import Dataset

# Of a result's fields, those that the table has in columns of its own, or not at all.
SHOWN = ("sentence", "file", "score", "bi_encoder", "cross_encoder", "alike")


def rank_by(arguments: SearchArguments) -> str:
    """What is asked for, else what a run measured to be best. --relevant compares, and so re-ranks in any case."""
    if not arguments.cross_encoder:
        return "bi"
    path = Path(arguments.cross_encoder).parent / SEARCH_FILE
    if arguments.rank_by or arguments.relevant or not path.is_file():
        return arguments.rank_by or "mean"
    try:
        advice = read_json(path)
        if advice["rank_by"] in ("bi", "cross", "mean"):
            log(f"Ranked by {advice['rank_by']}, as {path} says: {advice['why']} (--rank_by chooses another way)")
            return advice["rank_by"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not what summarize_run.py writes; delete it, or give --rank_by")


def open_searcher(arguments: SearchArguments) -> Searcher:
    """Check everything, bring the index up to date, load the models."""
    options, keep, by = model_options(arguments), arguments.keep or [], rank_by(arguments)
    check_bi_encoder(arguments.bi_encoder, options)
    if arguments.cross_encoder:
        check_cross_encoder(arguments.cross_encoder, "--cross_encoder", options)
    if arguments.hybrid:
        load_optional("bm25s")
    folder = Path(arguments.index)
    there = check_index(folder, arguments.bi_encoder, options, keep if arguments.sentences else None)
    if not there and not arguments.sentences:
        raise InputError(f"--index {folder}: there is none yet; give --sentences FILE to make it")
    index = load_index(folder) if there else None
    fresh = new_rows(index, read_rows(arguments.sentences, arguments, keep), keep) if arguments.sentences else []
    accelerator = start(arguments)
    inference = Inference(accelerator, arguments.eval_batch_tokens)
    bi_encoder = inference.load(arguments.bi_encoder, options)
    check_searchable(bi_encoder)
    if len(fresh):
        index = add_sentences(folder, index, fresh, bi_encoder, arguments, inference)
        log(f"{folder}: {len(index)} sentences, {len(fresh)} of them new")
    cross_encoder = inference.load(arguments.cross_encoder, options) if by != "bi" else None
    words = LexicalIndex(index.sentences["sentence"].to_pylist()) if arguments.hybrid else None
    return Searcher(index, bi_encoder, cross_encoder, inference, arguments.candidates, words, by == "mean")


def queries_in(arguments: SearchArguments) -> list[str]:
    """The rows of a file of queries."""
    path = arguments.queries
    return [query for part in sentence_parts(path, arguments) for query in part["sentence"]] if path else []


def typed() -> Iterator[str]:
    """Queries from a prompt, until an empty one or the end of the input."""
    if sys.stdin is None:
        raise InputError("nothing to read queries from; give --query or --queries")
    while True:
        try:
            query = input("query> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            query = "\udc80"  # as Python has it in some locales
        if not query:
            return
        if not is_text(query):
            raise InputError("a query is not UTF-8 text")
        yield query


def table(query: str, hits: list[Hit], milliseconds: dict[str, float]) -> str:
    """Results as lines of text, with the scores that explain their order."""
    found = [hit.as_dict() for hit in hits]
    names = [name for name in dict.fromkeys(name for hit in found for name in hit) if name not in SHOWN]
    scores = [
        "score",
        *(
            name
            for name in ("bi_encoder", "cross_encoder")
            if any(hit[name] != hit["score"] for hit in found if name in hit)
        ),
    ]
    lines = [[*scores, *names, "sentence"]]
    for hit in found:
        more = f"  (and {len(hit['alike'])} alike)" if "alike" in hit else ""
        cells = [f"{hit[name]:.3f}" for name in scores] + [str(hit.get(name, "")) for name in names]
        lines.append([*cells, hit["sentence"] + more])
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    shown = ["  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines]
    times = ", ".join(f"{name.removesuffix('_ms')} {value:.0f} ms" for name, value in milliseconds.items())
    return "\n".join([query, *shown, times])


def report_recall(searcher: Searcher, pairs: "Dataset", top_k: int) -> None:
    """Print the mean share of each sentence's partners among its first results, also re-ranked where that is done."""
    relevant = partners(pairs)
    if not relevant:
        raise InputError("--relevant: no pair has label 1")
    wanted = set().union(*relevant.values())
    absent = wanted.difference(searcher.index.sentences["sentence"].to_pylist())
    if absent:
        log(f"{len(absent)} of {len(wanted)} partners are not in the index, where nothing finds them")
    values = []
    bar = progress_bar(searcher.inference.accelerator, len(relevant), "Searching")
    for query, others in relevant.items():
        reranked, retrieved, _ = searcher.search(query)
        values.append([recall(hits, others, query, top_k) for hits in (retrieved, reranked)])
        bar.update()
    bar.close()
    retrieved, reranked = (100 * sum(column) / len(column) for column in zip(*values, strict=True))
    more = f", re-ranked {reranked:.2f}" if searcher.cross_encoder else ""
    print(f"recall@{top_k} of {len(values)} queries: {retrieved:.2f}{more}")


@one_line_errors
def main() -> None:
    arguments = parse_tool(SearchArguments, __doc__)
    if arguments.output:
        inputs = [*(arguments.sentences or []), *filter(None, (arguments.queries, arguments.relevant))]
        check_rows_output(Path(arguments.output), {".jsonl": '{"query"'}, inputs)
    pairs = read_pairs([arguments.relevant], "label", arguments) if arguments.relevant else None
    queries = (arguments.query or []) + queries_in(arguments)
    searcher = open_searcher(arguments)
    if pairs is not None:
        return report_recall(searcher, pairs, arguments.top_k)
    if len(searcher.index) < arguments.top_k:
        log(f"--top_k {arguments.top_k}: the index holds {len(searcher.index)} sentences, and all of them are shown")
    results = []
    for query in queries or typed():
        hits, _, milliseconds = searcher.search(query)
        hits = hits[: arguments.top_k]
        results.append([query, [hit.as_dict() for hit in hits], *milliseconds.values()])
        if not arguments.output:
            print(printable(table(query, hits, milliseconds)), flush=True)
    if arguments.output:
        names = ["query", "hits", "retrieve_ms", "rerank_ms"]
        write_rows(Path(arguments.output), names[: len(results[0])] if results else names, results)
        log(f"{arguments.output}: the results of {len(results)} queries")


if __name__ == "__main__":
    main()
