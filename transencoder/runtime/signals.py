"""Stop when the system asks for it: finish what is in hand, save, exit with a code that says "run me again"."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce

from transencoder.runtime.accelerator import DRIVER_VARIABLE, end, log

# SLURM's warning before a time limit (sbatch --signal), its last word, and Ctrl-C.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
LAUNCHED = (DRIVER_VARIABLE, "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # the marks of launchers
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, worth another try


class StopSignal:
    """While it is entered, `SIGNALS` are noted instead of ending the process.

    One may be entered within another, as a stage's is within that of the run: what either notes, both do.

    So is the end of the launcher, which was killed if it ends first: what it had started would go on by itself, beside
    the one that is started next. (A process that a person started may well outlive its terminal.)
    """

    def __enter__(self) -> "StopSignal":
        outer = getattr(signal.getsignal(SIGNALS[0]), "__self__", None)
        self._outer = outer if isinstance(outer, StopSignal) else None
        self.received = self._outer is not None and self._outer.received
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._outer is not None:
            self._outer.received |= self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    @property
    def orphaned(self) -> bool:
        """Return whether the launcher is gone."""
        return self._launcher not in (None, os.getppid())

    def on_any_process(self, state: Accelerator | PartialState) -> bool:
        """Return whether any process was asked to stop: all must call it, and all get the same answer."""
        stop = self.received or self.orphaned
        if state.num_processes == 1:
            return stop
        return bool(reduce(torch.tensor(float(stop), device=state.device), "sum"))


def stop_here(accelerator: Accelerator, stop: StopSignal, what: str) -> NoReturn:
    """End the stage with `EXIT_CODE`. `what`: how far it came."""
    why = "since its launcher is gone," if stop.orphaned else "by a signal"
    with contextlib.suppress(OSError):  # with the launcher the reader of what is printed may be gone
        log(f"stopped {why} after {what}; the same command goes on from there")
    end(accelerator)
    sys.exit(EXIT_CODE)
