"""A domain: ranks whose GPUs map each other's memory, with the state that all engines on it share.

An engine moves rows. The domain identifies the peers, orders the calls of one GPU, and records errors (the device side
is in csrc/runtime/domain.h).

**Order between streams.** Kernels wait for the kernels of peers, and the large ones occupy every SM. If two of them
ran in different orders on two ranks, the ranks would deadlock. So each call on a GPU, of any engine and domain of this
process, starts after the calls that the host made before it (:meth:`Domain.enter_stream`). The program must make its
calls in the same order on all ranks, as with NCCL. A replayed CUDA graph is ordered by the stream that it is replayed
on: replay it on the stream of the eager calls, or synchronize between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from deepep_moe.backends.exchange import gather
from deepep_moe.errors import (
    CapacityError,
    DeepEPMoEError,
    InputError,
    PeerError,
    PeerTimeoutError,
    RankMismatchError,
)
from deepep_moe.extension import _C, MAX_LOW_LATENCY_RANKS, MAX_RANKS, module_for, why_not_on
from deepep_moe.peer_memory import PeerMemory
from deepep_moe.topology import host_id

_PHASES = {
    "PLAN_COUNTS": "plan (exchanging counts)",
    "PLAN_PLACES": "plan (placing rows)",
    "DISPATCH_START": "dispatch (start)",
    "DISPATCH_ROWS": "dispatch (rows)",
    "COMBINE_START": "combine (start)",
    "COMBINE_ROWS": "combine (rows)",
    "GROW_STAGING": "growing staging memory",
    "REFUSED": "dispatch or combine",
    "LOW_LATENCY_DISPATCH": "low-latency dispatch",
    "LOW_LATENCY_COMBINE": "low-latency combine",
}
_FIELDS = {
    "NUM_EXPERTS": "num_experts",
    "NUM_TOPK": "top-k",
    "ALIGNMENT": "expert alignment",
    "OPERATION": "the call",
    "PLAN_NUMBER": "the plan",
    "FORMAT": "dtype or format",
    "ROW_BYTES": "bytes of a row in flight",
    "MAX_TOKENS": "tokens per rank (max_tokens_per_rank, num_max_dispatch_tokens_per_rank)",
    "HIDDEN": "hidden size",
    "ROW_FORMAT": "format (use_fp8, round_scale, use_ue8m0)",
    "HANDLE": "handle (the number of its dispatch)",
}
_REASONS = {
    "TIMEOUT": "it timed out waiting for another rank",
    "PEER_FAILED": "another rank had failed before",
    "MISMATCH": "it found ranks in different calls",
}

_OVERFLOWS = ("RECV_OVERFLOW", "ROWS_OVERFLOW", "STAGING")

SEVERAL_HOSTS = "ranks of the group are on several hosts"


class SymmetricMemory(Protocol):
    """Memory that every rank has, zeroed, as :class:`~deepep_moe.peer_memory.PeerMemory`."""

    addresses: list[int]
    """[R] where the kernels of this rank access each rank's memory."""


Allocate = Callable[[int, bool], SymmetricMemory]
"""Allocates a number of bytes on every rank; the flag says that they are equal blocks, one for each source rank."""

# The stream of the last call of this process, by GPU: its address, and the stream object.
_last_streams: dict[int, tuple[int, torch.cuda.Stream]] = {}


class Domain:
    """This rank's side of a domain. Collective to create.

    Args:
        group: the ranks, of any backend and with any members; used during set-up only.
        device: this rank's GPU.
        timeout_seconds: longest wait of a kernel for a peer.
        record_waits: measure how long this rank waits for each peer.
        allocate: allocates the symmetric memory of the domain and its engines, and fails on all ranks or on none;
            default: :class:`PeerMemory`, which may fail on one rank.

    Attributes:
        module: the part of the CUDA extension that serves so many ranks: engines are created with it.
        runtime: its object on which engines are created.
        allocates_together: whether an allocation fails on all ranks or on none.
        defers_overflow: whether :meth:`raise_failure` leaves an overflow for later.
        captured: whether a CUDA graph has captured a call; the memory it uses must then not move.
        describe: for a ``_C.Field`` by name, a function that gives its values in words.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout_seconds: float,
        record_waits: bool,
        allocate: Allocate | None = None,
    ) -> None:
        self.group, self.device, self.timeout_seconds = group, device, timeout_seconds
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.captured = False
        self.defers_overflow = False
        self.describe: dict[str, Callable[[int], str]] = {}
        self._index: int = device.index
        self.module = module_for(_C, self.size)
        self.runtime = self.module.Domain(self.rank, self.size, self._index, timeout_seconds, record_waits)
        self.allocates_together = allocate is not None
        self.allocate = allocate or (lambda num_bytes, by_source: PeerMemory(group, device, num_bytes))
        self._mailboxes = self.allocate(self.module.Domain.mailbox_bytes(), False)
        self.runtime.set_mailboxes(self._mailboxes.addresses)

    @staticmethod
    def supports(
        group: dist.ProcessGroup, device: torch.device, timeout_seconds: float, low_latency: bool = False
    ) -> str | None:
        """The reason why this rank cannot form a domain with the others of ``group``, or None. Collective.

        ``low_latency``: the domain is for low-latency calls alone, which more ranks can make.

        Raises:
            PeerTimeoutError: a rank did not answer within ``timeout_seconds``.
        """
        ranks = dist.get_world_size(group)
        places = gather("set-up", group, device, timeout_seconds, [host_id(), device.index])
        if any(host != places[dist.get_rank(group)][0] for host, _ in places):
            return SEVERAL_HOSTS
        if (reason := why_not_on(device)) is not None:
            return reason
        most = MAX_LOW_LATENCY_RANKS if low_latency else MAX_RANKS
        if ranks > most:
            return f"the group has {ranks} ranks, one NVLink domain is served up to {most}"
        for peer, (_, index) in enumerate(places):
            # With CUDA_VISIBLE_DEVICES a peer's GPU may have no index here. Then mapping its memory shows the problem.
            if index < torch.cuda.device_count() and index != device.index:
                if not torch.cuda.can_device_access_peer(device, index):
                    return (
                        f"{device} has no peer access to cuda:{index} of rank {peer}; nvidia-smi topo -p2p r shows "
                        "which GPUs have it, and a group of those can use it"
                    )
        return None

    @property
    def usable(self) -> bool:
        """False after a permanent failure."""
        return not self.runtime.broken

    def enter_stream(self) -> int:
        """The address of the current stream, after making it wait for all earlier calls. Call before each launch."""
        self.captured = self.captured or torch.cuda.is_current_stream_capturing()
        return enter_stream(self._index)

    def raise_failure(self) -> None:
        """Raise the error of work that is already enqueued, if there is one. Local; does not wait for the device.

        A permanent failure is raised by every call. Any other error is raised once, and later kernels work again. With
        ``defers_overflow`` an overflow is not raised: calls are enqueued as before, and their kernels do nothing.
        """
        report = self.runtime.failure
        if report is not None:
            if self.defers_overflow and _C.Failure(report[0]).name in _OVERFLOWS:
                return
            if not self.runtime.broken:
                self.resume()
            raise self._error(*report)

    def raise_notice(self) -> None:
        """Raise, once, an error that did not stop its call and that only this rank knows. Use after entering a call."""
        report = self.runtime.notice
        if report is not None:
            if not torch.cuda.is_current_stream_capturing():
                self.runtime.take_notice(self.enter_stream())
            raise self._error(*report)

    def raise_lasting(self) -> None:
        """Raise a permanent failure, if there is one; leave other errors for later."""
        if self.runtime.broken:
            self.raise_failure()

    def resume(self) -> None:
        """Clear a temporary error: calls that are enqueued from now on are executed again."""
        if not torch.cuda.is_current_stream_capturing():
            self.runtime.resume(self.enter_stream())

    def give_up(self) -> None:
        """Fail permanently, and tell the peers, so that they do not wait for this rank."""
        self.runtime.give_up(self.enter_stream())

    def _error(self, failure: int, phase: int, peer: int, field: int, expected: int, seen: int) -> DeepEPMoEError:
        kind, where = _C.Failure(failure).name, _PHASES[_C.Phase(phase).name]
        if kind == "TIMEOUT":
            return PeerTimeoutError(
                f"rank {self.rank} waited {self.timeout_seconds:g} s for rank {peer} in {where}: "
                f"it is at step {seen}, step {expected} was expected. Destroy this buffer or dispatcher."
            )
        if kind == "PEER_FAILED":
            reason = _REASONS.get(_C.Failure(seen).name, "its own error says why")
            return PeerError(
                f"rank {peer} gave up ({reason}) while rank {self.rank} was in {where}. "
                "Destroy this buffer or dispatcher."
            )
        if kind == "MISMATCH":
            name = _C.Field(field).name
            describe = self.describe.get(name, str)
            return RankMismatchError(
                f"{_FIELDS[name]} differs between ranks in {where}: "
                f"{describe(expected)} on rank {self.rank}, {describe(seen)} on rank {peer}"
            )
        if kind == "BAD_EXPERT":
            too_many = (
                f"; {seen - expected} routes in a row of a routing map, more than top-k" if seen > expected else ""
            )
            return InputError("topk_idx", seen, f"an expert must be -1 (dropped) or 0 to {expected - 1}{too_many}")
        if kind == "REPEATED_EXPERT":
            return InputError("topk_idx", f"expert {seen} twice for token {expected}", "experts of a token must differ")
        if kind == "CHANGED_ROUTE":
            return InputError("topk_idx", f"route {seen}", f"of token {expected} of rank {peer} went elsewhere before")
        if kind == "BAD_PEER_INPUT" and peer == self.rank:
            return PeerError(
                "this rank gave up in an earlier call, whose error says why. Destroy this buffer or dispatcher."
            )
        if kind == "BAD_PEER_INPUT":
            return PeerError(f"rank {peer} refused its input in {where}; its own error says what is wrong")
        if kind == "STAGING":
            return CapacityError(
                f"a rank has {seen} tokens, but staging memory holds {expected} per rank and cannot grow without the "
                f"host: set max_tokens_per_rank to at least {seen}. Nothing was sent by this plan.",
                needed=seen,
                room=expected,
                staging=True,
            )
        what = "received tokens" if kind == "RECV_OVERFLOW" else "expert rows"
        return CapacityError(
            f"rank {peer} needs room for {seen} {what}, there is room for {expected}: multiply capacity_factor by "
            f"{seen / max(expected, 1):.3g} or more (num_worst_tokens: at least {seen}). Nothing was sent by this "
            "plan, its outputs are NaN.",
            needed=seen,
            room=expected,
        )


def enter_stream(index: int) -> int:
    """The address of the current stream of GPU ``index``, after making it wait for all earlier calls on that GPU."""
    address: int = torch._C._cuda_getCurrentRawStream(index)
    last = _last_streams.get(index)
    if last is None or last[0] != address:
        stream = torch.cuda.current_stream(index)
        # A stream under capture cannot wait for one that is not, nor the other way round.
        if last is not None and _is_capturing(last[1]) == torch.cuda.is_current_stream_capturing():
            stream.wait_stream(last[1])
        _last_streams[index] = (address, stream)
    return address


def current_stream_of(index: int) -> tuple[int, torch.cuda.Stream]:
    """The address of the current stream of GPU ``index``, and the stream, which is kept from the last call on it."""
    address: int = torch._C._cuda_getCurrentRawStream(index)
    last = _last_streams.get(index)
    return last if last is not None and last[0] == address else (address, torch.cuda.current_stream(index))


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
