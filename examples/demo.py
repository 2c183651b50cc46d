#!/usr/bin/env python3
"""Try the models of a run on a page: two sentences and their scores, and search in a file of sentences.

pip install gradio
python examples/demo.py runs/quickstart examples/sentences.txt

A run's models are sentence-transformers' own, and so is everything that is done with them here.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi.middleware import Middleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from sentence_transformers import CrossEncoder, SentenceTransformer, util

CANDIDATES = 50  # sentences that the bi-encoder finds for the cross-encoder to re-rank
MOST_CHARACTERS = 2000  # of a text; longer ones would hold up everybody else's
EXAMPLES = [
    ["How do I remove a card from my account?", "delete my credit card from my profile"],
    ["can I pay by card", "do you accept cash or only cards"],
    ["where is my parcel", "package has not arrived"],
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of run_transencoder.sh")
    parser.add_argument("sentences", type=Path, help="text file to search in, a sentence on each line")
    parser.add_argument("--host", help="address to listen on, such as 0.0.0.0 (default: this machine alone)")
    parser.add_argument("--start", help="bi-encoder to compare with (default: what step 1 of the run made)")
    arguments = parser.parse_args()
    starts = sorted((arguments.run / "contrastive").glob("*"))
    arguments.start = arguments.start or next(map(str, starts), None)
    for path in (arguments.run / "best" / "bi-encoder", arguments.run / "best" / "cross-encoder", arguments.sentences):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    return arguments


def check_length(*texts: str) -> None:
    """Refuse texts that are too long, which a page can send whatever its fields allow."""
    if any(len(text) > MOST_CHARACTERS for text in texts):
        raise gr.Error(f"At most {MOST_CHARACTERS} characters, please.")


def both_orders(encoder: CrossEncoder, query: str, texts: list[str]) -> list[float]:
    """Score a sentence against others: the means of both orders, 0 to 1."""
    pairs = [(query, text) for text in texts] + [(text, query) for text in texts]
    return encoder.predict(pairs).reshape(2, -1).mean(axis=0).tolist()


def scorer(
    start: SentenceTransformer | None, bi_encoder: SentenceTransformer, cross_encoder: CrossEncoder
) -> Callable[[str, str], list[list]]:
    """Return a function of two sentences that makes the rows of a table: model, score."""

    def cosine(encoder: SentenceTransformer, *sentences: str) -> float:
        return float(encoder.similarity(*encoder.encode(list(sentences))[:, None]))

    def score(first: str, second: str) -> list[list]:
        check_length(first, second)
        before = [["start", cosine(start, first, second)]] if start else []
        bi, cross = cosine(bi_encoder, first, second), both_orders(cross_encoder, first, [second])[0]
        rows = [*before, ["bi-encoder", bi], ["cross-encoder", cross], ["mean of both", (bi + cross) / 2]]
        return [[name, round(value, 3)] for name, value in rows]

    return score


def searcher(
    sentences: list[str], bi_encoder: SentenceTransformer, cross_encoder: CrossEncoder
) -> Callable[[str, int], list[list]]:
    """Return a function of a query and a number that makes the rows of a table: sentence, mean, both scores."""
    vectors = bi_encoder.encode(sentences, convert_to_tensor=True, show_progress_bar=True)

    def search(query: str, k: int) -> list[list]:
        check_length(query)
        (hits,) = util.semantic_search(bi_encoder.encode(query, convert_to_tensor=True), vectors, top_k=CANDIDATES)
        texts = [sentences[hit["corpus_id"]] for hit in hits]
        rows = [
            [text, round((hit["score"] + cross) / 2, 3), round(hit["score"], 3), round(cross, 3)]
            for text, hit, cross in zip(texts, hits, both_orders(cross_encoder, query, texts), strict=True)
        ]
        return sorted(rows, key=lambda row: -row[1])[:k]

    return search


def main() -> None:
    arguments = parse()
    lines = arguments.sentences.read_text(encoding="utf-8").splitlines()
    sentences = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    bi_encoder = SentenceTransformer(str(arguments.run / "best" / "bi-encoder"))
    cross_encoder = CrossEncoder(str(arguments.run / "best" / "cross-encoder"))
    start = SentenceTransformer(arguments.start) if arguments.start else None
    score = gr.Interface(
        scorer(start, bi_encoder, cross_encoder),
        [gr.Textbox(label=f"{which} sentence", max_length=MOST_CHARACTERS) for which in ("First", "Second")],
        gr.Dataframe(headers=["model", "score"], label="Scores"),
        examples=EXAMPLES,
        flagging_mode="never",
        api_name="score",
    )
    search = gr.Interface(
        searcher(sentences, bi_encoder, cross_encoder),
        [gr.Textbox(label="Query", max_length=MOST_CHARACTERS), gr.Slider(1, CANDIDATES, 10, step=1, label="Results")],
        gr.Dataframe(headers=["sentence", "mean of both", "bi-encoder", "cross-encoder"], label="Results", wrap=True),
        flagging_mode="never",
        api_name="search",
    )
    gr.TabbedInterface([score, search], ["Two sentences", "Search"], title="Trans-Encoder").launch(
        server_name=arguments.host,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is uploaded here, but Gradio would take it
        # Another site's page must not reach this one under a name of its own (DNS rebinding).
        app_kwargs={}
        if arguments.host
        else {"middleware": [Middleware(TrustedHostMiddleware, ["localhost", "127.0.0.1"])]},
    )


if __name__ == "__main__":
    main()
