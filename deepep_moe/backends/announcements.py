"""Agreement and time limits of calls on a GPU that the host does not wait for.

Each dispatch and combine sends its header (exchange.py) ahead of its rows, and the host does not wait for it. The
kernels that write the results compare the headers of all ranks and write NaN if they differ. A thread of this process
checks a copy of the headers, and how long each call takes. If it finds a failure it gives the group up, which ends all
waits, and this rank's next call raises the error.

The thread reads pinned memory only, which the device fills. It calls no function of CUDA: such calls, even of another
thread, would break a graph capture that is running.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Phase
from deepep_moe.backends.exchange import HEADER_WORDS, Exchange, Fact, agree, compare_facts
from deepep_moe.errors import DeepEPMoEError, RankMismatchError

_POLL_SECONDS = 0.02
_IDLE_SECONDS = 1.0  # without a call in flight, after which the thread ends
_UNWRITTEN = -(2**63)  # in pinned memory that the device has not written yet; in no header


@dataclass
class Announced:
    """One call in flight."""

    phase: Phase
    facts: Mapping[str, Fact]
    began: float
    receive: Callable[[], Tensor] | None = None
    """Makes the current stream wait for the headers."""
    headers: Tensor | None = None
    """[R, HEADER_WORDS] int64 on the device; None where calls are not compared."""
    copy: Tensor | None = None
    """The same in pinned memory, once the device has written it."""
    compared: bool = False
    """Whether ``copy`` has been compared."""
    done: Tensor | None = None
    """[1] in pinned memory, written when the rows of the call have arrived."""


class Announcements:
    """The calls of one rank over one group that the host does not wait for.

    Args:
        exchange: of the group, on a GPU.
        compared: whether calls exchange headers; their time is limited in any case.
    """

    def __init__(self, exchange: Exchange, compared: bool) -> None:
        self._exchange, self._compared = exchange, compared
        self._calls: deque[Announced] = deque()
        self._finished: list[Announced] = []
        """Freed by :meth:`begin`: freeing pinned memory may record an event on a stream that is being captured."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._one: Tensor | None = None  # on the device

    def begin(self, phase: Phase, facts: Mapping[str, Fact]) -> Announced:
        """Start to send the header of a call whose input is good. The call is checked from now on."""
        call = Announced(phase, facts, time.monotonic())
        if self._exchange.world_size == 1:
            return call
        if self._compared:
            call.receive = self._send(phase, self._exchange.header(phase, facts))
        with self._lock:
            self._finished.clear()
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deepep_moe announcements", daemon=True)
                self._thread.start()
        return call

    def receive(self, call: Announced) -> None:
        """Receive the headers of ``call``. The rows may be under way already; the headers were sent before them."""
        if call.receive is not None:
            call.headers, call.receive = call.receive(), None
            call.copy = self._copy_to_host(call.headers)

    def end(self, call: Announced) -> None:
        """The rows of the call have been enqueued on the current stream."""
        if self._exchange.world_size > 1:
            if self._one is None:
                self._one = torch.ones(1, dtype=torch.int64, device=self._exchange.device)
            call.done = self._copy_to_host(self._one)

    def refuse(self, phase: Phase, reason: str) -> None:
        """Take this rank's place in a call that it refuses.

        If all ranks refuse, nothing is in flight and they can go on. Otherwise the group ends, because this rank cannot
        know the size of what its peers send.
        """
        exchange = self._exchange
        if exchange.world_size == 1:
            return
        if self._compared:
            with suppress(DeepEPMoEError):  # this rank raises its own error
                receive = self._send(phase, exchange.header(phase, {}, refused=True))
                if exchange.to_host(phase, receive())[:, 0].all():
                    return
        exchange.break_off(phase, reason)

    def check(self) -> None:
        """End the group if a call in flight has failed. Local, does not wait."""
        with self._lock:
            while self._calls and self._is_over(self._calls[0]):
                self._finished.append(self._calls.popleft())

    def _is_over(self, call: Announced) -> bool:
        done = call.done is not None and _is_written(call.done)  # read first: headers are written before it
        if call.copy is not None and not call.compared and _is_written(call.copy):
            self._compare(call, call.copy)
            call.compared = True
        if done or not self._exchange.usable:
            return True
        waited = time.monotonic() - call.began
        if waited > self._exchange.timeout_seconds:
            self._exchange.give_up_later(call.phase, waited, "the operation timed out")
        return False

    def _compare(self, call: Announced, headers: Tensor) -> None:
        if agree(headers.tolist()):
            return
        waited = time.monotonic() - call.began
        if headers[:, 0].any():  # whoever refused has left a note
            self._exchange.give_up_later(call.phase, waited, "another rank refused its input")
            return
        try:
            compare_facts(call.facts, headers)
        except RankMismatchError as error:
            self._exchange.give_up_later(call.phase, waited, str(error), error)

    def _run(self) -> None:
        idle_since = time.monotonic()
        while True:
            self.check()
            with self._lock:
                if self._calls:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > _IDLE_SECONDS:
                    self._thread = None
                    return
            time.sleep(_POLL_SECONDS)

    # -- on the device -------------------------------------------------------------------------------------------

    def _send(self, phase: Phase, header: list[int]) -> Callable[[], Tensor]:
        """Start an exchange of headers; the result gives them, [R, HEADER_WORDS] on the device."""
        exchange = self._exchange
        out = torch.empty((exchange.world_size, HEADER_WORDS), dtype=torch.int64, device=exchange.device)
        extension._C.announce(
            header=header,
            num_ranks=exchange.world_size,
            out=out.data_ptr(),
            stream=extension.current_stream(exchange.device),
        )
        ones = [1] * exchange.world_size
        return exchange.start_all_to_all(phase, out, ones, ones)

    def _copy_to_host(self, tensor: Tensor) -> Tensor:
        """Pinned memory that the device will write ``tensor`` to."""
        copy = torch.full(tensor.shape, _UNWRITTEN, dtype=torch.int64, device="cpu", pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)


def _is_written(pinned: Tensor) -> bool:
    return _UNWRITTEN not in pinned.flatten().tolist()
