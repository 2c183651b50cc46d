#!/usr/bin/env python3
r"""Measure what mining takes: CPU time of each phase, memory and disk, for several numbers of sentences.

python benchmarks/mining.py --bi_encoder MODEL --sentences FILE FILE --sizes 50000 100000 200000

Sentences beyond those of the files are recombined: the first half of one's words and the second half of another's,
drawn with a seed. The mix is the default one, and each size is a process of its own, beginning with an empty cache.
"""

import argparse
import contextlib
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transencoder.config.arguments import DEFAULT_MIX
from transencoder.data.pools import read_sentence_pool

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
    """Return `size` distinct sentences in an order that is drawn: those given, then halves of two put together."""
    rng = random.Random(seed)
    found = dict.fromkeys(rng.sample(sentences, len(sentences))[:size])
    while len(found) < size:
        first, second = (rng.choice(sentences).split() for _ in range(2))
        found[" ".join(first[: len(first) // 2] + second[len(second) // 2 :])] = None
    return rng.sample(list(found), size)


def disk_use(folder: Path) -> int:
    """Return the bytes that the files in a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def phase_of(parts: Path) -> str:
    """Return the last phase that has left a shard."""
    drawn = {int(path.name.split("-")[1]) for path in parts.glob("drawn-*.npz")}
    kinds = {DEFAULT_MIX[number].partition(":")[0] for number in drawn}
    return "by vectors" if "nearest" in kinds else "by words" if kinds else "encoding"


def children_seconds() -> float:
    """Return the CPU time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Watch:
    """Watch what a mining takes: the peaks of its memory and disk, in bytes, and its CPU time at each phase's end.

    Args:
        pid: of the process.
        folder: where it keeps everything, `parts` being its folder of shards.
    """

    def __init__(self, pid: int, folder: Path, parts: Path):
        self.process, self.folder, self.parts = psutil.Process(pid), folder, parts
        self.peaks = dict.fromkeys(("rss", "anonymous", "disk"), 0)
        self.ends, self.files = dict.fromkeys(PHASES, 0.0), 0

    def look(self) -> None:
        """Look once, now."""
        memory, used = self.process.memory_info(), self.process.cpu_times()
        now = {"rss": memory.rss, "anonymous": memory.rss - memory.shared, "disk": disk_use(self.folder)}
        self.peaks = {name: max(peak, now[name]) for name, peak in self.peaks.items()}
        files = len(list(self.parts.glob("*.npz")))
        if files > self.files:
            self.files, self.ends[phase_of(self.parts)] = files, used.user + used.system


def mine(sentences: list[str], bi_encoder: str, folder: Path) -> dict[str, float]:
    """Mine once, in an empty folder.

    Returns:
        CPU seconds of each phase; "wall", seconds of all; peaks in bytes of "rss", "anonymous", "disk"; "pairs".
    """
    source, output = folder / "sentences.txt", folder / "pairs.parquet"
    source.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    command = [sys.executable, ROOT / "scripts" / "mine_pairs.py", "--encoders", bi_encoder]
    command += ["--sentences", source, "--output", output]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    before, started = children_seconds(), time.monotonic()
    with tempfile.TemporaryFile("w+") as text:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdout=text, stderr=text)
        watch = Watch(process.pid, folder, output.with_name(f".{output.name}.parts"))
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, FileNotFoundError):  # it ends while we look
                watch.look()
            time.sleep(INTERVAL)
        if process.returncode:
            text.seek(0)
            sys.exit(f"mining failed:\n{text.read()[-3000:]}")
    wall, ends = time.monotonic() - started, watch.ends | {PHASES[-1]: children_seconds() - before}
    phases = {phase: ends[phase] - then for phase, then in zip(PHASES, [0.0, *ends.values()], strict=False)}
    return {**phases, **watch.peaks, "wall": wall, "pairs": pq.read_metadata(output).num_rows}


def main() -> None:
    arguments = parse()
    given = list(read_sentence_pool(arguments.sentences, None)["sentence"])
    print(f"{len(given)} distinct sentences in the files", file=sys.stderr)
    print(f"| sentences | pairs | CPU s: {' | '.join(PHASES)} | wall s | peak RSS | anonymous | disk |")
    print("| ---: |" + " ---: |" * 9)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            taken = mine(recombined(given, size, arguments.seed), arguments.bi_encoder, Path(folder))
        times = " | ".join(f"{taken[name]:.0f}" for name in (*PHASES, "wall"))
        sizes = " | ".join(f"{taken[name] / 1e6:.0f} MB" for name in ("rss", "anonymous", "disk"))
        print(f"| {size} | {taken['pairs']} | {times} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
