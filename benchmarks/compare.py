#!/usr/bin/env python3
r"""Compare this collection with sentence-transformers: the same work, alternating, as ratios.

python benchmarks/compare.py --bi_encoder MODEL --plm MODEL --pairs FILE --sentences FILE --dev FILE

Each run is a process of its own. Its time begins when the libraries are imported and ends when the result is written:
reading, tokenizing, loading the model, every batch, saving. The peer is at its best sensible settings: bf16 autocast
where ours has it, fused AdamW, the same batch, the same number of steps, no evaluation. With --peer authors it trains
as the paper's authors do: by the `fit` of older versions, float32, plain AdamW. With --without, the other side is this
collection, too, less one of its optimizations.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORKS = {  # what is done -> the script that does it here
    "score, bi-encoder": "score_pairs",
    "score, cross-encoder": "score_pairs",
    "train cross-encoder (step 2)": "distill_bi2cross",
    "train bi-encoder (step 3)": "distill_cross2bi",
    "contrastive (step 1)": "train_contrastive",
    "a cycle": "",
}
# A cycle's works, each with where its input and its result lie in the folder.
CYCLE = ("score, bi-encoder", "train cross-encoder (step 2)", "score, cross-encoder", "train bi-encoder (step 3)")
BATCH = {"distill_bi2cross": 32, "distill_cross2bi": 128, "train_contrastive": 64}
EPOCHS = {"distill_bi2cross": 2, "distill_cross2bi": 5}  # of a cycle; elsewhere one
WITHOUT = {  # what is left out -> the options that do so, or the name in a module that becomes a function of nothing
    "length grouping": ["--length_window", "1"],
    "small batches": ["--eval_batch_tokens", "16384"],
    "first token only": "transencoder.encoders.read_first_token_only",
    "cheap dropout": "transencoder.training.use_cpu_dropout",
    "kept memory": "transencoder.training.keep_freed_memory",
    "released memory": "transencoder.training.release_freed_memory",
    "few primitives": "transencoder.runtime.accelerator.keep_few_primitives",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bi_encoder", required=True, help="bi-encoder: what scores, and what step 3 starts from")
    parser.add_argument("--plm", required=True, help="language model of the cross-encoder and of step 1")
    parser.add_argument("--pairs", required=True, help="pairs to score and to train on")
    parser.add_argument("--sentences", required=True, help="sentences of step 1")
    parser.add_argument("--num_pairs", type=int, default=4000, help="pairs to train on (4000); all are scored")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (5)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of all trainings (2e-4: for tiny models)")
    parser.add_argument("--dev", help="labelled pairs (column score) that a cycle's models are measured on")
    parser.add_argument("--peer", choices=("peer", "authors"), default="peer", help="how the peer trains (peer)")
    parser.add_argument(
        "--without", choices=WITHOUT, help="measure what this optimization brings, in place of the peer"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # of a worker: both sides of a pair have the same
    arguments = parser.parse_args()
    if "a cycle" in arguments.works and not arguments.dev:
        parser.error("a cycle needs --dev")
    return arguments


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """Say what a work reads and where it writes, the same for both sides."""

    work: str
    pairs: Path
    scores: Path | None
    cross: Path
    output: Path
    seed: int
    epochs: int = 1

    @property
    def script(self) -> str:
        """The script that does it here."""
        return WORKS[self.work]


def jobs_of(work: str, arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Return the work itself, or those of a cycle, each on what the one before it has written."""
    if work != "a cycle":
        output = folder / ("out.parquet" if WORKS[work] == "score_pairs" else "out")
        scores, cross = folder / "scores.parquet", folder / "cross"
        return [Job(work, Path(arguments.pairs), scores, cross, output, arguments.seed)]
    bi_scores, cross, cross_scores = folder / "1.parquet", folder / "new-cross", folder / "2.parquet"
    outputs = (bi_scores, cross, cross_scores, folder / "out")
    scores = (None, bi_scores, None, cross_scores)
    return [
        Job(part, folder / "pairs.parquet", read, cross, output, arguments.seed, EPOCHS.get(WORKS[part], 1))
        for part, read, output in zip(CYCLE, scores, outputs, strict=True)
    ]


def run_ours(job: Job, arguments: argparse.Namespace, without: str | None) -> None:
    """Run the script in this process, as a user starts it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a cycle runs several
    words = ["--mixed_precision", "bf16" if use_bf16() else "no"]
    if job.script == "score_pairs":
        encoder = arguments.bi_encoder if "bi-" in job.work else job.cross
        words += ["--encoders", encoder, "--pairs", job.pairs, "--output", job.output]
    else:
        model = arguments.bi_encoder if job.script == "distill_cross2bi" else arguments.plm
        words += ["--model_name_or_path", model, "--output_dir", job.output, "--select_by", "last"]
        words += ["--eval_steps", 10**6, "--checkpointing_steps", 0, "--num_epochs", job.epochs, "--seed", job.seed]
        words += ["--total_batch_size", BATCH[job.script], "--learning_rate", arguments.learning_rate]
    if job.script == "train_contrastive":
        words += ["--sentences", arguments.sentences, "--pooling", "mean", "--mlp_head", False]
        words += ["--num_sentences", arguments.num_pairs, "--max_length", 32]
    elif job.script == "distill_bi2cross":
        words += ["--scores", job.scores, "--swap", False, "--negatives", "clip"]  # as the peer's scores are cut off
    elif job.script == "distill_cross2bi":
        words += ["--scores", job.scores, "--max_length", 32]
    words += leave_out(without, job.script) if without else []
    sys.argv = [str(ROOT / "scripts" / f"{job.script}.py"), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def leave_out(shortcut: str, script: str) -> list[str]:
    """Return options that leave an optimization out; or none, and its function does nothing from now on."""
    means = WITHOUT[shortcut]
    if isinstance(means, list):
        takes_it = (script == "score_pairs") == (shortcut == "small batches")
        return means if takes_it else []
    module, _, name = means.rpartition(".")
    setattr(importlib.import_module(module), name, lambda *_: None)
    return []


def run_peer(job: Job, arguments: argparse.Namespace, folder: Path) -> None:
    """Do the same with sentence-transformers."""
    from transformers import set_seed

    set_seed(job.seed)  # of a cross-encoder's new head, which the trainer's own seed comes too late for
    if job.script == "score_pairs":
        peer_scores(job, arguments)
    elif arguments.peer == "authors":
        authors_train(job, arguments)
    else:
        peer_trains(job, arguments, folder)


def peer_scores(job: Job, arguments: argparse.Namespace) -> None:
    import pandas as pd
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    pairs = read_table(job.pairs)
    with torch.autocast("cuda" if use_gpu() else "cpu", torch.bfloat16, enabled=use_bf16()):
        if "bi-" in job.work:
            model = SentenceTransformer(arguments.bi_encoder)
            model.max_seq_length = 32
            sides = [model.encode(list(pairs[name]), batch_size=64) for name in ("sentence1", "sentence2")]
            scores = model.similarity_pairwise(*sides).float().numpy()
        else:
            model = CrossEncoder(str(job.cross), max_length=64)
            scores = model.predict(list(zip(pairs["sentence1"], pairs["sentence2"], strict=True)), batch_size=64)
    pd.DataFrame({**pairs, "score": scores.clip(0, 1)}).to_parquet(job.output)


def peer_trains(job: Job, arguments: argparse.Namespace, folder: Path) -> None:
    import datasets
    from sentence_transformers import CrossEncoder, SentenceTransformer, cross_encoder, sentence_transformer

    settings = dict(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH[job.script],
        num_train_epochs=job.epochs,
        learning_rate=arguments.learning_rate,
        weight_decay=0.01,
        warmup_steps=0.1 if job.script == "distill_bi2cross" else 0,
        bf16=use_bf16(),
        use_cpu=not use_gpu(),
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to="none",
        seed=job.seed,
        disable_tqdm=True,
    )
    if job.script == "distill_bi2cross":
        model = CrossEncoder(arguments.plm, num_labels=1, max_length=64)
        loss = cross_encoder.losses.BinaryCrossEntropyLoss(model)
        trainer, options = cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments
    else:
        model = SentenceTransformer(arguments.plm if job.script == "train_contrastive" else arguments.bi_encoder)
        model.max_seq_length = 32
        trainer = sentence_transformer.SentenceTransformerTrainer
        options = sentence_transformer.SentenceTransformerTrainingArguments
    if job.script == "train_contrastive":
        sentences = distinct_sentences(arguments)
        rows = datasets.Dataset.from_dict({"sentence1": sentences, "sentence2": sentences})
        loss = sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    else:
        rows = datasets.Dataset.from_parquet(str(job.scores), cache_dir=str(folder / "cache"))
        rows = rows.rename_column("score", "label")
        if job.script == "distill_cross2bi":
            loss = sentence_transformer.losses.CosineSimilarityLoss(model)
    trainer(model=model, args=options(**settings), train_dataset=rows, loss=loss).train()
    model.save_pretrained(str(job.output))


def authors_train(job: Job, arguments: argparse.Namespace) -> None:
    """Train by the loop that sentence-transformers had when the paper's code was written, and still has."""
    from sentence_transformers import CrossEncoder, InputExample, SentenceTransformer, sentence_transformer
    from torch.utils.data import DataLoader

    if job.script == "train_contrastive":
        examples = [InputExample(texts=[sentence, sentence]) for sentence in distinct_sentences(arguments)]
    else:
        table = pq.read_table(job.scores).to_pylist()
        examples = [InputExample(texts=[row["sentence1"], row["sentence2"]], label=row["score"]) for row in table]
    loader = DataLoader(examples, batch_size=BATCH[job.script], shuffle=True)
    settings = dict(epochs=job.epochs, optimizer_params={"lr": arguments.learning_rate}, show_progress_bar=False)
    settings["warmup_steps"] = len(loader) * job.epochs // 10 if job.script == "distill_bi2cross" else 0
    if job.script == "distill_bi2cross":
        model = CrossEncoder(arguments.plm, num_labels=1, max_length=64)
        model.old_fit(loader, **settings)
    else:
        model = SentenceTransformer(arguments.plm if job.script == "train_contrastive" else arguments.bi_encoder)
        model.max_seq_length = 32
        losses = sentence_transformer.losses
        contrastive = job.script == "train_contrastive"
        loss = (losses.MultipleNegativesRankingLoss if contrastive else losses.CosineSimilarityLoss)(model)
        model.old_fit([(loader, loss)], **settings)
    model.save_pretrained(str(job.output))


def use_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def use_bf16() -> bool:
    """Return whether both sides compute in bf16."""
    from transencoder.runtime.backends import choose_precision

    return choose_precision("auto") == "bf16"


def read_table(path: Path) -> dict[str, list[str]]:
    """Read both columns of a file of pairs."""
    from transencoder.data.tables import read_pairs

    pairs = read_pairs([str(path)], None)
    return {name: list(pairs[name]) for name in ("sentence1", "sentence2")}


def distinct_sentences(arguments: argparse.Namespace) -> list[str]:
    """Return those that our side draws, with the same seed."""
    from transencoder.data.pools import read_sentence_pool
    from transencoder.data.tables import sample

    pool = read_sentence_pool([arguments.sentences], None)
    return list(sample(pool, arguments.num_pairs, arguments.seed)["sentence"])


def worker(arguments: argparse.Namespace) -> None:
    """Do one run, and print its seconds and its peak memory beyond the imports, in MiB."""
    import accelerate  # noqa: F401
    import sentence_transformers  # noqa: F401
    import transformers  # noqa: F401

    import transencoder.training  # noqa: F401

    (side, work), folder = arguments.worker, Path(os.environ["COMPARE_FOLDER"])
    jobs = jobs_of(work, arguments, folder)
    before = peak_memory()
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        for job in jobs:
            if side == arguments.peer:
                run_peer(job, arguments, folder)
            else:
                run_ours(job, arguments, without=None if side == "ours" else side)
    seconds = time.perf_counter() - started
    memory = peak_memory() - before
    dev = [
        dev_score(str(job.output), arguments.dev) for job in jobs if WORKS[job.work] != "score_pairs" and len(jobs) > 1
    ]
    print(json.dumps({"seconds": seconds, "memory": memory, "dev": dev}))


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MiB.

    Of Linux's own accounts: the highest value that `resource` knows is handed down from the process that started this.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def dev_score(model: str, dev: str) -> float:
    """Return Spearman's rho x 100 of a trained model on the dev set."""
    from accelerate import Accelerator

    from transencoder.data.tasks import load_task
    from transencoder.encoders import load_encoder
    from transencoder.evaluation import DevSet

    encoder, accelerator = load_encoder(model).eval(), Accelerator(cpu=not use_gpu())
    return DevSet(load_task(dev), encoder.to(accelerator.device), accelerator, None).score(encoder)


# --- all runs --------------------------------------------------------------------------------------------------------


def measure(side: str, work: str, folder: Path, seed: int) -> dict[str, Any]:
    """Start a worker with fresh caches and return what it measured."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("cross", "scores.parquet", "pairs.parquet"):
            os.symlink(folder / name, Path(scratch) / name)
        environment = os.environ | {"COMPARE_FOLDER": scratch, "HF_DATASETS_CACHE": f"{scratch}/cache"}
        command = [sys.executable, *sys.argv, "--worker", side, work, "--seed", str(seed)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{side}, {work}:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Make a cross-encoder with a random head, to score with, and scored pairs, to train on."""
    import numpy as np
    import torch

    from transencoder.data.scores import write_scores
    from transencoder.data.tables import read_pairs
    from transencoder.encoders import load_cross_encoder

    torch.manual_seed(0)
    load_cross_encoder(arguments.plm).save_pretrained(folder / "cross")
    pairs = read_pairs([arguments.pairs], None)
    pairs = pairs.select(range(min(arguments.num_pairs, len(pairs))))
    scores = np.random.default_rng(0).random(len(pairs), dtype=np.float32)
    write_scores(folder / "scores.parquet", pairs, scores, {})
    pairs.select_columns(["sentence1", "sentence2"]).to_parquet(folder / "pairs.parquet")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return worker(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(arguments, folder)
        other = arguments.without or arguments.peer
        against = f"without {other}" if arguments.without else other
        print(
            f"| work | speed, ours / {against}: median (min - max) | peak memory above the imports, ours / {against} |"
        )
        print("| :--- | ---: | ---: |")
        for work in arguments.works:
            runs = []
            for turn in range(arguments.repeats):
                order = ("ours", other) if turn % 2 == 0 else (other, "ours")
                runs.append({side: measure(side, work, folder, turn + 1) for side in order})
                print(f"{work}, {turn + 1}: {runs[-1]}", file=sys.stderr)
            print(row(work, runs, other), flush=True)


def row(work: str, runs: list[dict[str, dict[str, Any]]], other: str) -> str:
    """Return a line of the table, for a cycle with the mean dev scores of both sides' cross- and bi-encoders."""
    ratios = [run[other]["seconds"] / run["ours"]["seconds"] for run in runs]
    memory = statistics.median(run["ours"]["memory"] / run[other]["memory"] for run in runs)
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
    scores = {
        side: [
            f"{statistics.mean(values):.2f} ({min(values):.2f} - {max(values):.2f})"
            for values in zip(*(run[side]["dev"] for run in runs), strict=True)
        ]
        for side in ("ours", other)
    }
    dev = ", ".join(f"{side} {' / '.join(values)}" for side, values in scores.items() if values)
    return f"| {work}{f' (dev, cross- / bi-encoder: {dev})' if dev else ''} | {shown} | {memory:.2f} |"


if __name__ == "__main__":
    main()
