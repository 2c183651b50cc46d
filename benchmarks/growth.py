#!/usr/bin/env python3
r"""Measure how time and memory grow with the number of pairs: scoring, and the start of a training.

python benchmarks/growth.py

Makes a tiny random BERT and random pairs, runs the scripts on them with empty caches, and prints a table. Times are
those of the CPU (user and system, all processes), since what else a machine does changes them least. Each work
is also done with `--least` pairs, whose time and memory are taken away: what is left is what the pairs cost. Memory is
the highest sum over the processes, looked at ten times a second: *own* is what they hold for themselves, *resident*
counts in the pages of memory-mapped files, too, which the system takes back when it needs them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORKS = {  # what is done -> script, model, other options
    "score, bi-encoder": ("score_pairs", "bi", []),
    "score, cross-encoder": ("score_pairs", "cross", []),
    "begin to train a cross-encoder (step 2)": ("distill_bi2cross", "plm", ["--total_batch_size", 32]),
    "begin to train a bi-encoder (step 3)": ("distill_cross2bi", "bi", ["--total_batch_size", 128]),
}
WORDS = ["how", "do", "i", "change", "my", "password", "card", "the", "is", "not", "late", "parcel", "cancel", "plan"]
PAIRS_PER_SENTENCE = 10  # for each distinct sentence; it stands in twice as many
MADE_ROWS = 500_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000], help="numbers of pairs")
    parser.add_argument("--least", type=int, default=1000, help="pairs of the run that the others are compared to")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a training (20)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--folder", help="where models and pairs are kept; by default they are thrown away")
    return parser.parse_args()


# --- what the scripts are given --------------------------------------------------------------------------------------


def make_models(folder: Path, width: int = 32, layers: int = 1, vocabulary: int | None = None) -> None:
    """Make a random BERT as a language model (`plm`), a bi- and a cross-encoder. `vocabulary`: its size, if larger."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from transencoder.encoders import load_bi_encoder, load_cross_encoder
    from transencoder.model_files import ModelOptions
    from transencoder.runtime.accelerator import quiet_libraries

    special = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    pieces = [*special.values(), *WORDS, *(f"{start}{digit}" for start in ("", "##") for digit in range(10))]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": token for name, token in special.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    torch.manual_seed(0)
    heads = max(width // 64, 2)
    size = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)
    size |= dict(vocab_size=vocabulary or len(pieces), max_position_embeddings=64)
    BertModel(BertConfig(**size)).save_pretrained(folder / "plm")
    fast.save_pretrained(folder / "plm")
    quiet_libraries()
    load_bi_encoder(str(folder / "plm"), ModelOptions("mean")).save_pretrained(folder / "bi")
    load_cross_encoder(str(folder / "plm")).save_pretrained(folder / "cross")


def make_pairs(path: Path, size: int, distinct: int | None = None, seed: int = 0) -> None:
    """Write random pairs with random scores, of sentences of four to nine words and a number that tells them apart."""
    random = np.random.default_rng(seed)
    sentences = pa.concat_arrays(list(make_sentences(distinct or max(size // PAIRS_PER_SENTENCE, 2), random)))
    schema = pa.schema([("sentence1", pa.large_string()), ("sentence2", pa.large_string()), ("score", pa.float32())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, size, MADE_ROWS):
            rows = min(MADE_ROWS, size - start)
            sides = [sentences.take(pa.array(random.integers(len(sentences), size=rows))) for _ in range(2)]
            writer.write_table(pa.table([*sides, random.random(rows, dtype=np.float32)], schema=schema))


def make_sentences(size: int, random: np.random.Generator) -> Iterator[pa.Array]:
    words = np.array(WORDS)
    for start in range(0, size, MADE_ROWS):
        rows = range(start, min(start + MADE_ROWS, size))
        drawn, lengths = words[random.integers(len(words), size=(len(rows), 9))], random.integers(4, 10, len(rows))
        texts = [" ".join([*some[:length], str(row)]) for some, length, row in zip(drawn, lengths, rows, strict=True)]
        yield pa.array(texts, pa.large_string())


# --- a run -----------------------------------------------------------------------------------------------------------


def run(work: str, pairs: Path, models: Path, steps: int) -> dict[str, float]:
    """Run a script once with empty caches.

    Returns:
        cpu, wall: seconds from the start of the process to its end. own, resident: peaks in MB (10^6 bytes).
    """
    script, model, words = WORKS[work]
    with tempfile.TemporaryDirectory(dir=pairs.parent) as folder:
        if script == "score_pairs":
            words = [*words, "--encoders", models / model, "--pairs", pairs, "--output", f"{folder}/out.parquet"]
        else:
            words = [*words, "--model_name_or_path", models / model, "--scores", pairs]
            words += ["--output_dir", f"{folder}/out"]
            words += ["--select_by", "last", "--max_steps", steps, "--checkpointing_steps", 0]
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, words)]
        # One thread: several that wait for each other would count the waiting as work.
        environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        peaks, started = {"own": 0, "resident": 0}, time.perf_counter()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                for name, value in memory(process.pid).items():
                    peaks[name] = max(peaks[name], value)
                time.sleep(0.1)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                sys.exit(f"{work} failed:\n{output.read()[-3000:]}")
        wall = time.perf_counter() - started
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, **{name: peaks[name] / 1e6 for name in peaks}}


def memory(pid: int) -> dict[str, int]:
    """Return the bytes that a process and its children hold now."""
    found = {"own": 0, "resident": 0}
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            now = process.memory_info()
            found["resident"] += now.rss
            found["own"] += now.rss - now.shared
    except psutil.NoSuchProcess:
        pass  # it has just ended
    return found


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(arguments.folder or name)
        if not (folder / "cross").exists():
            make_models(folder)
        files = {size: folder / f"pairs-{size}.parquet" for size in [arguments.least, *sorted(arguments.pairs)]}
        for size, path in files.items():
            if not path.exists():
                make_pairs(path, size)
        print("| work | pairs | CPU s | wall s | CPU s per million, first = 1 | own MB | resident MB |")
        print("| :--- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for work in arguments.works:
            least, first = run(work, files[arguments.least], folder, arguments.steps), None
            shown = ", ".join(f"{key} {value:.1f}" for key, value in least.items())
            print(f"{work}, {arguments.least} pairs: {shown}", file=sys.stderr, flush=True)
            for size, path in list(files.items())[1:]:
                found = run(work, path, folder, arguments.steps)
                rate = (found["cpu"] - least["cpu"]) / size
                first = first or rate
                own, resident = (found[name] - least[name] for name in ("own", "resident"))
                cells = [f"{found['cpu']:.0f}", f"{found['wall']:.0f}", f"{rate / first:.2f}"]
                cells += [f"{own:.0f}", f"{resident:.0f}"]
                print(f"| {work} | {size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
