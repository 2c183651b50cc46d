"""A Python that has the libraries imported already, so that a kill finds a stage at work and not at its imports.

`python tests/faults/warm.py SOCKET` is the server: it imports what the scripts import, once, and forks a process for
each script that it is asked to run. `write_client` makes a `python` that asks it: the forked process gets the client's
arguments, environment, folder, files and process group, and its exit code becomes the client's. What runs is the
script itself, from its first line.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
UNPRIVILEGED = "FAULTS_UNPRIVILEGED"  # in the environment: root, too, has only the rights that it was given
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), os.getpgid(0)]).encode()
files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
server.sendmsg([len(request).to_bytes(4, "big")], files)
server.sendall(request)
answer = server.recv(1)
os._exit(answer[0] if answer else 137)
"""


def write_client(folder: Path, socket_path: Path) -> None:
    """Write a `python` that runs scripts in the server into `folder`, which is for PATH."""
    folder.mkdir()
    path = folder / "python"
    path.write_text(CLIENT.format(python=sys.executable, socket=str(socket_path)))
    path.chmod(0o755)


def serve(path: str) -> None:
    """Answer until the parent is gone."""
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "tests"))
    import_all()
    gc.collect()
    gc.freeze()  # what is there now is never looked at again, and so never copied
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    os.chmod(path, 0o777)
    server.listen(16)
    server.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if not os.fork():
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return answer(connection)
        connection.close()


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
    """What plan_run.py, the stages and summarize_run.py import, at once or later."""
    import conftest  # noqa: F401
    import faiss  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import transencoder.hub
    import transencoder.mining
    import transencoder.plan
    import transencoder.releases
    import transencoder.summary
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
    words, environment, folder, group = json.loads(request)
    import datasets

    worker = os.fork()
    if not worker:
        try:
            os.setpgid(0, group)
        except OSError:  # the group has been killed meanwhile
            os._exit(1)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        connection.close()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
        tempfile.tempdir = None
        if UNPRIVILEGED in environment:
            lower_root()
        run(words)
    for file in files:
        os.close(file)
    _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):  # the client may have been killed
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def run(words: list[str]) -> NoReturn:
    """A script from its first line to its end, but for the tearing down of so many modules, which takes seconds."""
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    code: object = 0
    try:
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
    serve(sys.argv[1])
