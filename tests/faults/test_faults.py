"""The fault harness in short (run.py and others.py are its long form), and what a full disk is to a library."""

import contextlib
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

import others
from conftest import warm_python
from harness import AT_WORK, Lane, complain, differences

from transencoder.errors import BrokenRun, FullDisk, InputError, one_line_errors, storage_error, writing

IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def lane(tmp_path_factory):
    lane = Lane(tmp_path_factory.mktemp("faults") / "lane", warm_python())
    lane.run_whole(times=1)
    return lane


@pytest.mark.slow
def test_a_run_meets_one_fault_after_the_other_and_ends_as_one_left_alone(lane):
    run, draw = lane.folder / "disk" / "run", random.Random(7)
    with others.small_disk(run.parent, 200) if IS_ROOT else contextlib.nullcontext() as enlarge:
        if IS_ROOT:
            start = lane.drive(run)
            code = lane.wait(start)
            assert code == 1 and "step-0000" in others.error_line(start, code), start.text
            enlarge(100_000)
        outlive(lane, run)
        for stage, (number, target) in KILLS.items():
            kill_in(lane, run, stage, number, target, draw.uniform(0, 0.5))
        start = lane.drive(run)
        assert lane.wait(start) == 0, start.text
        assert differences(lane.whole, run) == []


KILLS = {
    "cycle 1: mine pairs": (signal.SIGKILL, "worker"),
    "cycle 1: cross-encoder of one": (signal.SIGKILL, "group"),
    "cycle 1: bi-encoder of one": (signal.SIGUSR1, "group"),
    "cycle 1: measure": (signal.SIGTERM, "group"),
}


def kill_in(lane, run, stage, number, target, delay):
    start = lane.drive(run)
    while start.stage() != stage:
        assert start.process.poll() is None, start.text
        time.sleep(0.01)
    time.sleep(delay)
    lane.hit(start, number, target)
    code = lane.wait(start)
    assert code != 0 and complain(start, code) is None, start.text
    assert AT_WORK not in start.text
    psutil.wait_procs(lane.members(start), timeout=60)  # one that was asked to stop may still be saving


def outlive(lane, run):
    """SIGKILL to driver and launcher, while the worker goes on: the same command says that it does."""
    start = lane.drive(run)
    while not list(run.glob("contrastive/one/checkpoints/step-*")):
        assert start.process.poll() is None, start.text
        time.sleep(0.01)
    (worker,) = (p for p in lane.members(start) if lane.role(p) == "worker")
    worker.suspend()  # or it might be done before the second one looks
    for process in lane.members(start):
        if process != worker:
            process.kill()
    start.process.wait()
    second = lane.drive(run)
    assert lane.wait(second) == 1 and f"process {worker.pid} on " in second.text and AT_WORK in second.text
    assert complain(second, 1) is None
    worker.resume()
    record = run / "contrastive/one/run.json"
    while '"complete"' not in record.read_text():
        assert worker.is_running()
        time.sleep(0.01)
    worker.kill()
    psutil.wait_procs([worker], timeout=60)


@pytest.mark.slow
def test_what_is_closed_to_the_user_is_one_line_before_any_work(lane):
    names = ("corpus/sentences.txt", "tiny-bert/model.safetensors", "open")
    said = list(others.closed(lane, names, run_after=False))
    assert len(said) == len(names) and all("Permission denied; give" in item.line for item in said), said


@pytest.mark.slow
def test_an_input_that_was_replaced_and_a_flipped_bit_are_named(lane):
    said = list(others.replaced(lane, ("corpus/test.jsonl",)))
    said += others.damaged(lane, lane.folder / "whole-0", others.flip, ("contrastive/one/model.safetensors",))
    assert [item.code for item in said] == [1, 1], said


# --- without a run ---------------------------------------------------------------------------------------------------


def write_table(path):
    pq.write_table(pa.table({"a": list(range(100_000))}), path)


def write_cache(path):
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": list(range(100_000))}))


@pytest.mark.skipif(not IS_ROOT, reason="mounts a small disk: needs root")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: Path(path).write_bytes(b"a" * 100_000),
        lambda path: save_file({"a": torch.zeros(100_000)}, path),
        lambda path: torch.save({"a": torch.zeros(100_000)}, path),
        lambda path: np.zeros(100_000).tofile(path),
        write_table,
        write_cache,
    ],
    ids=["python", "safetensors", "torch", "numpy", "parquet", "arrow"],
)
def test_a_full_disk_is_known_whichever_library_writes(write, tmp_path):
    with others.small_disk(tmp_path / "disk", 16):
        path = str(tmp_path / "disk" / "file")
        with pytest.raises(Exception) as caught:
            write(path)
        assert isinstance(storage_error(caught.value), FullDisk), repr(caught.value)
        with pytest.raises(FullDisk, match=r"^runs/a: .*the same command goes on"), writing("runs/a"):
            write(path)


def raised(cause):
    """As `datasets` wraps what happens to it."""
    try:
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from cause
    except datasets.exceptions.DatasetGenerationError as error:
        return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (raised(OSError(errno.EDQUOT, "", "a")), FullDisk, "a: Disk quota exceeded; .* quota"),
        (OSError(errno.EFBIG, "", "a"), FullDisk, "a: File too large; raise the limit .*ulimit -f"),
        (RuntimeError("Error: 'ret == (size)' failed: 0 != 1 (File too large)"), FullDisk, "File too large; raise"),
        (OSError(errno.EACCES, "", "a"), InputError, "a: Permission denied; give this user"),
        (OSError(errno.EROFS, "", "a"), InputError, "a: Read-only file system; choose"),
    ],
)
def test_what_a_disk_does_is_told_with_what_to_do(error, kind, words, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        one_line_errors(fail)()
    assert stop.value.code == (1 if issubclass(kind, BrokenRun) else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_other_errors_keep_their_traceback():
    for error in (OSError(errno.ENOENT, "", "a"), RuntimeError("shape"), KeyError("a")):
        assert storage_error(error) is None
        with pytest.raises(type(error)), writing("a"):
            raise error


def test_a_terminal_that_knows_latin_1_only_gets_escapes():
    code = "from transencoder.errors import one_line_errors; one_line_errors(lambda: print('caf\\xe9 \\u4e2d'))()"
    how = {"capture_output": True, "cwd": others.ROOT, "env": os.environ | {"PYTHONIOENCODING": "latin-1"}}
    assert subprocess.run([sys.executable, "-c", code], **how).stdout == b"caf\xe9 \\u4e2d\n"


def test_a_reader_that_is_gone_is_no_traceback():
    code = "from transencoder.errors import one_line_errors; one_line_errors(lambda: print('a' * 10**6))()"
    words = [sys.executable, "-c", code]
    writer = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=others.ROOT)
    writer.stdout.close()
    assert writer.stderr.read() == b"" and writer.wait() == 1
