#!/usr/bin/env python3
"""Try the models of a run on a page: two sentences and their scores, search in a file of sentences, its duplicates.

pip install gradio
python examples/demo.py runs/quickstart examples/sentences.txt

The models of a run are plain sentence-transformers models, and are used as such here. For a table, name the column
with the text, as in the other tools: `--columns sentence=question`.
"""

import argparse
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import gradio as gr
import torch
from fastapi.middleware import Middleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from sentence_transformers import CrossEncoder, SentenceTransformer, util

from transencoder.config.options import Reading
from transencoder.data.tables import sentence_parts
from transencoder.errors import InputError

CANDIDATES = 50  # sentences, or pairs, that the bi-encoder finds for the cross-encoder to re-rank
MOST_CHARACTERS = 2000  # of a text; longer ones would hold up everybody else's
EXAMPLES = 3  # the first sentences of the file
OWN_NAMES = ["localhost", "127.0.0.1"]
SCORES = {"mean": "mean of both", "bi": "bi-encoder", "cross": "cross-encoder"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of run_transencoder.sh")
    parser.add_argument(
        "sentences", type=Path, help="what to search in: a sentence on each line, or a table (CSV, JSONL)"
    )
    parser.add_argument("--columns", nargs="+", help="of a table: where the sentences are, as in sentence=question")
    parser.add_argument("--host", help="address to listen on, such as 0.0.0.0 (default: this machine alone)")
    parser.add_argument("--start", help="bi-encoder to compare with (default: what the run began with)")
    arguments = parser.parse_args()
    best, last = arguments.run / "best", arguments.run / "last"  # last/ is where no dev set chose
    arguments.models = best if best.is_dir() or not last.is_dir() else last
    summary = arguments.run / "results.json"
    for path in (summary, arguments.models / "bi-encoder", arguments.models / "cross-encoder", arguments.sentences):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    try:
        parts = sentence_parts(str(arguments.sentences), Reading(columns=arguments.columns, skip_bad_rows=True))
    except InputError as error:
        parser.error(str(error))
    arguments.counts = Counter(text for part in parts for text in part["sentence"])
    measured = json.loads(summary.read_text(encoding="utf-8"))
    arguments.start = arguments.start or next(
        (each["path"] for each in measured["encoders"] if not each["cycle"]), None
    )
    arguments.rank_by = (measured["search"] or {"rank_by": "mean"})["rank_by"]
    return arguments


def check_length(*texts: str) -> None:
    """Refuse texts that are too long, which a page can send whatever its fields allow."""
    if any(len(text) > MOST_CHARACTERS for text in texts):
        raise gr.Error(f"At most {MOST_CHARACTERS} characters, please.")


def together(cosines: list[float], encoder: CrossEncoder, pairs: list[tuple[str, str]]) -> list[list[float]]:
    """Return a row of `SCORES` for each pair; the cross-encoder's is the mean of both orders, 0 to 1."""
    crosses = encoder.predict(pairs + [pair[::-1] for pair in pairs]).reshape(2, -1).mean(axis=0).tolist()
    rows = [((bi + cross) / 2, bi, cross) for bi, cross in zip(cosines, crosses, strict=True)]
    return [[round(score, 3) for score in row] for row in rows]


def scorer(
    start: SentenceTransformer | None, bi_encoder: SentenceTransformer, cross_encoder: CrossEncoder
) -> Callable[[str, str], list[list]]:
    """Return a function of two sentences that makes the rows of a table: model, score."""

    def cosine(encoder: SentenceTransformer, *sentences: str) -> float:
        return float(encoder.similarity(*encoder.encode(list(sentences))[:, None]))

    def score(first: str, second: str) -> list[list]:
        check_length(first, second)
        before = [["start", round(cosine(start, first, second), 3)]] if start else []
        scores = together([cosine(bi_encoder, first, second)], cross_encoder, [(first, second)])[0]
        mean, *each = map(list, zip(SCORES.values(), scores, strict=True))
        return [*before, *each, mean]

    return score


def searcher(
    sentences: list[str], vectors: torch.Tensor, bi_encoder: SentenceTransformer, cross_encoder: CrossEncoder, by: str
) -> Callable[[str, int], list[list]]:
    """Return a function of a query and a number that makes the rows of a table: sentence, `SCORES`; by one of them."""
    column = 1 + list(SCORES).index(by)

    def search(query: str, k: int) -> list[list]:
        check_length(query)
        (hits,) = util.semantic_search(bi_encoder.encode(query, convert_to_tensor=True), vectors, top_k=CANDIDATES)
        texts = [sentences[hit["corpus_id"]] for hit in hits]
        scores = together([hit["score"] for hit in hits], cross_encoder, [(query, text) for text in texts])
        return sorted(([text, *row] for text, row in zip(texts, scores, strict=True)), key=lambda row: -row[column])[
            :k
        ]

    return search


def duplicate_finder(
    counts: Counter[str], vectors: torch.Tensor, cross_encoder: CrossEncoder, by: str
) -> Callable[[float], list[list]]:
    """Return a function of the lowest score that makes the rows of a table: two sentences, one of `SCORES`."""
    column = list(SCORES).index(by)
    sentences = list(counts)
    repeats = [[text, f"(the same, {n} times)", 1.0] for text, n in counts.items() if n > 1]

    @functools.cache
    def nearest() -> list[list]:
        found = util.paraphrase_mining_embeddings(vectors, max_pairs=CANDIDATES, top_k=10)[:CANDIDATES]
        pairs = [(sentences[i], sentences[j]) for _, i, j in found]
        scores = together([cosine for cosine, _, _ in found], cross_encoder, pairs) if pairs else []
        rows = [[*pair, row[column]] for pair, row in zip(pairs, scores, strict=True)]
        return repeats + sorted(rows, key=lambda row: -row[2])

    return lambda lowest: [row for row in nearest() if row[2] >= lowest]


def main() -> None:
    arguments = parse()
    counts = arguments.counts
    bi_encoder = SentenceTransformer(str(arguments.models / "bi-encoder"))
    cross_encoder = CrossEncoder(str(arguments.models / "cross-encoder"))
    start = SentenceTransformer(arguments.start) if arguments.start else None
    vectors = bi_encoder.encode(list(counts), convert_to_tensor=True, show_progress_bar=True)
    search = searcher(list(counts), vectors, bi_encoder, cross_encoder, arguments.rank_by)
    by = SCORES[arguments.rank_by]
    first = [text for text in counts if len(text) <= MOST_CHARACTERS][:EXAMPLES]
    near = [[text, row[0]] for text in first for row in search(text, 2) if row[0] != text]  # it finds itself, too
    interface = functools.partial(gr.Interface, flagging_mode="never")
    sentence = functools.partial(gr.Textbox, max_length=MOST_CHARACTERS)
    table = functools.partial(gr.Dataframe, label="Results", wrap=True)
    tabs = {
        "Two sentences": interface(
            scorer(start, bi_encoder, cross_encoder),
            [sentence(label="First sentence"), sentence(label="Second sentence")],
            table(headers=["model", "score"]),
            examples=[pair for pair in near if len(pair[1]) <= MOST_CHARACTERS] or None,
            api_name="score",
        ),
        "Search": interface(
            search,
            [sentence(label="Query"), gr.Slider(1, CANDIDATES, 10, step=1, label="Results")],
            table(
                label=f"Results, by {by}",
                headers=["sentence", *SCORES.values()],
                column_widths=["49%", "17%", "17%", "17%"],
            ),
            examples=[[text, 10] for text in first] or None,
            api_name="search",
        ),
        "Duplicates": interface(
            duplicate_finder(counts, vectors, cross_encoder, arguments.rank_by),
            gr.Slider(0, 1, 0.8, label=f"{by.capitalize()}, at least"),
            table(headers=["first", "second", by], column_widths=["42%", "42%", "16%"]),
            api_name="duplicates",
        ),
    }
    gr.TabbedInterface(list(tabs.values()), list(tabs), title="Trans-Encoder").launch(
        server_name=arguments.host,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is uploaded here, but Gradio would take it
        # Another site's page must not reach this one under a name of its own (DNS rebinding).
        app_kwargs={"middleware": [] if arguments.host else [Middleware(TrustedHostMiddleware, OWN_NAMES)]},
    )


if __name__ == "__main__":
    main()
