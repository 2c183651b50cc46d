"""How a stage ends when something is wrong with what it was given."""

import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a storage does to a program, and what a person can do about it. The first come while working (exit code 1), the
# others are there from the beginning and count as bad input (2).
FULL = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "delete something of yours there, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f unlimited)",
}
CLOSED = {
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.EROFS: "choose a folder that can be written to",
}
# What PyTorch and NumPy say when a file cannot be written to its end: not why.
WITHOUT_NUMBER = re.compile(r"inline_container|PytorchStreamWriter|\d+ requested and \d+ written")


# What PyTorch says when another process does not answer in time, or has ended.
LOST = re.compile(r"Timed out waiting|wait timeout|Connection (closed|reset) by peer|Failed to recv|Socket Timeout")
CONTROL = re.compile(r"[^\n\t -~\xa0-\U0010ffff]")  # characters that a terminal obeys
LOST_LINE = (
    "another process of this run has ended, or has not answered within TRANSENCODER_TIMEOUT: is its machine down, or "
    "the network? The same command goes on from where it was"
)


def is_first_process() -> bool:
    """Tell whether this is the first of all processes, told before (and without) torch.distributed."""
    return int(os.environ.get("RANK", 0)) == 0


class InputError(Exception):
    """Bad arguments or bad input: told to the user in one line, exit code 2, before any model is loaded."""


class BrokenRun(Exception):
    """A failure while working that is not the code's: told to the user in one line, exit code 1."""


class FullDisk(BrokenRun):
    """It happened to the process that writes, which is not the first one where another machine's cache is full."""


def printable(text: str) -> str:
    """Return text for a terminal: control characters but line ends and tabs as escapes such as \\x1b."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def report_and_exit(message: str, code: int = 2, from_all: bool = False) -> None:
    """Print one line on stderr and exit. `from_all`: from any process; else from the first only, as all have it."""
    if from_all or is_first_process():
        script = os.path.basename(sys.argv[0])
        line = printable(f"{script}: error: {' '.join(message.split())}")
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.exit(code)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Turn an `InputError` of a script's `main` into one line and exit code 2, a `BrokenRun` into one and code 1, and
    the error of a full or closed disk or of a lost machine into one of them; other errors keep their traceback.
    """

    @functools.wraps(main)
    def wrapper(*words: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows Latin-1 only
        try:
            main(*words)
        except InputError as error:
            report_and_exit(str(error))
        except BrokenRun as error:
            report_and_exit(str(error), 1, from_all=isinstance(error, FullDisk))
        except BrokenPipeError:  # who reads what is printed is gone, such as a driver that was killed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
            sys.exit(1)
        except Exception as error:
            if getattr(error, "errno", None) == errno.ENAMETOOLONG:
                report_and_exit(f"{str(error.filename)[:60]}...: longer than a file's name can be")
            if isinstance(error, RuntimeError) and LOST.search(str(error)):
                report_and_exit(LOST_LINE, 1, from_all=os.environ.get("LOCAL_RANK") == "0")  # on each machine
            problem = storage_error(error)
            if problem is None:
                raise
            report_and_exit(str(problem), 2 if isinstance(problem, InputError) else 1, from_all=True)

    return wrapper


def storage_error(error: BaseException | None, path: str | Path | None = None) -> InputError | FullDisk | None:
    """Return what to tell if a full or closed disk is why `error` was raised, by whatever library; else None.

    Args:
        path: what was being written; by default what the error itself says.
    """
    what = "cannot be written: " if path else ""
    while error is not None:
        number = getattr(error, "errno", None) or _number_in(str(error))
        path = path or getattr(error, "filename", None)
        where = f"{path}: " if path else ""
        if number in CLOSED:
            return InputError(f"{where}{what}{os.strerror(number)}; {CLOSED[number]}")
        after = "then the same command goes on from where it was"
        if number in FULL:
            return FullDisk(f"{where}{what}{os.strerror(number)}; {FULL[number]}, {after}")
        if WITHOUT_NUMBER.search(str(error)):
            return FullDisk(f"{where}only a part could be written; if there is no space left, make room, {after}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _number_in(text: str) -> int | None:
    """Return the number in the text of an error from Rust (safetensors, tokenizers) or C++ (pyarrow, FAISS)."""
    found = re.search(r"os error (\d+)|\[errno (\d+)\]", text, re.IGNORECASE)
    if found:
        return int(found.group(1) or found.group(2))
    return next((number for number in FULL if os.strerror(number) in text), None)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """While it is entered, the error of a full or closed disk names `path`."""
    try:
        yield
    except (InputError, BrokenRun):
        raise
    except Exception as error:
        problem = storage_error(error, path)
        if problem is None:
            raise
        raise problem from error
