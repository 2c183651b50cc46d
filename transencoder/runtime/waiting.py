"""How long processes wait for one another: minutes in a sum, hours where one of them works alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from accelerate import PartialState

from transencoder.errors import InputError

TIMEOUT_VARIABLE = "TRANSENCODER_TIMEOUT"
TIMEOUT = 600  # seconds; nothing but `wait_long` may let the others wait longer, since a lost machine costs this time
LONGEST_WAIT = timedelta(hours=24)


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
    """Wait for all processes where one has worked alone, such as tokenizing, for up to `LONGEST_WAIT`."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(_patient_group(dist.group.WORLD))


@cache
def _patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the same processes, talking by gloo: a waiting GPU is idle, and NCCL's own limit does not count."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


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
