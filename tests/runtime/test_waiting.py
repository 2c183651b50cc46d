"""How long processes wait for one another."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from torch.distributed import DistNetworkError

from transencoder.config.parsing import parse_stage
from transencoder.errors import BrokenRun, InputError
from transencoder.runtime import accelerator as runtime
from transencoder.runtime.waiting import timeout

# The first of two processes is busy for longer than the others wait for it in a sum.
BUSY = """
import sys, time
from accelerate import Accelerator
from transencoder.errors import one_line_errors
from transencoder.runtime.backends import process_group
from transencoder.runtime.waiting import local_main_process_first, wait_long

@one_line_errors
def main():
    accelerator = Accelerator(cpu=True, kwargs_handlers=process_group())
    assert accelerator.num_processes == 2
    way, first = sys.argv[1], accelerator.is_main_process
    if way == "cache":
        with local_main_process_first():
            time.sleep(4 * first)
    if way == "alone":
        time.sleep(4 * first)
        wait_long()
    if way == "lost":
        time.sleep(60 * (not first))
    accelerator.wait_for_everyone()
    print("all have met", flush=True)

main()
"""


def run_two(tmp_path, way, seconds):
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + os.getpid() % 300)}
    shared |= {"TRANSENCODER_TIMEOUT": str(seconds), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        subprocess.Popen(
            [sys.executable, script, way], env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, **pipes
        )
        for rank in "01"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cache", "alone"])
def test_processes_wait_for_one_that_works_alone(tmp_path, way):
    for process in run_two(tmp_path, way, 1):
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and said == "all have met\n", errors


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_others_with_one_line(tmp_path):
    first, silent = run_two(tmp_path, "lost", 2)
    started = time.monotonic()
    try:
        _, errors = first.communicate(timeout=40)
        assert first.returncode == 1 and time.monotonic() - started < 40
        (line,) = errors.splitlines()
        assert "has not answered within TRANSENCODER_TIMEOUT" in line and "The same command goes on" in line
    finally:
        silent.kill()
        silent.communicate()


@pytest.mark.parametrize("value", ["0", "-1", "ten", "1.5", ""])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(monkeypatch, value):
    monkeypatch.setenv("TRANSENCODER_TIMEOUT", value)
    with pytest.raises(InputError, match=f"TRANSENCODER_TIMEOUT={value}: must be a number of seconds, such as 600"):
        timeout()


def test_a_process_that_ends_before_all_have_met_is_one_line(monkeypatch):
    def fail(**_):
        raise DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.\nException raised from ...")

    monkeypatch.setattr(runtime, "Accelerator", fail)
    with pytest.raises(BrokenRun, match=r"or one has ended: Failed to recv, got 0 bytes\. [^\n]*closed\.$"):
        runtime.start(parse_stage("score_pairs", argv=["--encoders", "x", "--pairs", "x", "--output", "x"]))
