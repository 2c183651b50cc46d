"""Noticing that a machine is gone. A network that is cut sends no word of it: without this, the others would wait for
the lost machine's part of a sum until the process group's own limit, which is hours.
"""

import atexit
import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
from torch.distributed import Store, TCPStore

BEAT = 5.0  # seconds
SILENCE = 40.0  # seconds without a beat after which a machine counts as lost
DONE = b"done"  # the last beat of a machine that has come to its end


class Heartbeat:
    """Sends this machine's beat to the processes' key-value store, and listens for those of the others.

    Two threads, because a request to a store that has gone may never return: one talks to the store, the other only
    looks at the clock.

    Args:
        store: shared by all machines.
        machine, machines: this one's number, from 0, and how many there are.
        on_loss: called once, with a sentence that says what is lost, and whether it is this machine that is cut off.
        beat, silence: seconds.
    """

    def __init__(
        self,
        store: Store,
        machine: int,
        machines: int,
        on_loss: Callable[[str, bool], None],
        beat: float = BEAT,
        silence: float = SILENCE,
    ):
        self.store, self.machine, self.machines, self.on_loss = store, machine, machines, on_loss
        self.beat, self.silence = beat, silence
        self.name = socket.gethostname()
        self.stopped = threading.Event()
        now = time.monotonic()
        self.last_beats = {number: (b"", now) for number in range(machines)}  # what was heard, and when it was news

    def start(self) -> None:
        """Begin, in threads that do not keep the process alive."""
        for work in (self._talk, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Tell the others that this machine needs to be heard no more."""
        self.stopped.set()
        with contextlib.suppress(RuntimeError):  # the store may have ended before
            self.store.set(_key(self.machine), DONE)

    def _talk(self) -> None:
        count = 0
        while not self.stopped.wait(self.beat if count else 0):
            count += 1
            try:
                self.store.set(_key(self.machine), f"{count} {self.name}")
                for number in range(self.machines):
                    if self.store.check([_key(number)]):
                        self._hear(number, self.store.get(_key(number)))
            except RuntimeError:  # the store is gone, which is silence: its machine's, and that of all others
                return

    def _hear(self, number: int, beat: bytes) -> None:
        if beat != self.last_beats[number][0]:
            self.last_beats[number] = (beat, time.monotonic())

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.stopped.wait(self.beat / 5):
            now = time.monotonic()
            if now - before > self.beat:  # this process was itself suspended: nobody can be blamed for the silence
                self.last_beats = {number: (beat, now) for number, (beat, _) in self.last_beats.items()}
            before = now
            silent = self.silent(now)
            if silent and not self.stopped.is_set():
                self.stopped.set()
                self.on_loss(self.sentence(silent), self.machine in silent)

    def silent(self, now: float) -> list[int]:
        """The machines that have not been heard for too long."""
        return [
            number for number, (beat, heard) in self.last_beats.items() if beat != DONE and now - heard > self.silence
        ]

    def sentence(self, silent: list[int]) -> str:
        """What is lost. A machine that does not even hear itself has no way to the store."""
        if self.machine in silent:
            return f"{self.name} has not reached the other machines for {self.silence:.0f} s"
        names = [self.last_beats[number][0].decode().partition(" ")[2] or f"machine {number}" for number in silent]
        return f"nothing heard from {', '.join(names)} for {self.silence:.0f} s"


@functools.cache
def watch_machines() -> Heartbeat | None:
    """Start the heartbeat of this machine, in its first process, where there are several machines.

    The launcher says in the environment where its store is and how many machines there are. When one is lost, this
    process ends with code 1, and with it the others here.
    """
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if machines == 1 or int(os.environ.get("LOCAL_RANK", 0)):
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
    heartbeat = Heartbeat(store, int(os.environ["GROUP_RANK"]), machines, _end)
    heartbeat.start()
    atexit.register(heartbeat.stop)
    return heartbeat


def _end(what: str, cut_off: bool) -> None:
    print(f"{what}: is it down, or its network? The same command goes on from the last checkpoint", file=sys.stderr)
    sys.stderr.flush()
    if cut_off:  # then its launcher, too, waits for the store, and would not end the others
        launcher = psutil.Process().parent()
        for process in [*launcher.children(recursive=True), launcher]:
            if process.pid != os.getpid():
                process.kill()
    os._exit(1)  # the main thread may be inside a sum that never ends


def _key(machine: int) -> str:
    return f"trans-encoder/heartbeat/{machine}"
