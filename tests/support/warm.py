"""A Python that has the libraries imported already: a script is at work at once, not after ten seconds of imports.

`Warm` is a folder whose `python` and `accelerate` stand for the real ones. They ask a server, which imports what the
scripts import, once, and forks a process for each script (or launcher) that it is asked to run: with the arguments,
environment, folder, files and process group of who asks, who ends with its exit code. What runs is the script itself,
from its first line. A launcher starts its workers in the same way. What is neither a script of this project nor
Accelerate's launcher runs in the real Python.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[2]
UNPRIVILEGED = "FAULTS_UNPRIVILEGED"  # in the environment: root, too, has only the rights that it was given
LAUNCHER = "accelerate.commands.accelerate_cli"
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
words = sys.argv[1:]
if words[:1] == ["-u"]:
    del words[0]
ours = words and os.path.dirname(os.path.abspath(words[0])) == {scripts!r}
if not ours and words[:2] != ["-m", {launcher!r}]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
request = json.dumps([words, sys.argv[0], os.getpid(), dict(os.environ), os.getcwd(), os.getpgid(0)]).encode()
files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
server.sendmsg([len(request).to_bytes(4, "big")], files)
server.sendall(request)
worker = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: worker and os.kill(worker, number))
answer = server.recv(1)
os._exit(answer[0] if answer else 137)
"""
BASE = {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Warm:
    """The warm Python of a folder; its `path` is for PATH.

    Args:
        folder: new, empty, or that of a server which runs already.
        owner: process id; the server ends when that process has.
    """

    def __init__(self, folder: Path, owner: int):
        self.path, socket_path = folder.absolute() / "bin", folder.absolute() / "warm.sock"
        if socket_path.exists():
            return
        self.path.mkdir(parents=True)
        python = self.path / "python"
        values = dict(python=sys.executable, socket=str(socket_path), scripts=str(ROOT / "scripts"), launcher=LAUNCHER)
        python.write_text(CLIENT.format(**values))
        (self.path / "accelerate").write_text(f'#!/bin/sh\nexec {python} -m {LAUNCHER} "$@"\n')
        for program in self.path.iterdir():
            program.chmod(0o755)
        with (folder / "server.log").open("w") as log:
            command = [sys.executable, __file__, str(socket_path), str(owner)]
            server = subprocess.Popen(command, env=os.environ | BASE, stdout=log, stderr=log)
        while not socket_path.exists():
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.1)

    def family(self, process: int) -> list[psutil.Process]:
        """A process and all below it, also those that the server runs for them, the oldest generation first."""
        try:
            found = [psutil.Process(process)]
            found += found[0].children()
        except psutil.NoSuchProcess:
            return []
        note = self.path / f"{process}.worker"
        below = [member.pid for member in found[1:]] + ([int(note.read_text())] if note.exists() else [])
        return found[:1] + [member for pid in below for member in self.family(pid)]


def serve(path: str, owner: int) -> None:
    """Answer until `owner` is gone."""
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "tests"))
    import_all()
    gc.collect()
    gc.freeze()  # what is there now is never looked at again, and so never copied
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    os.chmod(path + ".new", 0o777)
    server.listen(64)
    server.settimeout(1)
    os.rename(path + ".new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while is_there(owner):
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return answer(connection)
        connection.close()


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def lower_root() -> None:
    """Take from root the right to pass over the rights to files (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        assert libc.prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP: what a program that is started may have
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, sets) == 0
    for place in (0, 1):  # effective, permitted
        sets[place] &= ~0b110
    assert libc.capset(head, sets) == 0


def import_all() -> None:
    """What the scripts and the launcher import, at once or later."""
    import accelerate.commands.launch  # noqa: F401
    import conftest  # noqa: F401
    import faiss  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch.distributed.run  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import transencoder.hub.push
    import transencoder.hub.releases
    import transencoder.run.checks
    import transencoder.run.runner
    import transencoder.run.summary
    import transencoder.search.mining
    import transencoder.training  # noqa: F401


def answer(connection: socket.socket) -> None:
    """Run one script in a process of its own, which is this one's child, and send its exit code."""
    head, ancillary, *_ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    if not ancillary:  # the client was killed before it could ask
        os._exit(0)
    files = array.array("i")
    files.frombytes(ancillary[0][2][: 3 * files.itemsize])
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    words, python, client, environment, folder, group = json.loads(request)
    worker = os.fork()
    if not worker:
        join(group)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        connection.close()
        os.chdir(folder)
        begin_anew(python, environment)
        run(words)
    note = Path(python).with_name(f"{client}.worker")
    note.write_text(str(worker))
    with contextlib.suppress(OSError):  # the client may have been killed
        connection.sendall(worker.to_bytes(4, "big"))
    for file in files:
        os.close(file)
    _, status = os.waitpid(worker, 0)
    note.unlink()
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):  # the client may have been killed
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def join(group: int) -> None:
    """Put this process into a process group, or into a new one where that is another session's."""
    try:
        os.setpgid(0, group)
    except PermissionError:
        os.setsid()
    except OSError:  # the group has been killed meanwhile
        os._exit(1)


def begin_anew(python: str, environment: dict[str, str]) -> None:
    """Undo what this process has of the server, and a Python that begins has not."""
    import datasets
    import huggingface_hub
    import numpy as np

    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    datasets.fingerprint.fingerprint_rng = random.Random()
    random.seed()
    np.random.seed()
    tempfile.tempdir = None
    sys.executable = python  # a launcher starts its workers with it
    if UNPRIVILEGED in environment:
        lower_root()


def run(words: list[str]) -> NoReturn:
    """A script from its first line to its end, but for the tearing down of so many modules, which takes seconds."""
    code: object = 0
    ctypes.CDLL(None).prctl(15, b"launcher" if words[0] == "-m" else b"worker")  # PR_SET_NAME, for who looks for it
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
