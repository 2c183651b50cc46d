"""How long processes wait for one another: minutes in a sum, hours where one of them works alone."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

from accelerate import PartialState
from torch.distributed import TCPStore

from transencoder.errors import InputError

TIMEOUT_VARIABLE = "TRANSENCODER_TIMEOUT"
TIMEOUT = 600  # seconds; nothing but `wait_long` may let the others wait longer, since a lost machine costs this time
LONGEST_WAIT = timedelta(hours=24)
_waits = itertools.count()  # all processes wait equally often


def timeout() -> timedelta:
    """Return the time after which a process that is not heard from counts as lost.

    Raises:
        InputError: the environment variable does not hold seconds.
    """
    value = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    if not value.isdecimal() or not int(value):
        raise InputError(f"{TIMEOUT_VARIABLE}={value}: must be a number of seconds, such as {TIMEOUT}")
    return timedelta(seconds=int(value))


def wait_long() -> None:
    """Wait for all processes where one has worked alone, such as tokenizing, for up to `LONGEST_WAIT`.

    They meet in the key-value store through which they found one another. Their process group would give up earlier.
    """
    processes = PartialState().num_processes
    if processes == 1:
        return
    key = f"trans-encoder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_waits)}"
    if _store().add(key, 1) == processes:
        _store().set(f"{key}/all", "")
    _store().wait([f"{key}/all"], LONGEST_WAIT)


@cache
def _store() -> TCPStore:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """Let the first process of each machine fill the cache, which the others then read.

    Accelerate's own context of this name leaves the others waiting when the first one fails; here they go on, meet the
    same error, and every process ends in the same way.
    """
    state = PartialState()
    if not state.is_local_main_process:
        wait_long()
    try:
        yield
    finally:
        if state.is_local_main_process:
            wait_long()
