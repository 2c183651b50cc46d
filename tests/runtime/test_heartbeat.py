"""Heartbeats over a store in memory: what counts as lost, and what does not."""

import socket
import threading
import time

import pytest
from torch.distributed import DistNetworkError, HashStore

from transencoder.config.parsing import parse_stage
from transencoder.errors import BrokenRun
from transencoder.runtime import accelerator as runtime
from transencoder.runtime.heartbeat import Heartbeat, watch_machines


def heartbeat(store, machine, machines, losses, silence=0.5):
    return Heartbeat(store, machine, machines, lambda *loss: losses.append(loss), beat=0.05, silence=silence)


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_machines_that_beat_are_not_lost_and_one_that_falls_silent_is():
    store, losses = HashStore(), {number: [] for number in range(3)}
    beats = [heartbeat(store, number, 3, losses[number]) for number in range(3)]
    for one in beats:
        one.start()
    # Each has heard each of the others.
    assert wait_for(lambda: all(beat for one in beats for beat, _ in one.last_beats.values()))
    assert not any(losses.values())
    beats[2].stopped.set()  # its network is cut: no more beats, and no farewell
    assert wait_for(lambda: losses[0] and losses[1])
    assert losses[0] == losses[1] == [(f"nothing heard from {socket.gethostname()} for 0 s", False)]
    assert not losses[2]


def test_a_machine_that_has_come_to_its_end_may_be_silent():
    store, losses = HashStore(), []
    other, one = heartbeat(store, 0, 2, []), heartbeat(store, 1, 2, losses)
    other.start()
    one.start()
    assert wait_for(lambda: one.last_beats[0][0])
    other.stop()
    assert wait_for(lambda: one.last_beats[0][0] == b"done")
    assert one.silent(time.monotonic() + 3600) == [1]  # its own beats count
    one.stop()
    assert not losses


class HangingStore:
    """A store whose machine is gone: requests never return."""

    def set(self, key, value):
        threading.Event().wait()


def test_a_request_that_never_returns_is_silence_too():
    losses = []
    heartbeat(HangingStore(), 1, 2, losses).start()
    assert wait_for(lambda: losses)
    assert losses == [(f"{socket.gethostname()} has not reached the other machines for 0 s", True)]


def test_a_process_that_was_suspended_blames_nobody(monkeypatch):
    losses, one = [], heartbeat(HangingStore(), 0, 2, [], silence=3600)
    one.on_loss = lambda *loss: losses.append(loss)
    threading.Thread(target=one._watch, daemon=True).start()
    clock, offset = time.monotonic, 7200.0
    monkeypatch.setattr("transencoder.runtime.heartbeat.time.monotonic", lambda: clock() + offset)
    assert wait_for(lambda: all(heard > clock() + offset / 2 for _, heard in one.last_beats.values()))
    assert not losses
    one.stopped.set()


@pytest.mark.parametrize("environment", [{}, {"GROUP_WORLD_SIZE": "1"}, {"GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "1"}])
def test_one_machine_needs_none_and_each_machine_has_one(monkeypatch, environment):
    for name in ("GROUP_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert watch_machines() is None


def test_a_process_that_ends_before_all_have_met_is_one_line(monkeypatch):
    def fail(**_):
        raise DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.\nException raised from ...")

    monkeypatch.setattr(runtime, "Accelerator", fail)
    with pytest.raises(BrokenRun, match=r"or one has ended: Failed to recv, got 0 bytes\. [^\n]*closed\.$"):
        runtime.start(parse_stage("score_pairs", argv=["--encoders", "x", "--pairs", "x", "--output", "x"]))
