#!/usr/bin/env python3
r"""This collection against sentence-transformers: the same work, in turns, as ratios.

python benchmarks/compare.py --bi_encoder MODEL --plm MODEL --pairs FILE --sentences FILE

Each run is a process of its own. Its time begins when the libraries are imported and ends when the result is written:
reading, tokenising, loading the model, every batch, saving. The peer is at its best sensible settings: bf16 autocast
where ours has it, fused AdamW, the same batch, the same number of steps, no evaluation.
"""

import argparse
import contextlib
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORKS = {  # what is done -> the script that does it here
    "score, bi-encoder": "score_pairs",
    "score, cross-encoder": "score_pairs",
    "train cross-encoder (step 2)": "distill_bi2cross",
    "train bi-encoder (step 3)": "distill_cross2bi",
    "contrastive (step 1)": "train_contrastive",
}
BATCH = {"distill_bi2cross": 32, "distill_cross2bi": 128, "train_contrastive": 64}
EPOCHS = 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bi_encoder", required=True, help="bi-encoder: what scores, and what step 3 starts from")
    parser.add_argument("--plm", required=True, help="language model of the cross-encoder and of step 1")
    parser.add_argument("--pairs", required=True, help="pairs to score and to train on")
    parser.add_argument("--sentences", required=True, help="sentences of step 1")
    parser.add_argument("--num_pairs", type=int, default=4000, help="pairs to train on (4000); all are scored")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (5)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- one run ---------------------------------------------------------------------------------------------------------


def run_ours(work: str, arguments: argparse.Namespace, folder: Path) -> None:
    """The script, in this process, as a user starts it."""
    script = WORKS[work]
    words = ["--mixed_precision", "bf16"] if use_bf16() else ["--mixed_precision", "no"]
    if script == "score_pairs":
        encoder = arguments.bi_encoder if "bi-" in work else folder / "cross"
        words += ["--encoders", encoder, "--pairs", arguments.pairs, "--output", folder / "out.parquet"]
    else:
        model = arguments.bi_encoder if script == "distill_cross2bi" else arguments.plm
        words += ["--model_name_or_path", model, "--output_dir", folder / "out", "--select_by", "last"]
        words += ["--eval_steps", 10**6, "--checkpointing_steps", 0, "--num_epochs", EPOCHS]
        words += ["--total_batch_size", BATCH[script]]
        if script == "train_contrastive":
            words += ["--sentences", arguments.sentences, "--pooling", "mean", "--mlp_head", False]
            words += ["--num_sentences", arguments.num_pairs, "--max_length", 32]
        else:
            words += ["--scores", folder / "scores.parquet", "--swap" if "2cross" in script else "--max_length"]
            words += [False if "2cross" in script else 32]
    sys.argv = [str(ROOT / "scripts" / f"{script}.py"), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_peer(work: str, arguments: argparse.Namespace, folder: Path) -> None:
    """The same with sentence-transformers."""
    if WORKS[work] == "score_pairs":
        peer_scores(work, arguments, folder)
    else:
        peer_trains(work, arguments, folder)


def peer_scores(work: str, arguments: argparse.Namespace, folder: Path) -> None:
    import pandas as pd
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    pairs = read_table(arguments.pairs)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=use_bf16()):
        if "bi-" in work:
            model = SentenceTransformer(arguments.bi_encoder)
            model.max_seq_length = 32
            sides = [model.encode(list(pairs[name]), batch_size=64) for name in ("sentence1", "sentence2")]
            scores = model.similarity_pairwise(*sides).float().numpy()
        else:
            model = CrossEncoder(str(folder / "cross"), max_length=64)
            scores = model.predict(list(zip(pairs["sentence1"], pairs["sentence2"], strict=True)), batch_size=64)
    pd.DataFrame({**pairs, "score": scores}).to_parquet(folder / "out.parquet")


def peer_trains(work: str, arguments: argparse.Namespace, folder: Path) -> None:
    import datasets
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer, cross_encoder, sentence_transformer

    script = WORKS[work]
    settings = dict(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH[script],
        num_train_epochs=EPOCHS,
        bf16=use_bf16(),
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if script == "distill_bi2cross":
        model = CrossEncoder(arguments.plm, num_labels=1, max_length=64)
        loss = cross_encoder.losses.BinaryCrossEntropyLoss(model)
        trainer, options = cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments
    else:
        model = SentenceTransformer(arguments.plm if script == "train_contrastive" else arguments.bi_encoder)
        model.max_seq_length = 32
        trainer = sentence_transformer.SentenceTransformerTrainer
        options = sentence_transformer.SentenceTransformerTrainingArguments
    if script == "train_contrastive":
        sentences = distinct_sentences(arguments)
        rows = datasets.Dataset.from_dict({"sentence1": sentences, "sentence2": sentences})
        loss = sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    else:
        rows = datasets.Dataset.from_parquet(str(folder / "scores.parquet"), cache_dir=str(folder / "cache"))
        rows = rows.rename_column("score", "label")
        if script == "distill_cross2bi":
            loss = sentence_transformer.losses.CosineSimilarityLoss(model)
    trainer(model=model, args=options(**settings), train_dataset=rows, loss=loss).train()
    model.save_pretrained(str(folder / "out"))


def use_bf16() -> bool:
    """Whether both sides compute in bf16."""
    from transencoder.engines import choose_precision

    return choose_precision("auto") == "bf16"


def read_table(path: str) -> dict[str, list[str]]:
    """Both columns of a file of pairs."""
    from transencoder.tables import read_pairs

    pairs = read_pairs([path], None)
    return {name: list(pairs[name]) for name in ("sentence1", "sentence2")}


def distinct_sentences(arguments: argparse.Namespace) -> list[str]:
    """Those that our side draws, with its default seed."""
    from transencoder.pools import read_sentence_pool
    from transencoder.tables import sample

    return list(sample(read_sentence_pool([arguments.sentences], None, None), arguments.num_pairs, 2021)["sentence"])


def worker(arguments: argparse.Namespace) -> None:
    """One run; prints its seconds and its peak memory beyond the imports, in MiB."""
    import accelerate  # noqa: F401
    import sentence_transformers  # noqa: F401
    import transformers  # noqa: F401

    (side, work), folder = arguments.worker, Path(os.environ["COMPARE_FOLDER"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        (run_ours if side == "ours" else run_peer)(work, arguments, folder)
    seconds = time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": seconds, "memory": memory}))


# --- all runs --------------------------------------------------------------------------------------------------------


def measure(side: str, work: str, folder: Path) -> dict[str, float]:
    """Start a worker with fresh caches and return what it measured."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("cross", "scores.parquet"):
            os.symlink(folder / name, Path(scratch) / name)
        environment = os.environ | {"COMPARE_FOLDER": scratch, "HF_DATASETS_CACHE": f"{scratch}/cache"}
        command = [sys.executable, *sys.argv, "--worker", side, work]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{side}, {work}:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """A cross-encoder with a random head, to score with, and scored pairs, to train on."""
    import numpy as np
    import torch

    from transencoder.encoders import CrossEncoder
    from transencoder.scoring import write_scores
    from transencoder.tables import read_pairs

    torch.manual_seed(0)
    CrossEncoder.from_pretrained(arguments.plm).save_pretrained(folder / "cross")
    pairs = read_pairs([arguments.pairs], None)
    pairs = pairs.select(range(min(arguments.num_pairs, len(pairs))))
    scores = np.random.default_rng(0).random(len(pairs), dtype=np.float32)
    write_scores(folder / "scores.parquet", pairs, scores, {})


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return worker(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(arguments, folder)
        print("| work | ours / peer, speed: median (min - max) | memory above the imports, ours / peer |")
        print("| :--- | ---: | ---: |")
        for work in arguments.works:
            runs = []
            for turn in range(arguments.repeats):
                order = ("ours", "peer") if turn % 2 == 0 else ("peer", "ours")
                runs.append({side: measure(side, work, folder) for side in order})
                print(f"{work}, {turn + 1}: {runs[-1]}", file=sys.stderr)
            ratios = [run["peer"]["seconds"] / run["ours"]["seconds"] for run in runs]
            memory = statistics.median(run["ours"]["memory"] / run["peer"]["memory"] for run in runs)
            shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            print(f"| {work} | {shown} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
