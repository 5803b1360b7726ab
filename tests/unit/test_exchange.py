"""Waits of the host for its device are bounded, and end early once another thread has found the group to fail."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from deepep_moe.backends.exchange import Exchange
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
