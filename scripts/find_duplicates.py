#!/usr/bin/env python3
r"""Find groups of paraphrases in a file of sentences, and write them as CSV.

python scripts/find_duplicates.py --bi_encoder runs/mine/best/bi-encoder --cross_encoder runs/mine/best/cross-encoder \
    --sentences sentences.txt --output duplicates.csv
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import datasets

from transencoder.config.tools import DuplicatesArguments, parse_tool
from transencoder.data.formats import write_rows
from transencoder.data.tables import PAIRS, SENTENCES, read_sentences
from transencoder.data.tokens import tokenize
from transencoder.embeddings import embed
from transencoder.errors import InputError, one_line_errors
from transencoder.inference import Inference
from transencoder.model_checks import check_bi_encoder, check_cross_encoder
from transencoder.model_files import model_options
from transencoder.runtime.accelerator import log, start
from transencoder.runtime.optional import load_optional
from transencoder.scoring import Teachers
from transencoder.search.clusters import candidate_pairs, communities
from transencoder.search.index import check_searchable, vector_shards
from transencoder.search.neighbours import vector_index


@one_line_errors
def main() -> None:
    arguments = parse_tool(DuplicatesArguments, __doc__)
    output = Path(arguments.output)
    if output.suffix != ".csv":
        raise InputError(f"--output {output}: must be the name of a .csv file")
    if not arguments.sentences:
        raise InputError("--sentences: give the file to search through")
    options = model_options(arguments)
    for name in ("faiss", "networkx"):
        load_optional(name)
    check_bi_encoder(arguments.bi_encoder, options)
    check_cross_encoder(arguments.cross_encoder, "--cross_encoder", options)
    sentences = read_sentences(arguments.sentences, arguments)
    accelerator = start(arguments)

    output.parent.mkdir(parents=True, exist_ok=True)
    shards = vector_shards(output, sentences, arguments, accelerator)
    inference = Inference(accelerator, arguments.eval_batch_tokens)
    encoder = inference.load(arguments.bi_encoder, options)
    check_searchable(encoder)
    kept = dataclasses.replace(inference, shards=shards)
    tokens = tokenize(sentences, SENTENCES, encoder.preprocessor())
    vectors = embed([(encoder, [tokens])], shards.folder / "sentences.vec", kept)
    index = vector_index(vectors, shards.folder, arguments.seed, encoder.similarity)
    rows = candidate_pairs(index, vectors, arguments.neighbours)
    pairs = datasets.Dataset.from_dict({name: sentences[rows[:, i]]["sentence"] for i, name in enumerate(PAIRS)})
    teachers = Teachers([arguments.bi_encoder, arguments.cross_encoder], options=options, both_orders=True)
    (scores,) = teachers.score([pairs], inference)
    groups = communities(rows, scores, arguments.threshold, arguments.seed)
    shards.remove()

    lines = (
        [number, len(group), round(float(score), 3), sentences[row]["sentence"]]
        for number, group in enumerate(groups, start=1)
        for row, score in group
    )
    write_rows(output, ["cluster", "size", "score", "sentence"], lines)
    log(f"{output}: {len(groups)} groups with {sum(map(len, groups))} of {len(sentences)} sentences")


if __name__ == "__main__":
    main()
