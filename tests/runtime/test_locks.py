"""One process at a time on an output."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from transencoder.errors import InputError
from transencoder.runtime import locks
from transencoder.runtime.locks import lock, unlock


def test_an_output_has_one_process_at_a_time(tmp_path):
    output = tmp_path / "run"
    hold = "import sys, pathlib; from transencoder.runtime.locks import lock; lock(pathlib.Path(sys.argv[1])); input()"
    words = [sys.executable, "-c", hold, str(output)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / ".run.lock").exists() or not (tmp_path / ".run.lock").read_text():
        assert other.poll() is None
    with pytest.raises(InputError, match=rf"run: process {other.pid} on .* is at work there"):
        lock(output)
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock(output)
    lock(output)  # it has it
    unlock(output)
    unlock(output)
    assert not list(tmp_path.iterdir()) and not any(tmp_path in path.parents for path in locks._held)


def test_where_no_lock_can_be_made_nothing_is_locked(tmp_path):
    lock(tmp_path / "none" / "run")
    unlock(tmp_path / "none" / "run")
    assert not list(tmp_path.iterdir())


def test_a_link_where_the_lock_belongs_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"\.run\.lock: a symbolic link"):
        lock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"
