"""Stopping when the system asks for it: finish what is in hand, save, exit with a code that says "run me again"."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

from accelerate import Accelerator

from transencoder.runtime.accelerator import DRIVER_VARIABLE, log

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # SLURM's warning before a time limit (sbatch --signal), and its last word
LAUNCHED = (DRIVER_VARIABLE, "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # the marks of launchers
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, worth another try


class StopSignal:
    """While it is entered, `SIGNALS` are noted instead of ending the process.

    So is the end of the launcher, which was killed if it ends first: what it had started would go on by itself, beside
    the one that is started next. (A process that a person started may well outlive its terminal.)
    """

    def __enter__(self) -> "StopSignal":
        self.received = False
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    @property
    def orphaned(self) -> bool:
        """Whether the launcher is gone."""
        return self._launcher not in (None, os.getppid())

    def on_any_process(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all must call it, and all get the same answer."""
        stop = self.received or self.orphaned
        if accelerator.num_processes == 1:
            return stop
        if stop:
            accelerator.set_trigger()
        return accelerator.check_trigger()


def stop_here(accelerator: Accelerator, stop: StopSignal, what: str) -> NoReturn:
    """End the process with `EXIT_CODE`. `what`: how far it came."""
    why = "since its launcher is gone," if stop.orphaned else "by a signal"
    with contextlib.suppress(OSError):  # with the launcher the reader of what is printed may be gone
        log(f"stopped {why} after {what}; the same command goes on from there")
    accelerator.end_training()
    sys.exit(EXIT_CODE)
