"""Bounded calls to torch.distributed that name their phase, and raise the error of one rank on all ranks.

Two things can leave a group hanging: a peer that died, and a peer that raised an exception and never joined the
call. The first ends here as :class:`~deepep_moe.errors.PeerError`: every operation has ``timeout_seconds`` of its own,
so that nothing is left running that would keep the process from ending. The second cannot happen to users of
:meth:`Exchange.agreement`: a rank with bad input joins that exchange too, marked, and every rank raises.

What the exchange carries is a header from each rank (headers.py).

An operation that failed leaves ranks in different calls, and its late messages would be taken for those of the next
one. So a group in which an operation failed is given up: later calls raise at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import RLock
from types import TracebackType
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import Phase
from deepep_moe.backends.headers import HEADER_WORDS, SETUP, Fact, agree, compare_facts, header, reason_of, refused_by
from deepep_moe.backends.rollcall import GRACE_SECONDS, Note, explain, roll_call
from deepep_moe.errors import DeepEPMoEError, PeerError, PeerTimeoutError, RankMismatchError
from deepep_moe.extension import is_capturing
from deepep_moe.notices import span

_SPIN_SECONDS = 1e-3  # of a wait for the device, before the host sleeps in between
_NO_PEER_TAG = 2**20  # of a message that is never sent
_NO_FURTHER_USE = "Make a new group: this one is of no further use."


class Room(NamedTuple):
    """Room in the messages of a plan (collective_cuda.py), in words of 8 bytes. Equal on all ranks; it only grows."""

    expert_words: int = 256
    """For the counts of all experts."""
    row_words: int = 2048
    """For the routes of the rows that the receiving rank gets."""


@dataclass
class _State:
    """State of a group that outlives its Exchanges, which ranks garbage-collect at different times."""

    plans: int = 0
    calls: int = 0
    room: Room = field(default_factory=Room)
    given_up: tuple[type[DeepEPMoEError], str] | None = None  # not the exception: its traceback keeps tensors alive
    raised: bool = True  # whether a call of this rank has raised it; False where a thread found it
    lock: RLock = field(default_factory=RLock)  # held while the group is given up


_states: WeakKeyDictionary[dist.ProcessGroup, dict[str, _State]] = WeakKeyDictionary()


_names: WeakKeyDictionary[dist.ProcessGroup, Sequence[int]] = WeakKeyDictionary()


def call_ranks(group: dist.ProcessGroup, names: Sequence[int]) -> None:
    """Let errors number the ranks of ``group`` by ``names``, their ranks in the larger group that users know."""
    _names[group] = names


def given_up(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """The error after which ``group`` cannot be used on ``device`` any more, or None."""
    state = _states.get(group, {}).get(device.type)
    return None if state is None or state.given_up is None else state.given_up[1]


def gather(
    phase: str, group: dist.ProcessGroup, device: torch.device, timeout_seconds: float, mine: object
) -> list[Any]:
    """``mine`` of every rank, sent as JSON over the CPU backend of the group if it has one (ranks may share a GPU)."""
    cpu = [kind for kind in group._device_types if kind.type == "cpu"]
    return Exchange(group, cpu[0] if cpu else device, timeout_seconds).gather(phase, mine)


@dataclass
class Agreement:
    """Input of one rank to :meth:`Exchange.agreement`, and the result."""

    facts: dict[str, Fact] = field(default_factory=dict)
    """Values that must be equal on all ranks, by the names that users know."""
    private: Sequence[int] = ()
    """Values sent to all ranks, at most R."""
    shared: Tensor | None = None
    """[R, R] int64 on the CPU, set by the agreement: row r is ``private`` of rank r, zero-padded."""


class Transfer(NamedTuple):
    """One rank's part in an all-to-all."""

    rows: Tensor
    send_counts: Sequence[int]
    """Consecutive ``rows`` for each rank."""
    recv_counts: Sequence[int]
    out: Tensor
    """Rows that arrive, in rank order."""


class Exchange:
    """Bounded collectives over one group, for tensors on ``device``.

    Args:
        grace_seconds: after a failure, how long to wait for the notes of ranks that fail too (rollcall.py).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout_seconds: float,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self.group, self.device, self.timeout_seconds = group, device, timeout_seconds
        self._grace_seconds = grace_seconds
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._state = _states.setdefault(group, {}).setdefault(device.type, _State())
        self._names = _names.get(group)
        self._kept: dict[torch.Size, tuple[Tensor, torch.cuda.Event]] = {}
        self._options = {own_stream: self._all_to_all_options(own_stream) for own_stream in (False, True)}
        self.waited: dict[str, float] = dict.fromkeys(("plan", "dispatch", "combine"), 0.0)
        """Seconds that the host waited for peers, by phase; others appear when they have been waited for."""

    @property
    def usable(self) -> bool:
        """Whether no operation of the group has failed so far."""
        return self._state.given_up is None

    @property
    def plans(self) -> int:
        """Number of plans made over the group so far, by any backend. Equal on all ranks after an agreement."""
        return self._state.plans

    @property
    def room(self) -> Room:
        return self._state.room

    @room.setter
    def room(self, room: Room) -> None:
        self._state.room = room

    def count_plan(self) -> None:
        """Count a plan, before it can be refused."""
        self._state.plans += 1

    def count_call(self) -> int:
        """Number of a dispatch or combine; equal on all ranks that make the same calls."""
        self._state.calls += 1
        return self._state.calls

    # -- agreement -----------------------------------------------------------------------------------------------

    @contextmanager
    def agreement(self, phase: Phase, *, compared: bool = True) -> Iterator[Agreement]:
        """Agree on entering ``phase``. The body checks this rank's input and fills in the :class:`Agreement`.

        If the body raises, all ranks raise: this one its own error, the others an error with its text. Without
        ``compared`` nothing is exchanged, and a rank that raises ends the group (:meth:`moving`).

        Raises:
            RankMismatchError: on every rank, when facts differ or ranks are in different calls.
            CapacityError: another rank had too little room; its message is repeated.
            PeerError: another rank could not go on for another reason; its message is repeated.
        """
        self.check_usable(phase)
        mine = Agreement()
        if not compared:
            with self.moving(phase):
                yield mine
            return
        try:
            yield mine
        except Exception as error:
            with suppress(PeerError):  # this rank raises its own error
                self.exchange_headers(phase, Agreement(), error)
            raise
        except BaseException as error:  # as in _waiting
            self.break_off(phase, repr(error))
            raise
        self.exchange_headers(phase, mine, None)

    def exchange_headers(self, phase: Phase, mine: Agreement, problem: Exception | None) -> None:
        """Send ``problem`` to the others, or compare facts with them and set ``mine.shared``."""
        header = self.header(phase, mine.facts, refused=problem is not None)
        headers = self._headers_of_all(phase, header, mine.private)
        if self.world_size > 1:
            self.compare_headers(phase, mine.facts, headers, problem)
        mine.shared = headers[:, HEADER_WORDS:]

    def _headers_of_all(self, phase: str, header: list[int], private: Sequence[int]) -> Tensor:
        """``header`` and ``private`` (at most R numbers) of every rank: [R, HEADER_WORDS + R] on the CPU.

        Its size is the same in all calls, so that ranks in different calls detect it.
        """
        numbers = [*header, *private, *[0] * (self.world_size - len(private))]
        row = torch.tensor([numbers], dtype=torch.int64, device="cpu")
        return row if self.world_size == 1 else self.to_host(phase, self._to_all(phase, to_device(row, self.device)))

    def header(self, phase: str, facts: Mapping[str, Fact], *, refused: bool = False) -> list[int]:
        """The header that this rank sends in an agreement."""
        return header(phase, facts, self._state.plans, refused)

    def compare_headers(
        self, phase: str, facts: Mapping[str, Fact], headers: Tensor, problem: Exception | None
    ) -> None:
        """Raise an error if the ``headers`` of all ranks, [R, at least HEADER_WORDS] on the CPU, differ.

        If a rank refuses, all ranks exchange their reasons. This rank's reason is ``problem``; with one it returns.
        """
        if problem is None and agree(headers[:, :HEADER_WORDS].tolist()) and not headers[0, 0]:
            return
        self._state.plans = int(headers[:, 2].max())  # ranks in different calls may have counted differently
        if headers[:, 0].any():  # all ranks see it, so all take part in a second exchange
            reasons = self.gather(phase, None if problem is None else reason_of(problem))
            if problem is not None:
                return
            raise refused_by({rank: reason for rank, reason in enumerate(reasons) if reason is not None}, phase)
        compare_facts(facts, headers)

    def moving(self, phase: Phase) -> _Moving:
        """Context of the work after an agreement. If it fails on this rank alone, the peers are told why."""
        return _Moving(self, phase)

    # -- communication -------------------------------------------------------------------------------------------

    def all_to_all(self, phase: str, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Send ``send_counts[r]`` consecutive ``rows`` to each rank r, receive ``recv_counts[r]`` from it.

        Returns rows in rank order. Any dtype travels: gloo lacks some, so bytes are what it sees.
        """
        out = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
        self.start(phase, Transfer(rows, send_counts, recv_counts, out))()
        return out

    def start(self, phase: str, transfer: Transfer) -> Callable[[], None]:
        """Start ``transfer`` beside the work of the current stream; what is returned waits for it."""
        if self.world_size == 1:
            transfer.out.copy_(transfer.rows)
            return lambda: None
        self.check_usable(phase)
        with self._waiting(phase):
            work = self._enqueue(transfer)

        def finish() -> None:
            with self._waiting(phase):
                self._wait(work)

        return finish

    def transfer(self, phase: str, transfers: Sequence[Transfer]) -> None:
        """Make ``transfers`` as part of the current stream, with NCCL all in one kernel."""
        if self.world_size == 1:
            for transfer in transfers:
                transfer.out.copy_(transfer.rows)
            return
        self.check_usable(phase)
        with self._waiting(phase):
            if self.device.type == "cpu":
                for transfer in transfers:
                    self._wait(self._enqueue(transfer))
            elif len(transfers) == 1:
                self._enqueue(transfers[0], own_stream=False)
            else:
                self.group._start_coalescing(self.device)
                for transfer in transfers:
                    self._enqueue(transfer, own_stream=False)
                self.group._end_coalescing(self.device)

    def _enqueue(self, transfer: Transfer, *, own_stream: bool = True) -> dist.Work:
        """``own_stream``: NCCL uses a stream of its own instead of the current one."""
        rows, send_counts, recv_counts, out = transfer
        options = self._options[own_stream]
        return self.group.alltoall_base(as_bytes(out), as_bytes(rows), list(recv_counts), list(send_counts), options)

    def _all_to_all_options(self, own_stream: bool) -> dist.AllToAllOptions:
        options = dist.AllToAllOptions()
        options.asyncOp = own_stream
        if self.device.type == "cpu":  # NCCL does not read it: its own limit is that of the group
            options.timeout = timedelta(seconds=self.timeout_seconds)
        return options

    def _wait(self, work: dist.Work) -> None:
        """On a GPU this orders the current stream; the host waits, bounded, where it reads (:meth:`to_host`)."""
        if self.device.type == "cpu":
            work.wait(timedelta(seconds=self.timeout_seconds + 1))
        else:
            work.wait()

    def to_host(self, phase: str, tensor: Tensor) -> Tensor:
        """``tensor`` on the CPU; the wait for what is enqueued before it is bounded."""
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._copy_to_host(phase, tensor, host, torch.cuda.Event())
        return host

    def read(self, phase: str, tensor: Tensor) -> Tensor:
        """As :meth:`to_host`, with less host time, in memory that the next call for this shape writes again."""
        if tensor.device.type == "cpu":
            return tensor
        kept = self._kept.get(tensor.shape)
        if kept is None or kept[0].dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            kept = self._kept[tensor.shape] = (host, torch.cuda.Event())
        self._copy_to_host(phase, tensor, *kept)
        return kept[0]

    def _copy_to_host(self, phase: str, tensor: Tensor, host: Tensor, arrived: torch.cuda.Event) -> None:
        with self._waiting(phase):
            host.copy_(tensor, non_blocking=True)
            arrived.record(torch.cuda.current_stream(tensor.device))
        self.wait_for(phase, arrived)

    def wait_for(self, phase: str, event: torch.cuda.Event) -> None:
        """Make the host wait for ``event``, bounded."""
        with self._waiting(phase):
            began = time.monotonic()
            while not event.query():
                waited = time.monotonic() - began
                if waited > self.timeout_seconds:
                    raise RuntimeError("the wait for the device timed out")
                if waited > _SPIN_SECONDS:
                    self.check_usable(phase)  # a thread may have found an earlier call to fail
                    time.sleep(2e-5)
        self.check_usable(phase)  # what was cut short has left garbage

    def gather(self, phase: str, mine: object) -> list[Any]:
        """``mine`` of every rank; any value that JSON can represent."""
        if self.world_size == 1:
            return [mine]
        text = torch.tensor([list(json.dumps(mine).encode())], dtype=torch.uint8, device="cpu").to(self.device)
        headers = self._headers_of_all(phase, self.header(SETUP, {}), [text.shape[1]])
        self.compare_headers(SETUP, {}, headers, None)
        sizes = headers[:, HEADER_WORDS].tolist()
        sent = text.reshape(-1, 1).repeat(self.world_size, 1)
        received = self.to_host(phase, self.all_to_all(phase, sent, [text.shape[1]] * self.world_size, sizes))
        return [json.loads(bytes(part.flatten().tolist())) for part in received.split(sizes)]

    def _to_all(self, phase: str, row: Tensor) -> Tensor:
        """``row [1, n]`` of every rank, ``[R, n]``."""
        ones = [1] * self.world_size
        return self.all_to_all(phase, row.expand(self.world_size, -1).contiguous(), ones, ones)

    # -- failure -------------------------------------------------------------------------------------------------

    def _waiting(self, phase: str) -> _Waiting:
        """Context of an operation that may wait for peers. Gives the group up where it fails."""
        return _Waiting(self, phase)

    def _give_up(self, phase: str, waited: float, said: str) -> NoReturn:
        """Give the group up: find the missing ranks, and raise an error that names them, now and in later calls."""
        with self._state.lock:
            self.check_usable(phase)
            timed_out = "timed out" in said.lower()
            self._state.given_up = (PeerTimeoutError if timed_out else PeerError, said)  # in case the next lines fail
            notes = roll_call(
                self.group, self.device.type, Note(phase, waited, timed_out), grace_seconds=self._grace_seconds
            )
            kind, text = explain(self.rank, self.world_size, self._names, self.timeout_seconds, notes, said)
            self._state.given_up = (kind, text)
            self._abort()
        raise kind(f"{text}. {_NO_FURTHER_USE}")

    def give_up_later(self, phase: Phase, waited: float, said: str, mismatch: RankMismatchError | None = None) -> None:
        """Give the group up from another thread; the next call of this rank raises the error.

        Args:
            said: what happened; the text of the error adds the ranks concerned.
            mismatch: the error to raise, if ranks disagree.
        """
        with self._state.lock:
            if self._state.given_up is not None:
                return
            self._state.raised = False
            if mismatch is None:
                with suppress(DeepEPMoEError):
                    self._give_up(phase, waited, said)
                self._state.raised = False
                return
            self._state.given_up = (RankMismatchError, f"{phase}: {mismatch}")
            roll_call(
                self.group, self.device.type, Note(phase, waited, False, str(mismatch), mismatch=True), grace_seconds=0
            )
            self._abort()

    def break_off(self, phase: str, reason: str) -> None:
        """Leave an operation that the peers are in, with a note of the reason."""
        if self.world_size == 1 or self._state.given_up is not None:
            return
        if is_capturing(self.device):
            return  # nothing runs, so nobody waits
        with self._state.lock:
            self._state.given_up = (PeerError, f"{phase}: this rank broke off: {reason}")
            roll_call(self.group, self.device.type, Note(phase, 0.0, False, reason), grace_seconds=0)
            self._abort()

    def _abort(self) -> None:
        """End running operations, on this rank and on its peers."""
        with suppress(RuntimeError):
            if self.device.type == "cuda":
                self.group._get_backend(self.device).abort()
            else:  # gloo closes all connections of a group in which any message is overdue
                nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
                self.group.recv([nothing], (self.rank + 1) % self.world_size, _NO_PEER_TAG).wait(
                    timedelta(milliseconds=1)
                )

    def check_usable(self, phase: str) -> None:
        """Raise the error after which the group was given up, if there was one."""
        if self._state.given_up is None:
            return
        with self._state.lock:  # its text is final
            kind, text = self._state.given_up
            first, self._state.raised = not self._state.raised, True
        if first:
            raise kind(f"{text}. {_NO_FURTHER_USE}")
        raise kind(f"{phase}: the group was given up after an earlier error. Make a new group. ({text})")


# Contexts are classes, because entering a generator takes more host time.


class _Waiting:
    """See :meth:`Exchange._waiting`."""

    __slots__ = ("_began", "_exchange", "_phase", "_span")

    def __init__(self, exchange: Exchange, phase: str) -> None:
        self._exchange, self._phase, self._span = exchange, phase, span(f"deepep_moe.wait {phase}")

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.__exit__(kind, error, traceback)
        exchange, phase = self._exchange, self._phase
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, DeepEPMoEError):
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                exchange._give_up(phase, time.monotonic() - self._began, said)
            elif error is not None and not isinstance(error, DeepEPMoEError):
                # KeyboardInterrupt, or what a signal handler raised: the operation goes on.
                exchange.break_off(phase, repr(error))
        finally:
            exchange.waited[phase] = exchange.waited.get(phase, 0.0) + time.monotonic() - self._began


class _Moving:
    """See :meth:`Exchange.moving`."""

    __slots__ = ("_exchange", "_phase")

    def __init__(self, exchange: Exchange, phase: Phase) -> None:
        self._exchange, self._phase = exchange, phase

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, PeerError):
            self._exchange.break_off(self._phase, f"{type(error).__name__}: {error}")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, copied from pinned memory so that the host does not wait for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def as_bytes(rows: Tensor) -> Tensor:
    """``[n, width]`` of any dtype and strides -> ``[n, width in bytes]`` uint8, dense."""
    if rows.dtype == torch.uint8 and rows.is_contiguous():  # bytes have no gradient
        return rows
    rows = rows.detach().contiguous()
    if rows.dtype == torch.uint8:
        return rows
    strides = [1]  # contiguous() keeps odd strides of tensors with at most one row; view(dtype) does not take them
    for size in reversed(rows.shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return rows.as_strided(rows.shape, strides).view(torch.uint8)
