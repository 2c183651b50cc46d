#!/usr/bin/env python3
r"""Find rows that say the same in a file of sentences: exact repeats, and groups of paraphrases.

python scripts/find_duplicates.py --bi_encoder runs/mine/best/bi-encoder --cross_encoder runs/mine/best/cross-encoder \
    --sentences sentences.txt --output duplicates.csv
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

from transencoder.config.tools import DuplicatesArguments, parse_tool
from transencoder.data.formats import write_rows
from transencoder.data.scores import check_rows_output
from transencoder.data.tables import SENTENCES, read_rows
from transencoder.data.tokens import tokenize, unique_sentences
from transencoder.embeddings import embed, similarities
from transencoder.errors import InputError, one_line_errors, printable
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_cross_encoder
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log, start
from transencoder.runtime.optional import load_optional
from transencoder.runtime.records import model_identity
from transencoder.scoring import Teachers
from transencoder.search.clusters import candidate_pairs, communities, repeated, rows_of, sweep, texts_of
from transencoder.search.index import check_searchable, vector_shards
from transencoder.search.neighbours import vector_index

# What a file of this script begins with.
BEGINS = {".csv": '"cluster"', ".jsonl": '{"cluster"'}


@one_line_errors
def main() -> None:
    arguments = parse_tool(DuplicatesArguments, __doc__)
    output, keep, options = Path(arguments.output), arguments.keep or [], model_options(arguments)
    check_rows_output(output, BEGINS, arguments.sentences)
    if not arguments.sentences:
        raise InputError("--sentences: give the file to search through")
    for name in ("faiss", "networkx"):
        load_optional(name)
    check_bi_encoder(arguments.bi_encoder, options)
    if arguments.cross_encoder:
        check_cross_encoder(arguments.cross_encoder, "--cross_encoder", options)
    rows = read_rows(arguments.sentences, arguments, keep)
    sentences, (places,) = unique_sentences(rows, SENTENCES)
    accelerator = start(arguments)

    more = {"neighbours": arguments.neighbours, "seed": arguments.seed, "label": arguments.label}
    if arguments.cross_encoder:
        more["cross_encoder"] = model_identity(arguments.cross_encoder, None)
    shards = vector_shards(output, sentences, arguments, accelerator, **more)
    inference = Inference(accelerator, arguments.eval_batch_tokens, shards)
    encoder = inference.load(arguments.bi_encoder, options)
    check_searchable(encoder)
    tokens = tokenize(sentences, SENTENCES, encoder.preprocessor())
    vectors = embed([(encoder, [tokens])], shards.folder / "sentences.vec", inference)
    index = vector_index(vectors, shards.folder, arguments.seed, encoder.similarity)
    pairs = candidate_pairs(index, vectors, arguments.neighbours)
    scores = similarities(vectors, *pairs.T, encoder.similarity)
    if arguments.cross_encoder and len(pairs):
        texts = texts_of(pairs, sentences)
        teacher = Teachers([arguments.cross_encoder], options=options, both_orders=True)
        scores = (scores + teacher.score([texts], inference)[0]) / 2
    groups = communities(pairs, scores, arguments.threshold, arguments.seed)
    shards.remove()

    if arguments.sweep:
        print(printable(sweep(pairs, scores, sentences, arguments.seed)))
    if not groups and len(pairs):
        best = scores.argmax()
        nearest = " and ".join(f'"{text:.60}"' for text in sentences[pairs[best]]["sentence"])
        log(
            f"no pair reaches --threshold {arguments.threshold} (--sweep shows lower ones); the nearest has "
            f"{scores[best]:.3f}: {nearest}"
        )
    members = rows_of(places)
    repeats = repeated(members, groups)
    similar = [[(row, score) for one, score in group for row in members[one]] for group in groups]
    names = [*(["file"] if len(arguments.sentences) > 1 else []), "row", *keep, "sentence"]
    exact = {row for same in members if len(same) > 1 for row in same}
    lines = (
        [number, "exact" if row in exact else "similar", len(group), round(score, 3), *map(rows[row].get, names)]
        for number, group in enumerate([*repeats, *similar], start=1)
        for row, score in group
    )
    write_rows(output, ["cluster", "kind", "size", "score", *names], lines)
    log(
        f"{output}: {len(repeats)} groups of exact repeats with {sum(map(len, repeats))} rows, "
        f"{len(similar)} groups of similar sentences with {sum(map(len, similar))} rows "
        f"({sum(row in exact for group in similar for row, _ in group)} of them exact repeats), of {len(rows)} rows"
    )


if __name__ == "__main__":
    main()
