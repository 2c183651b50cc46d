#!/usr/bin/env python3
r"""What mining takes: time of each phase, memory and disk, for several numbers of sentences.

python benchmarks/mining.py --bi_encoder MODEL --sentences FILE FILE --sizes 50000 100000 200000

Sentences beyond those of the files are recombined: the first half of one's words and the second half of another's,
drawn with a seed. The mix is the default one, and each size is a process of its own, beginning with an empty cache.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transencoder.arguments import DEFAULT_MIX
from transencoder.pools import read_sentence_pool

PHASES = ("encoding", "by words", "by vectors", "writing")
INTERVAL = 0.5  # seconds between two looks at the process


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bi_encoder", required=True, help="bi-encoder that says what is near")
    parser.add_argument("--sentences", nargs="+", required=True, help="files of sentences, or of pairs of them")
    parser.add_argument("--sizes", nargs="+", type=int, default=[50_000, 100_000, 200_000], help="how many")
    parser.add_argument("--seed", type=int, default=1, help="of the recombinations (1)")
    return parser.parse_args()


def recombined(sentences: list[str], size: int, seed: int) -> list[str]:
    """`size` distinct sentences in an order that is drawn: those given, then halves of two of them put together."""
    rng = random.Random(seed)
    found = dict.fromkeys(rng.sample(sentences, len(sentences))[:size])
    while len(found) < size:
        first, second = (rng.choice(sentences).split() for _ in range(2))
        found[" ".join(first[: len(first) // 2] + second[len(second) // 2 :])] = None
    return rng.sample(list(found), size)


def disk_use(folder: Path) -> int:
    """Bytes that the files in a folder take."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # it went while we looked
            continue
    return total


def note_ends(parts: Path, started: float, ends: dict[str, float]) -> None:
    """Set each phase's end, in seconds from the start, to when its newest part was written."""
    for path in parts.glob("*.npy"):
        kind, number = path.name.split("-")[:2]
        phase = "encoding"
        if kind == "drawn":
            phase = "by words" if DEFAULT_MIX[int(number)].startswith("lexical") else "by vectors"
        try:
            ends[phase] = max(ends.get(phase, 0.0), path.stat().st_mtime - started)
        except FileNotFoundError:  # it went while we looked
            continue


def mine(sentences: list[str], arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Mine once, in an empty folder.

    Returns:
        Seconds of each phase; the peaks of rss and anonymous memory, and of disk, in bytes; pairs.
    """
    source, output, cache = folder / "sentences.txt", folder / "pairs.parquet", folder / "cache"
    source.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    words = ["--encoders", arguments.bi_encoder, "--sentences", source, "--output", output]
    command = [sys.executable, ROOT / "scripts" / "mine_pairs.py", *words]
    started, ends, peak = time.time(), {}, dict.fromkeys(("rss", "anonymous", "disk"), 0)
    with tempfile.TemporaryFile("w+") as text:
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=text, stderr=text)
        looked_at = psutil.Process(process.pid)
        while process.poll() is None:
            memory = looked_at.memory_info()
            peak["rss"] = max(peak["rss"], memory.rss)
            peak["anonymous"] = max(peak["anonymous"], memory.rss - memory.shared)  # what no file stands behind
            peak["disk"] = max(peak["disk"], disk_use(folder))
            note_ends(folder / f".{output.name}.parts", started, ends)
            time.sleep(INTERVAL)
        ends["writing"] = time.time() - started
        if process.returncode:
            text.seek(0)
            sys.exit(f"mining failed:\n{text.read()[-3000:]}")
    times = [0.0, *(ends[phase] for phase in PHASES)]
    seconds = {phase: after - before for phase, before, after in zip(PHASES, times, times[1:], strict=False)}
    return {**seconds, **peak, "pairs": pq.read_metadata(output).num_rows}


def main() -> None:
    arguments = parse()
    given = read_sentence_pool(arguments.sentences, None, None)["sentence"]
    print(f"{len(given)} distinct sentences in the files", file=sys.stderr)
    print("| sentences | pairs | encoding | by words | by vectors | writing | RSS | anonymous | disk |")
    print("| ---: |" + " ---: |" * 8)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            taken = mine(recombined(given, size, arguments.seed), arguments, Path(folder))
        times = " | ".join(f"{taken[phase]:.0f} s" for phase in PHASES)
        sizes = " | ".join(f"{taken[name] / 1e6:.0f} MB" for name in ("rss", "anonymous", "disk"))
        print(f"| {size} | {taken['pairs']} | {times} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
