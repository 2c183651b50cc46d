#!/usr/bin/env python3
r"""Compare this collection with sentence-transformers: the same work, alternating, as ratios.

python benchmarks/compare.py --bi_encoder MODEL --plm MODEL --pairs FILE --sentences FILE --dev FILE

A run lasts from the end of the imports to the written result: reading, tokenizing, loading the model, every batch,
saving. The peer is at its best sensible settings: bf16 autocast where ours has it, fused AdamW, the same batch, the
same steps, no evaluation; on a GPU also data-loader workers, large scoring batches, flash attention where installed.
Another side may be this collection less one of its optimizations. Each run is a process of its own, or with --keep all
those of a side are, where starting Python takes longer than the work.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

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
    "CUDA graphs": ["--cuda_graphs", "off"],
    "length grouping": ["--length_window", "1"],
    "small batches": ["--eval_batch_tokens", "16384"],
    "first token only": "transencoder.encoders.read_first_token_only",
    "cheap dropout": "transencoder.training.use_cpu_dropout",
    "kept memory": "transencoder.training.keep_freed_memory",
    "released memory": "transencoder.training.release_freed_memory",
    "few primitives": "transencoder.runtime.accelerator.keep_few_primitives",
}
# Random models: width, layers, rows of the vocabulary. What weights are is nothing to speed.
SIZES = {"tiny": (32, 1, None), "minilm": (384, 6, 30522), "bert-base": (768, 12, 30522)}
WARM_UP_PAIRS, MADE_PAIRS = 640, 27000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", choices=SIZES, help="make models of this size, and pairs, where none are given")
    parser.add_argument("--bi_encoder", help="bi-encoder: what scores, and what step 3 starts from")
    parser.add_argument("--plm", help="language model of the cross-encoder and of step 1")
    parser.add_argument("--pairs", help="pairs to score and to train on")
    parser.add_argument("--sentences", help="sentences of step 1")
    parser.add_argument("--num_pairs", type=int, default=4000, help="pairs to train on (4000); all are scored")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (5)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="of all trainings (2e-4: for tiny models)")
    parser.add_argument("--dev", help="labelled pairs (column score) that a cycle's models are measured on")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=("peer", *WITHOUT),
        default=["peer"],
        metavar="SIDE",
        help=f"the peer, or what is left out of ours: {', '.join(WITHOUT)} (peer)",
    )
    parser.add_argument("--keep", action="store_true", help="one process for all runs of a side, and warm-up runs")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after this time")
    parser.add_argument("--json", help="also write every run here, as it ends")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "a cycle" in arguments.works and not arguments.dev:
        parser.error("a cycle needs --dev")
    if not arguments.made and not all([arguments.bi_encoder, arguments.plm, arguments.pairs, arguments.sentences]):
        parser.error("--bi_encoder, --plm, --pairs and --sentences are needed, or --made")
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


def jobs_of(work: str, given: Path, folder: Path, seed: int) -> list[Job]:
    """Return the work itself, or those of a cycle, each on what the one before it has written.

    Args:
        given: folder with the pairs and scores.
        folder: for results.
    """
    cross = given.parent / "cross"
    if work != "a cycle":
        output = folder / ("out.parquet" if WORKS[work] == "score_pairs" else "out")
        return [Job(work, given / "all.parquet", given / "scores.parquet", cross, output, seed)]
    outputs = (folder / "1.parquet", folder / "new-cross", folder / "2.parquet", folder / "out")
    scores = (None, outputs[0], None, outputs[2])
    return [
        Job(part, given / "pairs.parquet", read, outputs[1], output, seed, EPOCHS.get(WORKS[part], 1))
        for part, read, output in zip(CYCLE, scores, outputs, strict=True)
    ]


def run_ours(job: Job, arguments: argparse.Namespace, without: str) -> float | None:
    """Run the script in this process, as a user starts it; return the examples per second of its training loop."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # there are several
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
        words += ["--num_sentences", sentence_count(job), "--max_length", 32]
    elif job.script == "distill_bi2cross":
        words += ["--scores", job.scores, "--swap", False, "--negatives", "clip"]  # as the peer's scores are cut off
    elif job.script == "distill_cross2bi":
        words += ["--scores", job.scores, "--max_length", 32]
    words += leave_out(without, job.script)
    sys.argv = [str(ROOT / "scripts" / f"{job.script}.py"), *map(str, words)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    record = job.output / "run.json"
    return json.loads(record.read_text())["examples_per_second"] if record.exists() else None


def leave_out(name: str, script: str) -> list[str]:
    """Return options that leave an optimization out; or none, and its function does nothing from now on."""
    means = WITHOUT.get(name, [])
    if isinstance(means, list):
        takes_it = (script == "score_pairs") == (name == "small batches")
        return means if takes_it else []
    module, _, name = means.rpartition(".")
    setattr(importlib.import_module(module), name, lambda *_: None)
    return []


def run_peer(job: Job, arguments: argparse.Namespace, folder: Path) -> float | None:
    """Do the same with sentence-transformers; return the examples per second of its training loop."""
    from transformers import set_seed

    set_seed(job.seed)  # of a cross-encoder's new head, which the trainer's own seed comes too late for
    return peer_scores(job, arguments) if job.script == "score_pairs" else peer_trains(job, arguments, folder)


def peer_options() -> dict[str, Any]:
    """Return how the peer loads a model: with flash attention, and then without padding, where that is installed."""
    from transformers.utils import is_flash_attn_2_available

    flash = use_gpu() and is_flash_attn_2_available()
    return {"model_kwargs": {"attn_implementation": "flash_attention_2"}} if flash else {}


def peer_scores(job: Job, arguments: argparse.Namespace) -> None:
    import pandas as pd
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    pairs, size = read_table(job.pairs), 1024 if use_gpu() else 64
    with torch.autocast("cuda" if use_gpu() else "cpu", torch.bfloat16, enabled=use_bf16()):
        if "bi-" in job.work:
            model = SentenceTransformer(arguments.bi_encoder, **peer_options())
            model.max_seq_length = 32
            columns = [list(pairs[name]) for name in ("sentence1", "sentence2")]
            sides = [model.encode(column, batch_size=size, convert_to_tensor=True) for column in columns]
            scores = model.similarity_pairwise(*sides).float().cpu().numpy()
        else:
            model = CrossEncoder(str(job.cross), max_length=64, **peer_options())
            scores = model.predict(list(zip(pairs["sentence1"], pairs["sentence2"], strict=True)), batch_size=size)
    pd.DataFrame({**pairs, "score": scores.clip(0, 1)}).to_parquet(job.output)


def peer_trains(job: Job, arguments: argparse.Namespace, folder: Path) -> float:
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
        dataloader_num_workers=4 if use_gpu() else 0,
        save_strategy="no",
        report_to="none",
        seed=job.seed,
        disable_tqdm=True,
    )
    if job.script == "distill_bi2cross":
        model = CrossEncoder(arguments.plm, num_labels=1, max_length=64, **peer_options())
        loss = cross_encoder.losses.BinaryCrossEntropyLoss(model)
        trainer, options = cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments
    else:
        start = arguments.plm if job.script == "train_contrastive" else arguments.bi_encoder
        model = SentenceTransformer(start, **peer_options())
        model.max_seq_length = 32
        trainer = sentence_transformer.SentenceTransformerTrainer
        options = sentence_transformer.SentenceTransformerTrainingArguments
    if job.script == "train_contrastive":
        sentences = distinct_sentences(arguments, job)
        rows = datasets.Dataset.from_dict({"sentence1": sentences, "sentence2": sentences})
        loss = sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    else:
        rows = datasets.Dataset.from_parquet(str(job.scores), cache_dir=str(folder / "cache"))
        rows = rows.rename_column("score", "label")
        if job.script == "distill_cross2bi":
            loss = sentence_transformer.losses.CosineSimilarityLoss(model)
    done = trainer(model=model, args=options(**settings), train_dataset=rows, loss=loss).train()
    model.save_pretrained(str(job.output))
    return done.metrics["train_samples_per_second"]


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


def sentence_count(job: Job) -> int:
    """Return how many sentences step 1 takes: as many as there are scored pairs."""
    import pyarrow.parquet as pq

    return pq.read_metadata(job.scores).num_rows


def distinct_sentences(arguments: argparse.Namespace, job: Job) -> list[str]:
    """Return those that our side draws, with the same seed."""
    from transencoder.data.pools import read_sentence_pool
    from transencoder.data.tables import sample

    pool = read_sentence_pool([arguments.sentences], None)
    return list(sample(pool, sentence_count(job), job.seed)["sentence"])


def dev_score(model: str, dev: str) -> float:
    """Return Spearman's rho x 100 of a trained model on the dev set."""
    from accelerate import Accelerator

    from transencoder.data.tasks import load_task
    from transencoder.encoders import load_encoder
    from transencoder.evaluation import DevSet

    encoder, accelerator = load_encoder(model).eval(), Accelerator(cpu=not use_gpu())
    return DevSet(load_task(dev), encoder.to(accelerator.device), accelerator, None).score(encoder)


def peak_memory() -> float:
    """Return the most memory that this process has held, in MiB: of the GPU since a run began, else of the machine.

    Of Linux's own accounts: the highest value that `resource` knows is handed down from the process that started this.
    """
    import torch

    if use_gpu():
        return torch.cuda.max_memory_reserved() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def answer(request: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Do one run; return its seconds, examples per second of the loop, and peak memory beyond the imports in MiB."""
    import gc

    import datasets
    import torch

    folder, work, side = Path(request["folder"]), request["work"], request["side"]
    if work == "prepare":
        return prepare(arguments, folder)
    gc.collect()
    if use_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        datasets.config.HF_DATASETS_CACHE = scratch / "cache"  # nothing is read or tokenized beforehand
        jobs, rates = jobs_of(work, folder / request["size"], scratch, request["seed"]), []
        before, started = 0 if use_gpu() else peak_memory(), time.perf_counter()
        for job in jobs:
            peer = side == "peer"
            rates.append(run_peer(job, arguments, scratch) if peer else run_ours(job, arguments, side))
        seconds, memory = time.perf_counter() - started, peak_memory() - before
        trained = [job for job in jobs if job.script != "score_pairs" and len(jobs) > 1]
        dev = [dev_score(str(job.output), arguments.dev) for job in trained]
    return dict(seconds=seconds, memory=memory, loop=rates[0] if len(jobs) == 1 else None, dev=dev)


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make a cross-encoder with a random head, to score with, and scored pairs, to train on; measure the machine.

    Returns:
        device; matrix_rate: operations per second of a large matrix product; operations: of an example of each
        training, six for each weight of the layers and each token that is no padding.
    """
    import numpy as np
    import torch

    from transencoder.data.scores import write_scores
    from transencoder.data.tables import read_pairs
    from transencoder.encoders import load_cross_encoder

    torch.manual_seed(0)
    encoder = load_cross_encoder(arguments.plm)
    encoder.save_pretrained(folder / "cross")
    everything = read_pairs([arguments.pairs], None)
    for name, size in (("full", arguments.num_pairs), ("small", WARM_UP_PAIRS)):
        (folder / name).mkdir()
        pairs = everything.select(range(min(size, len(everything))))
        write_scores(folder / name / "scores.parquet", pairs, np.random.default_rng(0).random(len(pairs)), {})
        pairs = pairs.select_columns(["sentence1", "sentence2"])
        pairs.to_parquet(folder / name / "pairs.parquet")
        whole = everything.select_columns(["sentence1", "sentence2"]) if name == "full" else pairs
        whole.to_parquet(folder / name / "all.parquet")
    weights = sum(p.numel() for name, p in encoder.backbone.named_parameters() if "embeddings" not in name)
    some = everything.select(range(min(1000, len(everything))))
    tokens = encoder.preprocessor(max_length=64)(list(some["sentence1"]), list(some["sentence2"]))["input_ids"]
    mean = len(tokens.flatten()) / len(tokens)  # two sentences have one more separator each than a pair
    operations = {script: 6 * weights * (mean + (script != "distill_bi2cross")) for script in BATCH}
    device = torch.device("cuda" if use_gpu() else "cpu")
    name = torch.cuda.get_device_name() if use_gpu() else "CPU"
    return dict(device=name, torch=torch.__version__, matrix_rate=matrix_rate(device), operations=operations)


def matrix_rate(device: Any) -> float:
    """Return the operations per second of a large matrix product, in the precision of the runs."""
    import torch

    size, dtype = (8192 if device.type == "cuda" else 1024), torch.bfloat16 if use_bf16() else torch.float32
    one = torch.randn(size, size, device=device, dtype=dtype)
    for repeats in (5, 20):  # the first ones are a warm-up
        started = time.perf_counter()
        for _ in range(repeats):
            product = one @ one
        product.sum().item()  # waits
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def worker(arguments: argparse.Namespace) -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    import accelerate  # noqa: F401
    import sentence_transformers  # noqa: F401
    import transformers  # noqa: F401

    import transencoder.training  # noqa: F401

    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(json.loads(line), arguments)
        print(json.dumps(found), flush=True)


# --- all runs --------------------------------------------------------------------------------------------------------


class Side:
    """A process that does runs of one side, or of several that differ in options."""

    def __init__(self, name: str, words: list[str], errors: Path):
        command = [sys.executable, __file__, *words, "--worker", name]
        self.name, self.errors = name, errors
        with errors.open("a") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request; ends with what the process said last, if it failed."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}, {request['work']}:\n{self.errors.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    arguments, words = parse(), sys.argv[1:]
    if arguments.worker:
        return worker(arguments)
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.made:
            words += make(arguments, folder)
        sides = ["ours", *arguments.against]
        processes = {name: Side(name, words, folder / f"{name}.log") for name in dict.fromkeys(map(process_of, sides))}
        report = processes["ours"].ask(work="prepare", side="ours", folder=str(folder)) | {"runs": []}
        report["arguments"] = {key: value for key, value in vars(arguments).items() if key != "worker"}
        turns = range(0 if arguments.keep else 1, arguments.repeats + 1)  # turn 0 warms up
        plan = [(turn, work, side) for turn in turns for work in arguments.works for side in order(turn, sides)]
        for turn, work, side in plan:
            if time.monotonic() > deadline:
                print(f"{arguments.minutes} minutes are over: {work}, {turn} and what comes after it is not done")
                break
            name = process_of(side)
            if not arguments.keep:
                processes[name].close()
                processes[name] = Side(name, words, folder / f"{name}.log")
            size = "full" if turn else "small"
            found = processes[name].ask(work=work, side=side, folder=str(folder), size=size, seed=turn + 1)
            report["runs"] += [dict(work=work, side=side, turn=turn, **found)] if turn else []
            print(f"{work}, {turn}, {side}: {found}", file=sys.stderr, flush=True)
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
        for process in processes.values():
            process.close()
    print("\n".join(table(report, arguments)))


def make(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Make models and pairs that are not given; return the options that name them."""
    import growth

    made, pairs = folder / "made", folder / "pairs.parquet"
    if not (arguments.bi_encoder and arguments.plm):
        growth.make_models(made, *SIZES[arguments.made])
    if not (arguments.pairs and arguments.sentences):
        size = max(arguments.num_pairs, WARM_UP_PAIRS if arguments.made == "tiny" else MADE_PAIRS)
        growth.make_pairs(pairs, size, distinct=3 * size // 2)
    paths = dict(bi_encoder=made / "bi", plm=made / "plm", pairs=pairs, sentences=pairs)
    return [word for key, path in paths.items() if not getattr(arguments, key) for word in (f"--{key}", str(path))]


def order(turn: int, sides: list[str]) -> list[str]:
    """Return the sides, backwards in every second turn."""
    return sides if turn % 2 else sides[::-1]


def process_of(side: str) -> str:
    """Return whose process does the runs of a side: what options leave out does not need one of its own."""
    return "ours" if isinstance(WITHOUT.get(side), list) else side


def table(report: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return the lines of the table: ours / the other side, median (lowest - highest) of the turns that both have."""
    header = ["work", "against", "wall time", "in the loop", "peak memory", "examples/s", "share of the matrix rate"]
    lines = [f"| {' | '.join(header)} |", f"| :--- | :--- {'| ---: ' * 5}|"]
    for work in arguments.works:
        ours = {run["turn"]: run for run in report["runs"] if (run["work"], run["side"]) == (work, "ours")}
        for other in arguments.against:
            runs = [run for run in report["runs"] if (run["work"], run["side"]) == (work, other)]
            both = [(ours[run["turn"]], run) for run in runs if run["turn"] in ours]
            if not both:
                continue
            loops = [one["loop"] / two["loop"] for one, two in both if one["loop"]]
            rate = statistics.median(one["loop"] for one, _ in both) if loops else None
            share = rate and rate * report["operations"][WORKS[work]] / report["matrix_rate"]
            memory = f"{statistics.median(one['memory'] / max(two['memory'], 1) for one, two in both):.2f}"
            if arguments.keep and report["device"] == "CPU":
                memory = "-"  # of the process since it began, not of the run
            shown = other if other == "peer" else f"without {other}"
            cells = [spread([two["seconds"] / one["seconds"] for one, two in both]), spread(loops), memory]
            cells += [f"{rate:.0f}" if rate else "-", f"{share:.1%}" if rate else "-"]
            lines.append(f"| {work}{dev_scores(both, other)} | {shown} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})" if values else "-"


def dev_scores(both: list[tuple[dict[str, Any], dict[str, Any]]], other: str) -> str:
    """Return, for a cycle, the mean dev scores of both sides' cross- and bi-encoders."""
    means = []
    for name, runs in zip(("ours", other), zip(*both, strict=True), strict=True):
        values = [f"{statistics.mean(dev):.2f}" for dev in zip(*(run["dev"] for run in runs), strict=True)]
        means += [f"{name} {' / '.join(values)}"] if values else []
    return f" (dev, cross- / bi-encoder: {', '.join(means)})" if means else ""


if __name__ == "__main__":
    main()
