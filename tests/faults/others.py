#!/usr/bin/env python3
"""Faults other than kills, one after another: a full disk, a file cut off, a right taken away.

    python tests/faults/others.py --output_dir faults

Each is done to a run of the driver, which must end with one clear line; then it is undone, and the same command must
end as an uninterrupted run does. Prints a table of what was said. A full disk needs root, and is left out without.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import LAUNCHERS, ROOT, Lane, Start, complain, differences
from support.warm import UNPRIVILEGED, Warm


@dataclass
class Said:
    """What the driver said of a fault: its exit code, the stage, the line."""

    fault: str
    code: int
    stage: str
    line: str


def error_line(start: Start, code: int) -> str:
    """The one line that says what is wrong; fails where there is none, or a traceback."""
    wrong = complain(start, code)
    assert code in (1, 2) and not wrong, (code, wrong, start.text[-2000:])
    lines = [line for line in start.text.splitlines() if ": error: " in line]
    assert len(lines) == 1, start.text[-2000:]
    return lines[0]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many KiB at `folder`; what is yielded makes it larger."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def full_disk(lane: Lane, disk: Path, run: Path, **variables: str) -> Iterator[Said]:
    """The driver on a disk that is too small for each stage in turn: it begins with room for 8 KiB, and gets twice as
    much after each failure.
    """
    room, stage = 8, ""
    with small_disk(disk, room) as enlarge:
        while (code := lane.wait(start := lane.drive(run, **variables))) != 0:
            line = error_line(start, code)
            assert re.search("[Nn]o space left", line), line
            room, stage = 8 if start.stage() != stage else 2 * room, start.stage()
            yield Said(f"full disk ({disk.name})", code, stage, line)
            blocks = os.statvfs(disk)
            enlarge((blocks.f_blocks - blocks.f_bfree) * blocks.f_bsize // 1024 + room)
        wrong = differences(lane.whole, run)
        assert not wrong, wrong
        if run.is_relative_to(disk):
            shutil.rmtree(run)
        left = [path for path in disk.rglob("*") if path.is_file() and path.suffix not in (".arrow", ".npy", ".json")]
        assert not left, left


def full_output(lane: Lane) -> Iterator[Said]:
    """The output folder's disk is full: checkpoints, models, parts, Parquet, results."""
    disk = lane.folder / "output-disk"
    yield from full_disk(lane, disk, disk / "run")


def full_cache(lane: Lane) -> Iterator[Said]:
    """The disk of the `datasets` cache is full: checked tables and tokens."""
    disk = lane.folder / "cache-disk"
    yield from full_disk(lane, disk, lane.folder / "run-cache", HF_DATASETS_CACHE=str(disk))


# --- files that are cut off, or closed -------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Turn a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def spoiled_cache(lane: Lane) -> Iterator[Said]:
    """All files of the cache are cut, a bit of each is flipped, or they are gone: they are made again."""
    for what, spoil in {"cut off": cut, "with a bit flipped": flip, "deleted": Path.unlink}.items():
        for path in (lane.folder / "cache" / "trans-encoder").iterdir():
            spoil(path)
        run = lane.folder / what.replace(" ", "-")
        start = lane.drive(run)
        assert lane.wait(start) == 0, start.text[-3000:]
        assert not (wrong := differences(lane.whole, run)), wrong
        yield Said(f"cache {what}", 0, "", "made anew")


def mend(path: Path, whole: Path) -> None:
    """Do what a person would: delete what a stage made, and put back what nobody makes again."""
    if path.name == "run.json":
        shutil.rmtree(path.parent)
    elif path.name == "recipe.yaml":
        shutil.copy(whole, path)
    else:
        path.unlink()


# Files of a run, and what comes after them, which is not there yet when they are damaged.
MADE = {
    "contrastive/one/model.safetensors": ("cycle-1", "start"),
    "cycle-1/pairs.parquet": ("cycle-1/bi-scores.parquet",),
    "cycle-1/bi-scores.parquet": ("cycle-1/cross-encoder",),
    "cycle-1/cross-encoder/one/model.safetensors": ("cycle-1/cross-scores.parquet",),
    "recipe.yaml": (),
    "contrastive/one/run.json": (),
    "start/results.json": ("cycle-1/results.json", "cycle-1/run.json"),
}


def damaged(
    lane: Lane, run: Path, spoil: Callable[[Path], None], names: tuple[str, ...] = tuple(MADE)
) -> Iterator[Said]:
    """A file of a run is damaged in a run that has not come to its end.

    Args:
        run: one that has; it stays where it is, since its stages know their inputs by their paths.
        spoil: `cut` or `flip`.
    """
    template, word = lane.folder / f"template-{spoil.__name__}", f"{spoil.__name__}"
    shutil.copytree(run, template)
    for name in names:
        shutil.rmtree(run)
        shutil.copytree(template, run)
        for later in MADE[name]:
            path = run / later
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        spoil(run / name)
        start = lane.drive(run)
        code = lane.wait(start)
        if code == 0:
            assert not (wrong := differences(lane.whole, run)), wrong
            yield Said(f"{word}: {name}", code, "", "made anew")
        else:
            yield Said(f"{word}: {name}", code, start.stage(), error_line(start, code))
            mend(run / name, template / name)
            start = lane.drive(run)
            assert lane.wait(start) == 0, start.text[-3000:]
            assert not (wrong := differences(lane.whole, run)), wrong


CLOSED = (
    "tiny.yaml",
    "corpus",
    "corpus/sentences.txt",
    "corpus/dev.jsonl",
    "tiny-bert",
    "tiny-bert/config.json",
    "tiny-bert/model.safetensors",
    "open",
)


def closed(lane: Lane, names: tuple[str, ...] = CLOSED, run_after: bool = True) -> Iterator[Said]:
    """A file or folder is closed to the user who runs the driver."""
    run = lane.folder / "open" / "run"
    run.parent.mkdir(exist_ok=True)

    def drive() -> tuple[Start, int]:
        start = lane.drive(run, **({} if os.geteuid() else {UNPRIVILEGED: "1"}))
        return start, lane.wait(start)

    for name in names:
        path = lane.folder / name
        mode = path.stat().st_mode
        path.chmod(0o500 if name == "open" else 0)
        start, code = drive()
        path.chmod(mode)
        line = error_line(start, code)
        assert code == 2 and start.stage() == "plan" and not run.exists(), (code, start.text)
        yield Said(f"no right to {name}", code, start.stage(), line)
    if run_after:
        start, code = drive()
        assert code == 0, start.text[-3000:]
        assert not (wrong := differences(lane.whole, run)), wrong


# --- inputs that change between a kill and its continuation ----------------------------------------------------------

INPUTS = ("corpus/sentences.txt", "corpus/dev.jsonl", "corpus/test.jsonl", "tiny-bert/tokenizer_config.json")


def replaced(lane: Lane, names: tuple[str, ...] = INPUTS) -> Iterator[Said]:
    """An input is another one when a killed run is started again; put back, the run ends as one left alone."""
    for number, name in enumerate(names):
        run, path = lane.folder / f"replaced-{number}", lane.folder / name
        start = lane.drive(run)
        while start.stage() != "cycle 1: cross-encoder of one":
            assert start.process.poll() is None, start.text
            time.sleep(0.01)
        lane.hit(start, signal.SIGKILL, "group")
        lane.wait(start)
        lane.end_all(start)
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[1:], lines[0]]) if len(lines) > 1 and name[0] == "c" else whole + b"\n")
        start = lane.drive(run)
        code = lane.wait(start)
        line = error_line(start, code)
        assert name in line and "has changed since" in line, line
        yield Said(f"replaced: {name}", code, start.stage(), line)
        path.write_bytes(whole)
        start = lane.drive(run)
        assert lane.wait(start) == 0, start.text[-3000:]
        assert not (wrong := differences(lane.whole, run)), wrong


# --- the whole -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="python")
    parser.add_argument(
        "--only", nargs="*", default=["output", "cache", "spoiled", "cut", "flip", "replaced", "closed"]
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    python = Warm(arguments.output_dir / "warm", os.getpid())
    lane = Lane(arguments.output_dir / "lane", python, arguments.launcher)
    lane.run_whole()
    faults = {
        "output": lambda: full_output(lane),
        "cache": lambda: full_cache(lane),
        "spoiled": lambda: spoiled_cache(lane),
        "cut": lambda: damaged(lane, lane.folder / "whole-0", cut),
        "flip": lambda: damaged(lane, lane.folder / "whole-0", flip),
        "replaced": lambda: replaced(lane),
        "closed": lambda: closed(lane),
    }
    for name in arguments.only:
        if os.geteuid() and name in ("output", "cache"):
            print(f"{name}: needs root, left out", file=sys.stderr)
            continue
        for said in faults[name]():
            line = said.line.replace(str(lane.folder), "DIR").replace(str(ROOT), "ROOT")
            print(f"| {said.fault} | {said.stage} | {said.code} | {line} |", flush=True)


if __name__ == "__main__":
    main()
