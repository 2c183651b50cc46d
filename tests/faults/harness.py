"""A tiny run of the driver that is killed and started again, and what it must end as.

`Lane` is a place for runs; `Lane.drive` is one start of the driver; `Lane.hit` sends a signal to its processes; and
`differences` compares what a run left with what an uninterrupted one did.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support import warm
from support.warm import BASE, Warm

ACCELERATE = "accelerate launch --num_cpu_threads_per_process 1"
CONFIGS = ROOT / "accelerate_configs"
# How the driver starts a stage. All but `cold` have their imports behind them (see warm.py).
LAUNCHERS = {
    "python": "python",
    "cold": sys.executable,
    "accelerate": f"{ACCELERATE} --config_file {CONFIGS / 'cpu.yaml'}",
    "two": f"{ACCELERATE} --config_file {CONFIGS / 'multi_gpu.yaml'} --num_processes 2 --main_process_port 0",
}
AT_WORK = "is at work there"  # what a stage says that finds another one's lock
STARTED = re.compile(r"\[\d+/\d+\] (.*)")
ENDED, DONE = re.compile(r": \d+ s$"), re.compile(r": done before$")
HANGS = 600  # seconds after which a start of the driver counts as hanging


def recipe(models: Path, corpus: Path, remine: bool = False) -> dict[str, Any]:
    """Every stage there is, with checkpoints and parts at steps of their own, and a choice of the best model."""
    stage = dict(total_batch_size=16, learning_rate=1e-3, eval_steps=7, checkpointing_steps=3)
    return {
        "common": {"mixed_precision": "no"},
        "run_transencoder": {
            "students": [{"name": "one", "plm": str(models)}],
            "sentences": str(corpus / "sentences.txt"),
            "dev": f"mine.dev={corpus / 'dev.jsonl'}",
            "tasks": [f"mine={corpus / 'test.jsonl'}"],
            "cycles": 1,
        },
        "mine_pairs": {"num_pairs": 64, "mix": ["lexical:1-10=1", "nearest:1-10=1", "random=1"]},
        "score_pairs": {"shard_rows": 16},
        "train_contrastive": {**stage, "pooling": "mean", "num_epochs": 3},
        "distill_bi2cross": {**stage, "num_epochs": 2},
        "distill_cross2bi": {**stage, "num_epochs": 4},
    }


@dataclass
class Start:
    """One start of the driver: the process, what it has said with the moment, and the stage it is in."""

    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self):
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        for line in self.process.stderr:
            self.lines.append((time.monotonic() - self.began, line.rstrip("\n")))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def stage(self) -> str:
        """What it is at, as `STAGES` calls it."""
        titles = [match.group(1) for _, line in self.lines if (match := STARTED.match(line))]
        if not titles:
            return "plan"
        title = re.sub(r": (done before|\d+ s)$", "", titles[-1])
        return "summary" if title == "cycle 1: measure" and title != titles[-1] else title


class Lane:
    """A place for runs, one after another, with models, data and a cache of its own.

    Args:
        folder: new or empty.
        python: whose `python` the driver uses.
        launcher: a key of `LAUNCHERS`.
    """

    def __init__(self, folder: Path, python: Warm, launcher: str = "python"):
        self.folder, self.python, self.launcher = folder.absolute(), python, launcher
        self.recipe, models, corpus = (self.folder / name for name in ("tiny.yaml", "tiny-bert", "corpus"))
        for path in (corpus, self.folder / "tmp"):
            path.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | BASE
        self.environment |= {"HF_DATASETS_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.folder / "tmp")}
        self.environment["PATH"] = f"{python.path}:{os.environ['PATH']}"
        make = ["python", str(ROOT / "tests/faults/make.py"), str(models), str(corpus)]
        subprocess.run(make, env=self.environment, check=True, stderr=subprocess.DEVNULL)
        self.recipe.write_text(yaml.safe_dump(recipe(models, corpus)))
        self.whole: dict[str, Any] = {}  # the `fingerprint` of an uninterrupted run
        self.seconds: dict[str, float] = {}  # of its stages

    def run_whole(self, times: int = 2) -> None:
        """Note what an uninterrupted run comes to, and that another one comes to the same."""
        for number in range(times):
            run = self.folder / f"whole-{number}"
            start = self.drive(run)
            code = self.wait(start)
            assert code == 0, start.text
            self.whole, self.seconds = self.whole or fingerprint(run), stage_seconds(start, through=True)
            wrong = differences(self.whole, run)
            assert not wrong, wrong

    def drive(self, run: Path, *words: object, **variables: str) -> Start:
        """Start the driver in a process group of its own. `variables`: of the environment."""

        def prepare() -> None:
            os.setpgid(0, 0)
            if warm.UNPRIVILEGED in variables:
                warm.lower_root()

        command = ["bash", str(ROOT / "scripts/run_transencoder.sh"), "--recipe", str(self.recipe)]
        command += ["--output_dir", str(run), "--launcher", LAUNCHERS[self.launcher], *map(str, words)]
        files = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        environment = self.environment | variables
        start = Start(subprocess.Popen(command, env=environment, cwd=ROOT, preexec_fn=prepare, **files))
        return start

    def members(self, start: Start) -> list[psutil.Process]:
        """The living processes of a start, oldest first."""
        return group_of(start.process.pid)

    def role(self, process: psutil.Process) -> str:
        """driver, launcher (or the client of the warm Python) or worker."""
        try:
            words, name = process.cmdline(), process.name()
        except psutil.Error:
            return "gone"
        if name in ("launcher", "worker"):
            return name
        if str(self.python.path) in " ".join(words) or "accelerate.commands" in " ".join(words):
            return "launcher"
        return "driver" if words[:1] == ["bash"] else "worker"

    def hit(self, start: Start, number: signal.Signals, target: str) -> str:
        """Send a signal to `target`: group, driver, launcher or worker; returns whom it found."""
        group = start.process.pid
        if target == "driver":
            start.process.send_signal(number)
            return target
        if target in ("launcher", "worker"):
            found = [p for p in group_of(group) if p.pid != group and self.role(p) == target]
            if found:
                send(found[-1], number)
                return target
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return "nobody"
        return "group"

    def wait(self, start: Start, seconds: float = HANGS) -> int | None:
        """The driver's exit code; None if it is still at work after `seconds`. That after `HANGS` is a failure."""
        try:
            code = start.process.wait(timeout=seconds)
            start.listener.join(10)  # to the last line; what outlives the driver keeps the other end open
            return code
        except subprocess.TimeoutExpired:
            if seconds < HANGS:
                return None
            self.end_all(start)
            raise AssertionError(f"still at work after {seconds} s in {start.stage()!r}:\n{start.text}") from None

    def settle(self, start: Start) -> list[str]:
        """What the driver has left running; waits a moment for those that are about to end."""
        deadline = time.monotonic() + 1
        while (left := group_of(start.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return sorted({self.role(process) for process in left} - {"gone"})

    def end_all(self, start: Start) -> None:
        """End what is left of a start."""
        for process in group_of(start.process.pid):
            send(process, signal.SIGKILL)
        while group_of(start.process.pid):
            time.sleep(0.02)


def group_of(group: int) -> list[psutil.Process]:
    """The living processes of a process group, oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.create_time(), process.pid, process))
        except (ProcessLookupError, psutil.Error):
            continue
    return [process for *_, process in sorted(found, key=lambda item: item[:2])]


def send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


# --- what a run must be in the end -----------------------------------------------------------------------------------


def fingerprint(run: Path) -> dict[str, Any]:
    """All that must not depend on whether the run was interrupted, by file."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir():
            continue
        if path.name == "run.json":
            facts = json.loads(path.read_text())
            found[name] = {key: facts.get(key) for key in ("stage", "status", "history", "kept_step", "steps")}
        elif path.name == "results.json" and path.parent != run:
            found[name] = [
                [e["kind"], e["task"], e["split"], e["metric"], e["value"]] for e in json.loads(path.read_text())
            ]
        elif path.suffix == ".parquet":
            found[name] = pq.read_table(path).replace_schema_metadata(None).to_pydict()
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif path.name in ("results.md", "recipe.yaml"):
            text = re.sub(r"\S+/(?=contrastive/|cycle-)", "RUN/", path.read_text()).replace(f"# {run.name}", "# RUN")
            # A commit may come in between.
            found[name] = re.sub(r"(?m)^Measured by trans-encoder .*\. SHA", "SHA", text)
        else:
            found[name] = True
    return found


def differences(whole: dict[str, Any], run: Path) -> list[str]:
    """In words, what sets a run's folder apart from an uninterrupted one's `fingerprint`."""
    found = fingerprint(run)
    missing = [f"{name} is missing" for name in whole if name not in found]
    extra = [f"{name} is left over" for name in found if name not in whole]
    other = [f"{name} differs" for name in whole if name in found and whole[name] != found[name]]
    return missing + extra + other


def stage_seconds(start: Start, through: bool) -> dict[str, float]:
    """How long each stage took that ended in a start; "plan" too, and "summary" if it came `through`."""
    seconds: dict[str, float] = {}
    before, title = 0.0, "plan"
    for moment, line in start.lines:
        if match := STARTED.match(line):
            if title:
                seconds[title] = moment - before
            before = moment
            title = None if ENDED.search(line) or DONE.search(line) else match.group(1)
    if through:
        seconds["summary"] = time.monotonic() - start.began - before
    return seconds


def complain(start: Start, code: int) -> str | None:
    """In words, what is wrong with how a start that was not hit by a signal itself ended."""
    ours = [line for line in start.text.splitlines() if re.match(r'\s+File ".*/(transencoder|scripts)/', line)]
    if ours:
        return f"a traceback: {start.text[-1500:]}"
    if code > 0 and not re.search(r"(error: |failed \(see above\)|stopped by a signal|ended by signal)", start.text):
        return f"exit code {code} without a line: {start.text[-500:]}"
    return None


def draw_target(draw: random.Random) -> tuple[signal.Signals, str]:
    """A signal, and whom it hits. Most often it is the whole group: a machine that goes down."""
    number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    targets = ["group", "group", "worker", "launcher", "driver"] if number == signal.SIGKILL else ["group", "worker"]
    return number, draw.choice(targets)
