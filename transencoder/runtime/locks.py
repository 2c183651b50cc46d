"""One process at a time on an output."""

import atexit
import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from transencoder.errors import InputError

_held: dict[Path, FileLock] = {}


def lock(output: Path) -> None:
    """Take the lock of `output`, the file .OUTPUT.lock beside it, until `unlock` or until this process ends.

    The lock of a process that was killed does not count, although its file stays. Where no such file can be made, or
    the file system knows no locks, nothing is locked.

    Raises:
        InputError: another process is at work there, such as one whose launcher was killed and which was not; or the
            lock's name is taken by a symbolic link.
    """
    path = _path(output)
    if path in _held or not path.parent.is_dir():
        return
    if path.is_symlink():  # its target would be overwritten
        raise InputError(f"{path}: a symbolic link, where a lock file belongs; delete it")
    found = FileLock(path)
    try:
        found.acquire(blocking=False)
        _held[path] = found
        with open(os.open(path, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)), "w") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        holder = path.read_text(encoding="utf-8") or "another process"
        raise InputError(f"{output}: {holder} is at work there; wait until it is done, or end it first") from None
    except OSError:  # such as a full disk: the name is a help, no more
        pass


def unlock(output: Path) -> None:
    """Give the lock back, if this process has it."""
    _release(_path(output))


def _release(path: Path) -> None:
    if path in _held:
        path.unlink(missing_ok=True)
        _held.pop(path).release()


@atexit.register
def _release_all() -> None:
    with contextlib.suppress(OSError):
        for path in list(_held):
            _release(path)


def _path(output: Path) -> Path:
    return output.absolute().with_name(f".{output.absolute().name}.lock")
