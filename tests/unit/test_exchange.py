"""Waits of the host for its device are bounded and end early once a thread has found a failure; what errors say."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from deepep_moe.backends.exchange import Exchange
from deepep_moe.backends.rollcall import Note, explain
from deepep_moe.errors import PeerError, RankMismatchError


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.new_group([0])
    dist.destroy_process_group()


class Event:
    """Like ``torch.cuda.Event``: complete after some queries."""

    def __init__(self, queries: float) -> None:
        self.left = queries

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_wait_for_the_device_ends_with_an_error_after_the_timeout(group: dist.ProcessGroup) -> None:
    exchange = Exchange(group, torch.device("cpu"), timeout_seconds=0.3)
    began = time.monotonic()
    with pytest.raises(PeerError, match="the wait for the device timed out"):
        exchange.wait_for("dispatch", Event(float("inf")))  # type: ignore[arg-type]
    assert 0.3 <= time.monotonic() - began < 10  # finding out which peer it was takes up to 4 s
    assert 0.3 <= exchange.waited["dispatch"] < 10
    assert not exchange.usable
    with pytest.raises(PeerError, match=r"combine: .*the wait for the device timed out"):
        exchange.wait_for("combine", Event(0))  # type: ignore[arg-type]


def test_a_wait_for_the_device_ends_when_it_is_done(group: dist.ProcessGroup) -> None:
    exchange = Exchange(group, torch.device("cpu"), timeout_seconds=60)
    event = Event(50)
    exchange.wait_for("dispatch", event)  # type: ignore[arg-type]
    assert event.left == -1
    assert exchange.usable and exchange.waited["dispatch"] < 30 and exchange.waited["combine"] == 0


def test_a_wait_for_the_device_ends_when_another_thread_finds_a_failure(group: dist.ProcessGroup) -> None:
    exchange = Exchange(group, torch.device("cpu"), timeout_seconds=60)
    finder = threading.Timer(0.2, lambda: exchange.give_up_later("plan", 0.2, "the connection was reset"))
    finder.start()
    began = time.monotonic()
    with pytest.raises(PeerError, match="the connection was reset"):
        exchange.wait_for("dispatch", Event(float("inf")))  # type: ignore[arg-type]
    assert time.monotonic() - began < 30
    finder.join()


def test_the_next_call_raises_the_first_failure_that_another_thread_found(group: dist.ProcessGroup) -> None:
    exchange = Exchange(group, torch.device("cpu"), timeout_seconds=60)
    exchange.check_usable("plan")
    exchange.give_up_later(
        "dispatch", 0.1, "ignored", RankMismatchError("hidden size differs: 8 on rank 0, 16 on rank 1")
    )
    exchange.give_up_later("combine", 0.1, "the connection was reset")
    told = "dispatch: hidden size differs: 8 on rank 0, 16 on rank 1"
    for start in ("", "combine: the group was given up after an earlier error. Make a new group. ("):
        with pytest.raises(RankMismatchError, match=f"^{re.escape(start + told)}"):
            exchange.check_usable("combine")
    assert not exchange.usable


def test_a_difference_between_ranks_keeps_its_class_and_text_on_every_rank() -> None:
    differs = "hidden size differs between the ranks of the group: 64 on rank 0; 128 on rank 1"
    found = Note("dispatch", 0.1, False, differs, mismatch=True)
    broke_off, lost = Note("dispatch", 0.0, False, "no memory"), Note("dispatch", 1.0, False)
    for notes, kind, said in (
        ({0: found, 1: lost}, RankMismatchError, f"dispatch: {differs}"),
        ({0: lost, 1: found}, RankMismatchError, f"dispatch: {differs}"),
        ({0: broke_off, 1: lost}, PeerError, "dispatch: rank 1 of 2: rank 0 broke off dispatch: no memory"),
    ):
        assert explain(1, 2, None, 30.0, notes, "the connection closed") == (kind, said)


def test_threads_end_before_the_interpreter() -> None:
    """A thread that is inside of torch's C++ code when the interpreter ends aborts the process."""
    script = """
import atexit, threading
alive = lambda: [thread.name for thread in threading.enumerate() if thread.name.startswith("deepep_moe")]
atexit.register(lambda: print(alive()))  # runs last
import torch
from types import SimpleNamespace
from deepep_moe.backends.announcements import Announced, Announcements

exchange = SimpleNamespace(world_size=2, usable=True, timeout_seconds=60, device=torch.device("cpu"))
announcements = Announcements(exchange, compared=False)
unwritten = torch.full((2, 19), -(2**63))
announcements._watch(Announced("dispatch", {}, 1, float("inf"), [], copies=[unwritten], enqueued=True))
print(alive())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["['deepep_moe announcements']", "[]"], done.stdout + done.stderr
