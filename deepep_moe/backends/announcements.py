"""Agreement and time limits of calls on a GPU that the host does not wait for.

Each dispatch and combine sends its header (headers.py): ahead of its rows if its format is new, else together with
them. The kernels that write the results compare the headers of all ranks and write NaN if they differ. A thread of this
process reads a copy of the headers, and how long each call takes. If it finds a failure it gives the group up, which
ends all waits, and this rank's next call raises the error.

Ranks that send rows of different sizes wait for each other forever, and so do those whose peer refuses its input or is
in another call. If a call takes longer than a second, plans included, the ranks tell each other through the group's
store (inquiry.py) which call they are in, and give up if these differ or if another rank has given up.

The thread reads pinned memory only, which the device fills. It calls no function of CUDA: such calls, even of another
thread, would break a graph capture that is running. It ends before the interpreter does, which would otherwise stop it
inside of torch's C++ code and abort the process.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Phase
from deepep_moe.backends.exchange import Exchange, Transfer
from deepep_moe.backends.headers import HEADER_WORDS, Fact, agree, compare_facts
from deepep_moe.backends.inquiry import Inquiry
from deepep_moe.backends.rollcall import anyone_gave_up
from deepep_moe.errors import RankMismatchError

_POLL_SECONDS = 0.02
_IDLE_SECONDS = 1.0  # without a call in flight, after which the thread ends
_INQUIRE_SECONDS = 1.0  # of a call in flight, after which ranks tell each other which one it is
_LONGEST_PAUSE_SECONDS = 5.0  # between two looks at what the others tell
_UNWRITTEN = -(2**63)  # in pinned memory that the device has not written yet; in no header
_END_SECONDS = 5.0  # for threads to end, before the interpreter does
_ending = threading.Event()  # set when the interpreter is about to end
_threads: set[threading.Thread] = set()  # that run
_FORMAT = slice(4, None)  # of a header: what stays the same from plan to plan


@dataclass(eq=False)
class Announced:
    """One call in flight."""

    phase: Phase
    facts: Mapping[str, Fact]
    number: int
    began: float
    header: list[int]
    headers: Tensor | None = None
    """[R, HEADER_WORDS] int64 on the device; None where calls are not compared."""
    copies: list[Tensor] = field(default_factory=list)
    """The same in pinned memory, once the device has written it; the last one when the rows have arrived."""
    enqueued: bool = False
    """Whether the last of ``copies`` is there."""
    compared: bool = False
    over: bool = False
    asked: bool = False


class Announcements:
    """The calls of one rank over one group that the host does not wait for.

    Args:
        exchange: of the group, on a GPU.
        compared: whether calls exchange headers; their time is limited in any case.
    """

    def __init__(self, exchange: Exchange, compared: bool) -> None:
        self._exchange, self._compared = exchange, compared
        self._formats: set[tuple[int, ...]] = set()
        """Formats of calls whose headers went ahead of the rows."""
        self._calls: deque[Announced] = deque()
        self._free: list[Tensor] = []
        """Pinned memory, kept because freeing it may record an event on a stream that is being captured."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._sent: Tensor | None = None

    def begin(self, phase: Phase, facts: Mapping[str, Fact]) -> Announced:
        """Begin a call whose input is good. It is checked from now on."""
        exchange = self._exchange
        call = Announced(phase, facts, exchange.count_call(), time.monotonic(), exchange.header(phase, facts))
        if exchange.world_size == 1:
            return call
        form = (call.header[1], *call.header[_FORMAT])
        if self._compared and form not in self._formats:
            self._formats.add(form)
            headers = self._headers(call)
            exchange.transfer(phase, [headers])
            self._copy_to_host(call, call.headers)
        self._watch(call)
        return call

    @contextmanager
    def waiting(self, phase: Phase, facts: Mapping[str, Fact], header: list[int]) -> Iterator[None]:
        """Context of a call that the host waits for."""
        call = Announced(phase, facts, self._exchange.count_call(), time.monotonic(), header)
        if self._exchange.world_size == 1:
            yield
            return
        self._watch(call)
        try:
            yield
        finally:
            with self._lock:
                call.over = True
                if call in self._calls:
                    self._calls.remove(call)

    def _watch(self, call: Announced) -> None:
        with self._lock:
            self._calls.append(call)
            if self._thread is None and not _ending.is_set():
                self._thread = _start("announcements", self._run)

    def move(self, call: Announced, rows: Transfer) -> None:
        """Exchange the rows of ``call``, on the current stream."""
        transfers = [rows]
        if self._compared and call.headers is None:
            transfers.insert(0, self._headers(call))
        self._exchange.transfer(call.phase, transfers)
        self._copy_to_host(call, call.headers)
        call.enqueued = True

    def refuse(self, phase: Phase, reason: str) -> None:
        """Take this rank's place in a call that it refuses.

        If all ranks refuse, nothing is in flight and they can go on. Otherwise the group ends, because this rank cannot
        know the size of what its peers send.
        """
        exchange = self._exchange
        number = exchange.count_call()
        if exchange.world_size == 1:
            return
        with suppress(Exception):  # without the store, peers wait until their time limit
            inquiry = Inquiry(exchange.group, exchange.device.type)
            inquiry.refuse(number)
            began = time.monotonic()
            while exchange.usable and time.monotonic() - began < exchange.timeout_seconds:
                if len(inquiry.refusing(number)) == exchange.world_size:
                    return
                if inquiry.headers(number):
                    break
                time.sleep(_POLL_SECONDS)
        exchange.break_off(phase, reason)

    def check(self) -> None:
        """End the group if a call in flight has failed. Local, does not wait."""
        with self._lock:
            while self._calls and self._is_over(self._calls[0]):
                call = self._calls.popleft()
                call.over = True
                self._free += call.copies

    def _is_over(self, call: Announced) -> bool:
        done = call.enqueued and _is_written(call.copies[-1])
        if self._compared and not call.compared and call.copies and _is_written(call.copies[0]):
            self._compare(call, call.copies[0].tolist())
            call.compared = True
        if done or not self._exchange.usable:
            return True
        waited = time.monotonic() - call.began
        if waited > self._exchange.timeout_seconds:
            self._exchange.give_up_later(call.phase, waited, "the operation timed out")
        elif waited > _INQUIRE_SECONDS and not call.asked:
            call.asked = True
            _start("inquiry", partial(self._inquire, call))
        return False

    def _compare(self, call: Announced, headers: list[list[int]]) -> None:
        if agree(headers) or any(header[0] for header in headers):  # a refused plan has no facts
            return
        waited = time.monotonic() - call.began
        try:
            compare_facts(call.facts, torch.tensor(headers, dtype=torch.int64, device="cpu"))
        except RankMismatchError as error:
            self._exchange.give_up_later(call.phase, waited, str(error), error)

    def _inquire(self, call: Announced) -> None:
        """Find out whether all ranks are in ``call``, until it is over."""
        exchange, pause = self._exchange, _POLL_SECONDS
        with suppress(Exception):  # without the store, the time limit is left
            inquiry = Inquiry(exchange.group, exchange.device.type)
            inquiry.write(call.number, call.header)
            while exchange.usable and not call.over and not _ending.is_set():
                waited = time.monotonic() - call.began
                # Read first: a rank that gives up has written its header before, so the difference is found here too.
                gave_up = anyone_gave_up(exchange.group, exchange.device.type)
                headers = inquiry.headers(call.number)
                if inquiry.refusing(call.number):
                    exchange.give_up_later(call.phase, waited, "another rank refused its input")
                if len(headers) == exchange.world_size:
                    self._compare(call, [headers[rank] for rank in range(exchange.world_size)])
                if gave_up:
                    exchange.give_up_later(call.phase, waited, "another rank gave up")
                _ending.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _run(self) -> None:
        idle_since = time.monotonic()
        while not _ending.is_set():
            self.check()
            with self._lock:
                if self._calls:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > _IDLE_SECONDS:
                    self._thread = None
                    return
            _ending.wait(_POLL_SECONDS)

    # -- on the device -------------------------------------------------------------------------------------------

    def _headers(self, call: Announced) -> Transfer:
        """An exchange of headers; it sets ``call.headers``."""
        exchange = self._exchange
        shape = (2, exchange.world_size, HEADER_WORDS)
        both = torch.empty(shape, dtype=torch.int64, device=exchange.device)
        extension._C.announce(
            header=call.header,
            num_ranks=exchange.world_size,
            out=both.data_ptr(),
            stream=extension.current_stream(exchange.device),
        )
        call.headers, ones = both[1], [1] * exchange.world_size
        sent, arriving = both.view(torch.uint8).unbind(0)
        return Transfer(sent, ones, ones, arriving)

    def _copy_to_host(self, call: Announced, headers: Tensor | None) -> None:
        """Let the device write ``headers``, or anything without them, to pinned memory of ``call``."""
        shape, on_gpu = (self._exchange.world_size, HEADER_WORDS), self._exchange.device.type == "cuda"
        if headers is None:
            if self._sent is None:
                self._sent = torch.zeros(shape, dtype=torch.int64, device=self._exchange.device)
            headers = self._sent
        with self._lock:
            copy = self._free.pop() if self._free else None
        if copy is None:
            copy = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        copy.fill_(_UNWRITTEN)
        call.copies.append(copy)
        copy.copy_(headers, non_blocking=True)


def _start(name: str, run: Callable[[], None]) -> threading.Thread:
    def body() -> None:
        try:
            run()
        finally:
            _threads.discard(thread)

    thread = threading.Thread(target=body, name=f"deepep_moe {name}", daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


@atexit.register
def _end() -> None:
    _ending.set()
    until = time.monotonic() + _END_SECONDS
    for thread in list(_threads):
        thread.join(max(0.0, until - time.monotonic()))


def _is_written(pinned: Tensor) -> bool:
    return _UNWRITTEN not in pinned.flatten().tolist()
