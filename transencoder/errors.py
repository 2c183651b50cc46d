"""How a stage ends when something is wrong with what it was given."""

import errno
import functools
import os
import sys
from collections.abc import Callable


def is_first_process() -> bool:
    """Whether this is the first of all processes, told before (and without) torch.distributed."""
    return int(os.environ.get("RANK", 0)) == 0


class InputError(Exception):
    """Bad arguments or bad input: told to the user in one line, exit code 2, before any model is loaded."""


class BrokenRun(Exception):
    """A failure while working that is not the code's: told to the user in one line, exit code 1."""


def report_and_exit(message: str, code: int = 2) -> None:
    """Print one line on stderr (from the first process only) and exit."""
    if is_first_process():
        script = os.path.basename(sys.argv[0])
        line = f"{script}: error: {' '.join(message.split())}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.exit(code)


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Turn an `InputError` of a script's `main` into one line and exit code 2, and a `BrokenRun` into one and code 1;
    other errors keep their traceback.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except InputError as error:
            report_and_exit(str(error))
        except BrokenRun as error:
            report_and_exit(str(error), 1)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            report_and_exit(f"{str(error.filename)[:60]}...: longer than a file's name can be")

    return wrapper
