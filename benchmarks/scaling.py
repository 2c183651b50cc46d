#!/usr/bin/env python3
r"""Measure step 2 with one process and with two, under every backend: speed as a ratio, bytes exchanged, memory.

The global batch is the same everywhere, each process has one thread, and the layouts alternate, so that what else the
machine does falls on all of them. Bytes are what the loopback device carried: run it where nothing else uses that,

sudo unshare --net sh -c "ip link set lo up; python benchmarks/scaling.py --model_name_or_path MODEL --scores FILE"
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {  # name -> Accelerate configuration, processes
    "one process": ("cpu", 1),
    "2 x DDP": ("multi_gpu", 2),
    "2 x FSDP": ("fsdp", 2),
    "2 x ZeRO-2": ("deepspeed_zero2", 2),
    "2 x ZeRO-3": ("deepspeed_zero3", 2),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="language model of the cross-encoder")
    parser.add_argument("--scores", required=True, help="pairs with scores, as score_pairs.py writes them")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (40)")
    parser.add_argument("--total_batch_size", type=int, default=32, help="examples in one step, all processes (32)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each layout (5)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    return parser.parse_args()


def loopback_bytes() -> int:
    """Return the bytes that the loopback device has received since it came up."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def run(layout: str, steps: int, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run one training, in a folder that must not exist.

    Returns:
        rate: examples/s. bytes: over loopback, start and end included. memory: peak of the largest process, GiB.
    """
    config, processes = LAYOUTS[layout]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    command += [str(ROOT / "scripts" / "distill_bi2cross.py"), "--output_dir", str(folder), "--select_by", "last"]
    command += ["--max_steps", str(steps), "--eval_steps", str(steps), "--checkpointing_steps", "0"]
    for name in ("model_name_or_path", "scores", "total_batch_size"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if config == "multi_gpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    before = loopback_bytes()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)  # with the use of this run alone, its workers included
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{layout} failed:\n{output.read()[-3000:]}")
    facts = json.loads((folder / "run.json").read_text())
    assert facts["world_size"] == processes and facts["steps"] == steps
    return {
        "rate": facts["examples_per_second"],
        "bytes": loopback_bytes() - before,
        "memory": usage.ru_maxrss / 2**20,
    }


def main() -> None:
    arguments = parse()
    measured: dict[str, list[dict[str, float]]] = {layout: [] for layout in arguments.layouts}
    start_bytes = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in arguments.layouts:  # also warms the caches of files and tokens
            start_bytes[layout] = run(layout, 1, arguments, Path(folder) / f"{layout}-start")["bytes"]
        for turn in range(arguments.repeats):
            for layout, runs in measured.items():
                runs.append(run(layout, arguments.steps, arguments, Path(folder) / f"{layout}-{turn}"))
                print(f"{turn + 1}/{arguments.repeats} {layout}: {runs[-1]['rate']} examples/s", file=sys.stderr)

    first = arguments.layouts[0]
    print(f"| layout | speed, {first} = 1: median (min - max) | MB a step | peak GiB of a process |")
    print("| :--- | ---: | ---: | ---: |")
    for layout, runs in measured.items():
        ratios = [mine["rate"] / other["rate"] for mine, other in zip(runs, measured[first], strict=True)]
        sent = statistics.median(one["bytes"] for one in runs) - start_bytes[layout]
        memory = max(one["memory"] for one in runs)
        print(
            f"| {layout} | {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | "
            f"{max(sent, 0) / (arguments.steps - 1) / 1e6:.1f} | {memory:.2f} |"
        )


if __name__ == "__main__":
    main()
