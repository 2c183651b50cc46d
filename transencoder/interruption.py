"""Stopping when the system asks for it: finish what is in hand, save, exit with a code that says "run me again"."""

import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

from accelerate import Accelerator

from transencoder.runtime import log

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # SLURM's warning before a time limit (sbatch --signal), and its last word
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, worth another try


class StopSignal:
    """While it is entered, `SIGNALS` are noted instead of ending the process."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_any_process(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all must call it, and all get the same answer."""
        if accelerator.num_processes == 1:
            return self.received
        if self.received:
            accelerator.set_trigger()
        return accelerator.check_trigger()


def stop_here(accelerator: Accelerator, what: str) -> NoReturn:
    """End the process with `EXIT_CODE`. `what`: how far it came."""
    log(f"stopped by a signal after {what}; the same command goes on from there")
    accelerator.end_training()
    sys.exit(EXIT_CODE)
