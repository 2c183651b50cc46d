"""Other processes: one at a time works on an output, and what killed ones left half written is deleted."""

import atexit
import contextlib
import fcntl
import os
import shutil
import socket
from pathlib import Path

import psutil

from transencoder.errors import InputError

_held: dict[Path, int] = {}


def lock(output: Path) -> None:
    """Take the lock of `output` until `unlock`, or until this process ends, in whatever way.

    What counts is that a living process holds the file .OUTPUT.lock beside it, not that the file is there. Where no
    such file can be made, or the file system knows no locks, nothing is locked.

    Raises:
        InputError: another process is at work there, such as one whose launcher was killed and which was not.
    """
    path = _path(output)
    while path not in _held:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode() or "another process"
            os.close(file)
            raise InputError(f"{output}: {holder} is at work there; wait until it is done, or end it first") from None
        except OSError:
            pass
        if _is_at(path, file):
            with contextlib.suppress(OSError):  # a full disk: the name is a help, no more
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            _held[path] = file
        else:  # whoever held it has removed it meanwhile
            os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def unlock(output: Path) -> None:
    """Give the lock back, if this process has it."""
    path = _path(output)
    if path in _held:
        path.unlink(missing_ok=True)
        os.close(_held.pop(path))


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Delete files and folders that processes of this machine were writing when they were killed.

    Args:
        pattern: of the names, with a star where the number of the process stands.
    """
    before, _, after = pattern.partition("*")
    for path in folder.glob(pattern):
        number = path.name.removeprefix(before).removesuffix(after)
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@atexit.register
def _unlock_all() -> None:
    with contextlib.suppress(OSError):
        for path in list(_held):
            path.unlink(missing_ok=True)
            os.close(_held.pop(path))


def _path(output: Path) -> Path:
    return output.absolute().with_name(f".{output.absolute().name}.lock")
