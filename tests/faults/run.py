#!/usr/bin/env python3
"""Kill the driver at random moments, start it again, and see that it ends as if nothing had happened.

    python tests/faults/run.py --kills 200 --seed 1 --output_dir faults

Each kill, each run that came to its end, and each failure is a line of DIR/faults.jsonl; the same command goes on
counting there. At the end it prints the table of docs/reliability.md, and exits with 1 if anything was not as it must
be.

A run is killed five to ten times, at moments drawn uniformly over its whole length, by the durations that its stages
have had so far; then it is left alone. What is hit by which signal is drawn, too.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import AT_WORK, HANGS, LAUNCHERS, Lane, complain, differences, draw_target, stage_seconds
from support.warm import Warm

RECORD = "faults.jsonl"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many, those in the record included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--lanes", type=int, default=2, help="runs side by side, each on a core of its own")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="python", help="what starts a stage: see harness.py")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    return parser.parse_args()


class Record:
    """The lines of the file; several processes may write at a time."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def kills(self) -> int:
        return sum(entry["what"] == "kill" for entry in self.read())


def work(arguments: argparse.Namespace, number: int, python: Warm) -> None:
    """One lane: an uninterrupted run, then runs with kills, until there are enough of them."""
    record = Record(arguments.output_dir / RECORD)
    draw = random.Random(f"{arguments.seed} {number} {arguments.launcher} {record.kills()}")
    folder = arguments.output_dir / f"lane-{arguments.launcher}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    lane = Lane(folder, python, arguments.launcher)
    lane.run_whole()
    record.add(what="whole", launcher=lane.launcher, seconds=lane.seconds)
    runs = 0
    while record.kills() < arguments.kills:
        runs += 1
        run_with_kills(lane, f"run-{runs:04}", draw, record)


def run_with_kills(lane: Lane, name: str, draw: random.Random, record: Record) -> None:
    """One run, killed and started again until it is through; and whether it is what it should be."""
    run, kills, starts = lane.folder / name, [], 0
    points = sorted((draw.random() for _ in range(draw.randint(5, 10))), reverse=True)
    about = dict(launcher=lane.launcher, run=f"{lane.folder.name}/{name}")
    while True:
        start = lane.drive(run)
        starts += 1
        number, target = draw_target(draw)
        moment = moment_of(points.pop(), run, lane.seconds, draw) if points else HANGS
        code = lane.wait(start, moment)
        for title, seconds in stage_seconds(start, code == 0).items():  # the machine may have other work, or less
            lane.seconds[title] = (lane.seconds[title] + seconds) / 2
        if code == 0:
            break
        if code is not None:  # it ended by itself
            lane.settle(start)
            if AT_WORK in start.text:  # what a killed driver left behind goes on to the end of its stage
                time.sleep(1)
                continue
            record.add(what="failure", **about, kills=kills, why=f"exit code {code}: {start.text[-2000:]}")
            return
        stage = start.stage()
        hit = lane.hit(start, number, target)
        code = lane.wait(start)
        left = lane.settle(start)
        kill = dict(stage=stage, signal=number.name, target=hit, moment=round(moment, 2), code=code, left=left)
        if code == 0 and hit == "nobody":
            break
        record.add(what="kill", **about, **kill)
        kills.append(kill)
        if wrong := complain(start, code):
            record.add(what="failure", **about, kills=kills, why=wrong)
        if code == 0:  # what was hit had done its work
            break
    time.sleep(0.1)
    lane.end_all(start)
    wrong = differences(lane.whole, run)
    record.add(what="failure" if wrong else "end", **about, kills=kills, starts=starts, why=wrong)
    if not wrong:
        shutil.rmtree(run)


def moment_of(point: float, run: Path, seconds: dict[str, float], draw: random.Random) -> float:
    """Seconds from a start to a point in [0, 1) of the run, or into its first step if that point is behind."""
    total = sum(seconds.values())
    return max(point * total - (total - remaining(run, seconds)), draw.uniform(0, seconds["plan"]))


def remaining(run: Path, seconds: dict[str, float]) -> float:
    """Seconds that an uninterrupted start would take from where the run is."""
    done = {
        "contrastive start of one": "contrastive/one/run.json",
        "measure the start": "start/run.json",
        "cycle 1: mine pairs": "cycle-1/pairs.parquet",
        "cycle 1: label with the bi-encoder": "cycle-1/bi-scores.parquet",
        "cycle 1: cross-encoder of one": "cycle-1/cross-encoder/one/run.json",
        "cycle 1: label with the cross-encoder": "cycle-1/cross-scores.parquet",
        "cycle 1: bi-encoder of one": "cycle-1/bi-encoder/one/run.json",
        "cycle 1: measure": "cycle-1/run.json",
    }

    def is_done(path: Path) -> bool:
        return path.exists() and (path.suffix == ".parquet" or '"complete"' in path.read_text())

    return sum(time_ for title, time_ in seconds.items() if not (title in done and is_done(run / done[title])))


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: kills by stage and by what was hit; then what became of the runs."""
    kills = [entry for entry in entries if entry["what"] == "kill"]
    columns = sorted({f"{kill['signal']} {kill['target']}" for kill in kills})
    stages = list(dict.fromkeys(stage for e in entries if e["what"] == "whole" for stage in e["seconds"]))
    count = Counter((kill["stage"], f"{kill['signal']} {kill['target']}") for kill in kills)
    lines = [["stage", *columns, "all"], [":---"] + ["---:"] * (len(columns) + 1)]
    for stage in stages:
        row = [count[stage, column] for column in columns]
        lines.append([stage, *map(str, row), str(sum(row))])
    sums = [sum(count[stage, column] for stage in stages) for column in columns]
    lines.append(["all", *map(str, sums), str(len(kills))])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for launcher in dict.fromkeys(entry["launcher"] for entry in entries):
        own = [entry for entry in entries if entry["launcher"] == launcher]
        number = Counter(entry["what"] for entry in own)
        text += (
            f"\n{launcher}: {number['kill']} kills in {number['end']} runs that ended as the uninterrupted one, "
            f"{number['failure']} failures"
        )
    return text


def main() -> None:
    arguments = parse()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    record = Record(arguments.output_dir / RECORD)
    if not arguments.table:
        shutil.rmtree(arguments.output_dir / "warm", ignore_errors=True)
        python = Warm(arguments.output_dir / "warm", os.getpid())
        context = multiprocessing.get_context("fork")
        lanes = [context.Process(target=work, args=(arguments, n, python)) for n in range(arguments.lanes)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        if any(lane.exitcode for lane in lanes):
            sys.exit("a lane ended early, see above")
    entries = record.read()
    print(table(entries))
    sys.exit(any(entry["what"] == "failure" for entry in entries))


if __name__ == "__main__":
    main()
