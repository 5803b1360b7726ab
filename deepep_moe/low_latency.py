"""The low-latency calls of DeepEP 1.x, for decode-sized batches.

There is no plan and no host wait. Received rows are in ``[L, R * M, H]``: L local experts, R ranks, at most M tokens of
each. A token crosses the link once per *rank* that owns one of its experts, and one row per token and rank comes back.
Rows of an expert are ordered by source rank, then token, so equal input gives equal bits.

Three engines compute the same layouts: ``cuda`` (low_latency_cuda.py, one NVLink domain), ``nodes``
(low_latency_nodes.py, several nodes by NVSHMEM) and ``reference`` (low_latency_reference.py, over torch.distributed:
for CPUs, and for GPUs without the other two). This module is shared by all: arguments, handles, hooks, and the calls
themselves.

The CUDA engines check arguments once for each combination of shapes and dtypes; later calls find the result in a
dictionary.

Rounding: combine sums a token's rows times their weights on the rank that computed them, in top-k order, in fp32. Each
such sum, also a rank's sum for its own token, is rounded to BF16 and sent; the token's rank adds them in rank order in
fp32 and rounds again. ``use_logfmt`` changes nothing: rows are sent as BF16.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deepep_moe.backends import Backend
from deepep_moe.backends.checks import check_integer, check_num_experts, check_shape
from deepep_moe.domain import Domain, current_stream_of
from deepep_moe.errors import CapacityError, DeepEPMoEError, HandleError, InputError, UnsupportedError
from deepep_moe.events import EventOverlap, StreamRunner
from deepep_moe.extension import MAX_RANKS, is_capturing
from deepep_moe.fp8 import BLOCK
from deepep_moe.low_latency_checks import (
    check_combine,
    check_contiguous,
    check_dispatch,
    check_modes,
    check_out,
    check_switches,
    overlap,
)
from deepep_moe.low_latency_cuda import CudaEngine
from deepep_moe.low_latency_engine import CombineCall, DispatchCall, DispatchShape, Engine, Format, Half
from deepep_moe.low_latency_in_flight import CALLS_IN_FLIGHT, InFlight
from deepep_moe.low_latency_nodes import NodesEngine
from deepep_moe.low_latency_reference import ReferenceEngine

_log = logging.getLogger(__name__)

_MAX_SHAPES = 4096  # of calls that are remembered as checked
_DONE = EventOverlap()  # of a call on the current stream: nothing to wait for
_SEND, _BOTH = Half.SEND, Half.BOTH  # reading a member of an enumeration takes as long as a call
_Key = tuple[object, Any, Any, Any]  # signature of the tensors, M, experts, switches


class LowLatencyHandle(Sequence[Any]):
    """What dispatch returns for combine: a sequence of the entries that DeepEP has.

    src_info [L, R * M] int32; layout_range [L, R] int64; M; hidden; num_experts. The tensors are views, made when read.
    """

    __slots__ = ("__weakref__", "call", "owner")

    def __init__(self, call: DispatchCall, owner: object) -> None:
        self.call, self.owner = call, owner

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: Any) -> Any:
        return self._entries()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries())

    def _entries(self) -> tuple[Tensor, Tensor, int, int, int]:
        shape = self.call.shape
        return self.call.src_info, self.call.layout_range, shape.max_tokens, shape.hidden, shape.num_experts


class LowLatency:
    """The low-latency calls of one group.

    Args:
        backend: backend of the group, which determines the engine. Creation is collective.
        num_sms: SMs that kernels may use; 0: all.
        masks: mask a peer that does not answer in time, instead of raising an error.
        runner: runs calls with ``async_finish``.
        nvshmem_bytes: symmetric memory for the ranks of other nodes; 0: use NVSHMEM only with ``rail=nvshmem``.
        rows: the name that the callers' users know the rows of a combine by.
    """

    def __init__(
        self,
        backend: Backend,
        num_sms: int,
        masks: bool,
        runner: StreamRunner,
        nvshmem_bytes: int = 0,
        rows: str = "x",
    ) -> None:
        self.device, self.masks = backend.device, masks
        self.rank, self.world_size = backend.rank, backend.world_size
        self._engine = make_engine(backend, num_sms, masks, nvshmem_bytes)
        self._signature = self._engine.signature
        self._runner, self._rows = runner, rows
        self._identity = object()
        self._shapes: dict[_Key, DispatchShape] = {}
        self._dispatches, self._combines = InFlight("dispatch"), InFlight("combine")
        self._combine_buffers: dict[tuple[int, ...], list[Tensor]] = {}
        # combine buffers that were handed out; a loan ends with its handle
        self._lent: WeakKeyDictionary[LowLatencyHandle, Tensor] = WeakKeyDictionary()

    @property
    def engine(self) -> str:
        """``cuda``, ``nodes`` or ``reference``."""
        return self._engine.name

    def close(self) -> None:
        """Release all memory. Captured graphs must not be replayed afterwards."""
        self._engine.close()
        self._dispatches.close()
        self._combines.close()
        self._shapes.clear()
        self._combine_buffers.clear()
        self._lent.clear()

    def check(self) -> None:
        """Raise what kernels have reported so far, as the calls do."""
        self._engine.check()

    # -- dispatch ------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        max_tokens: int,
        num_experts: int,
        stats: Tensor | None,
        wait_stats: Tensor | None,
        switches: tuple[bool, bool, bool],
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[DispatchCall, LowLatencyHandle, EventOverlap, Callable[[], None] | None]:
        """See :meth:`deepep_moe.buffer.Buffer.low_latency_dispatch`."""
        key = self._signature(x, topk_idx, stats, wait_stats), max_tokens, num_experts, switches
        try:
            plain = max_tokens.__class__ is num_experts.__class__ is int
            plain = plain and async_finish.__class__ is return_recv_hook.__class__ is bool
            shape = self._shapes.get(key) if plain else None
        except TypeError:  # a switch that cannot be hashed
            shape = None
        if shape is None or self._dispatches.waiting or (async_finish and return_recv_hook):
            shape = self._admit_dispatch(key, shape, x, topk_idx, stats, wait_stats, async_finish, return_recv_hook)
        if async_finish:
            call, event = self._dispatch_beside(shape, x, topk_idx, stats, wait_stats)
            return call, LowLatencyHandle(call, self._identity), event, None
        call = self._new_dispatch(shape, x, topk_idx, stats, wait_stats)
        handle = LowLatencyHandle(call, self._identity)
        if return_recv_hook:
            self._send_dispatch(call, _SEND)
            return call, handle, _DONE, self._hook(self._dispatches, partial(self._receive_dispatch, call))
        self._send_dispatch(call, _BOTH)
        return call, handle, _DONE, None

    def _admit_dispatch(
        self,
        key: _Key,
        shape: DispatchShape | None,
        x: Tensor,
        topk_idx: Tensor,
        stats: Tensor | None,
        wait_stats: Tensor | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> DispatchShape:
        """``shape`` or a new one, after the checks that its ``key`` does not spare."""
        signature, max_tokens, num_experts, switches = key
        try:
            check_switches(async_finish=async_finish, return_recv_hook=return_recv_hook)
            check_switches(**dict(zip(("use_fp8", "round_scale", "use_ue8m0"), switches)))
            check_modes(async_finish, return_recv_hook)
            if shape is None:
                format = Format.of(*switches)
                where = self.world_size, self.device
                check_dispatch(*where, x, topk_idx, max_tokens, num_experts, stats, wait_stats, format)
                shape = self._new_shape(x, topk_idx, int(max_tokens), int(num_experts), format)
                if signature is not None:
                    if len(self._shapes) >= _MAX_SHAPES:
                        self._shapes.clear()
                    with suppress(TypeError):
                        self._shapes[key] = shape
            self._dispatches.check()
            return shape
        except Exception as error:
            self.refuse_dispatch(x, max_tokens, as_told(error))
            raise

    def refuse_dispatch(self, x: Any, max_tokens: Any, problem: DeepEPMoEError) -> None:
        """Tell the other ranks about ``problem`` with the arguments of a dispatch, which the caller raises then."""
        hidden = x.shape[1] if isinstance(x, Tensor) and not x.is_nested and x.dim() == 2 else 0
        refuse = partial(self._engine.refuse_dispatch, max_tokens, hidden, problem)
        self._refuse(self._dispatches, problem, refuse)

    def _dispatch_beside(
        self, shape: DispatchShape, x: Tensor, topk_idx: Tensor, stats: Tensor | None, wait_stats: Tensor | None
    ) -> tuple[DispatchCall, EventOverlap]:
        """Both halves on the communication stream. Outputs are allocated on the stream that fills them."""

        def run() -> DispatchCall:
            call = self._new_dispatch(shape, x, topk_idx, stats, wait_stats)
            self._send_dispatch(call, _BOTH)
            return call

        return self._runner.run(run, async_finish=True, reads=(x, topk_idx, stats, wait_stats), made=_made_by_dispatch)

    def _receive_dispatch(self, call: DispatchCall) -> None:
        call.received = True  # also if this raises what kernels have reported
        self._engine.dispatch(call, Half.RECEIVE)

    def _send_dispatch(self, call: DispatchCall, half: Half) -> None:
        call.received = half is _BOTH
        try:
            self._engine.dispatch(call, half)
        finally:
            self._dispatches.made += call.sent

    def _new_shape(
        self, x: Tensor, topk_idx: Tensor, max_tokens: int, num_experts: int, format: Format
    ) -> DispatchShape:
        (tokens, hidden), topk, ranks = x.shape, topk_idx.shape[1], self.world_size
        experts, slots = num_experts // ranks, ranks * max_tokens
        words = self._engine.state_words(max_tokens, topk)
        ranges_at = words + words % 2  # int64
        src_info_at = ranges_at + 2 * experts * ranks
        counts_at = src_info_at + experts * slots

        def like(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            tensor = torch.empty_strided(size, stride, dtype=dtype, device=self.device)
            tensor.untyped_storage().resize_(0)
            return tensor

        rows_dtype, scales = torch.bfloat16, None
        if format != Format.BF16:
            rows_dtype, columns, scale_dtype = torch.float8_e4m3fn, hidden // BLOCK, torch.float32
            if format == Format.FP8_UE8M0:
                columns, scale_dtype = -(-columns // 4), torch.int32
            scales = like((experts, slots, columns), (columns * slots, 1, slots), scale_dtype)
        return DispatchShape(
            tokens=tokens,
            topk=topk,
            hidden=hidden,
            num_experts=num_experts,
            max_tokens=max_tokens,
            format=format,
            ranks=ranks,
            local_experts=experts,
            slots=slots,
            wide_idx=topk_idx.dtype == torch.int64,
            rows=like((experts, slots, hidden), (slots * hidden, hidden, 1), rows_dtype),
            out=like((tokens, hidden), (hidden, 1), torch.bfloat16),
            scales=scales,
            memory=like((counts_at + experts,), (1,), torch.int32),
            ranges_at=ranges_at,
            src_info_at=src_info_at,
            counts_at=counts_at,
        )

    def _new_dispatch(
        self, shape: DispatchShape, x: Tensor, topk_idx: Tensor, stats: Tensor | None, wait_stats: Tensor | None
    ) -> DispatchCall:
        try:
            rows, memory = torch.empty_like(shape.rows), torch.empty_like(shape.memory)
            scales = None if shape.scales is None else torch.empty_like(shape.scales)
        except Exception as error:  # no memory on this rank: the others must not wait for it
            self.refuse_dispatch(x, shape.max_tokens, as_told(error))
            raise
        counts = memory.as_strided((shape.local_experts,), (1,), shape.counts_at)
        return DispatchCall(shape, x, topk_idx, rows, scales, memory, counts, stats, wait_stats)

    # -- combine -------------------------------------------------------------------------------------------------

    def combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: Tensor | None,
        wait_stats: Tensor | None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        """See :meth:`deepep_moe.buffer.Buffer.low_latency_combine`."""
        if (
            zero_copy is not False
            or not (async_finish.__class__ is return_recv_hook.__class__ is bool)
            or self._combines.waiting
            or (async_finish and return_recv_hook)
            or handle.__class__ is not LowLatencyHandle
            or handle.owner is not self._identity
            or not (dispatched := handle.call).received
            or self._signature(x, topk_idx, topk_weights, out, wait_stats) not in dispatched.shape.combines
            or (out is not None and overlap(out, x))
        ):
            dispatched, x = self._admit_combine(
                x, topk_idx, topk_weights, handle, zero_copy, async_finish, return_recv_hook, out, wait_stats
            )
        if async_finish:
            return *self._combine_beside(dispatched, x, topk_idx, topk_weights, out, wait_stats), None
        call = self._new_combine(dispatched, x, topk_idx, topk_weights, out, wait_stats)
        if return_recv_hook:
            self._send_combine(call, _SEND)
            return call.out, _DONE, self._hook(self._combines, partial(self._engine.combine, call, Half.RECEIVE))
        self._send_combine(call, _BOTH)
        return call.out, _DONE, None

    def _admit_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: Tensor | None,
        wait_stats: Tensor | None,
    ) -> tuple[DispatchCall, Tensor]:
        """The dispatch of ``handle`` and the rows to combine, after all checks of this call."""
        dispatched: DispatchCall | None = None
        try:
            dispatched = self._call_of(handle)
            check_switches(zero_copy=zero_copy, async_finish=async_finish, return_recv_hook=return_recv_hook)
            if zero_copy:
                x = self._lent_to(handle)
            check_modes(async_finish, return_recv_hook)
            signature, known = self._signature(x, topk_idx, topk_weights, out, wait_stats), dispatched.shape.combines
            if signature not in known:
                where = self.world_size, self.device
                check_combine(*where, dispatched, self._rows, x, topk_idx, topk_weights, out, wait_stats)
                if signature is not None and len(known) < _MAX_SHAPES:
                    known.add(signature)
            if out is not None:
                check_out(out, x)
            self._combines.check()
        except Exception as error:
            self.refuse_combine(dispatched, as_told(error))
            raise
        if zero_copy:
            del self._lent[handle]
        return dispatched, x

    def refuse_combine(self, dispatched: DispatchCall | None, problem: DeepEPMoEError) -> None:
        """The same with the arguments of a combine; ``dispatched``: its dispatch, if known."""
        self._refuse(self._combines, problem, partial(self._engine.refuse_combine, dispatched, problem))

    def _combine_beside(
        self,
        dispatched: DispatchCall,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor | None,
        wait_stats: Tensor | None,
    ) -> tuple[Tensor, EventOverlap]:
        """Both halves on the communication stream."""

        def run() -> CombineCall:
            call = self._new_combine(dispatched, x, topk_idx, topk_weights, out, wait_stats)
            self._send_combine(call, _BOTH)
            return call

        call, event = self._runner.run(
            run,
            async_finish=True,
            reads=(x, topk_idx, topk_weights, dispatched.memory, wait_stats, out),
            made=lambda call: (call.out,),
        )
        return call.out, event

    def _send_combine(self, call: CombineCall, half: Half) -> None:
        try:
            self._engine.combine(call, half)
        finally:
            self._combines.made += call.sent

    def _new_combine(
        self,
        dispatched: DispatchCall,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor | None,
        wait_stats: Tensor | None,
    ) -> CombineCall:
        if out is None:
            try:
                out = torch.empty_like(dispatched.shape.out)
            except Exception as error:
                self.refuse_combine(dispatched, as_told(error))
                raise
        return CombineCall(x, topk_idx, topk_weights, dispatched, out, wait_stats)

    def _call_of(self, handle: Any) -> DispatchCall:
        if not isinstance(handle, LowLatencyHandle):
            raise HandleError(f"handle is a {type(handle).__name__}; pass on what low_latency_dispatch returned")
        if handle.owner is not self._identity:
            raise HandleError("handle was made by another Buffer, or by a decoder of another dispatcher")
        if not handle.call.received:
            raise HandleError("handle: call the hook of its dispatch before combine")
        return handle.call

    def next_combine_buffer(self, handle: Any) -> Tensor:
        """[L, R * M, H] bf16 for the rows of a ``zero_copy`` combine of ``handle``. At most two are in use."""
        call = self._call_of(handle)
        if handle in self._lent:
            return self._lent[handle]
        lent = {id(buffer) for buffer in self._lent.values()}
        if len(lent) == CALLS_IN_FLIGHT:
            raise HandleError(
                f"get_next_low_latency_combine_buffer: {CALLS_IN_FLIGHT} buffers are being filled; "
                "combine one of their handles with zero_copy, or drop it, first"
            )
        shape = tuple(call.rows.shape)
        buffers = self._combine_buffers.setdefault(shape, [])
        free = [buffer for buffer in buffers if id(buffer) not in lent]
        if free and len(buffers) == CALLS_IN_FLIGHT:
            buffer = free[0]
        else:
            buffer = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        # Least recently used first: a combine may still be reading the other.
        self._combine_buffers[shape] = [b for b in buffers if b is not buffer] + [buffer]
        self._lent[handle] = buffer
        return buffer

    def _lent_to(self, handle: LowLatencyHandle) -> Tensor:
        """The buffer that was handed out for a ``zero_copy`` combine of ``handle``."""
        if handle in self._lent:
            return self._lent[handle]
        raise InputError("zero_copy", True, "write the rows into get_next_low_latency_combine_buffer(handle) first")

    # -- the rest ------------------------------------------------------------------------------------------------

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Check the arguments and raise what was reported. Nothing needs cleaning: a call clears what it reads."""
        for name, value in (("num_max_dispatch_tokens_per_rank", max_tokens), ("hidden", hidden)):
            check_integer(name, value, least=1)
        check_num_experts(num_experts, self.world_size)
        self._engine.check()

    def update_mask(self, rank: int, masked: bool) -> None:
        self._check_masks("low_latency_update_mask_buffer")
        check_integer("rank_to_mask", rank, least=0)
        if rank >= self.world_size or rank == self.rank:
            rule = f"must be another rank of the group's {self.world_size}, not {self.rank}"
            raise InputError("rank_to_mask", rank, rule)
        self._engine.update_mask(rank, bool(masked))

    def query_mask(self, status: Tensor) -> None:
        self._check_masks("low_latency_query_mask_buffer")
        check_shape("mask_status", status, (self.world_size,), self.device, torch.int32)
        check_contiguous("mask_status", status)
        self._engine.query_mask(status)

    def clean_mask(self) -> None:
        self._check_masks("low_latency_clean_mask_buffer")
        self._engine.clean_mask()

    def _check_masks(self, call: str) -> None:
        if not self.masks:
            raise UnsupportedError(f"{call}: masks need Buffer(..., enable_shrink=True)")

    def _refuse(self, in_flight: InFlight, problem: DeepEPMoEError, refuse: Callable[[], bool]) -> None:
        """Take part in a call whose arguments raised ``problem``, so that no rank waits for this one.

        If too many calls are in flight, the oldest is received first: the call needs its memory.
        """
        if is_capturing(self.device):
            return  # replaying would refuse other calls
        earlier: DeepEPMoEError | None = None
        try:
            in_flight.receive_late()
        except DeepEPMoEError as error:
            earlier = error
        in_flight.made += refuse()
        if earlier is not None:
            raise problem from earlier

    def _hook(self, in_flight: InFlight, receive: Callable[[], None]) -> Callable[[], None]:
        if self.device.type != "cuda":
            return in_flight.hook(receive)
        index: int = self.device.index
        address, stream = current_stream_of(index)

        def on_its_stream() -> None:
            if current_stream_of(index)[0] == address:
                receive()
            else:  # both halves run on the stream of the call
                with torch.cuda.stream(stream):
                    receive()

        return in_flight.hook(on_its_stream)


def make_engine(backend: Backend, num_sms: int, masks: bool, nvshmem_bytes: int) -> Engine:
    """The CUDA engine of one node or of several, where it can run, else the reference. Collective.

    ``nvshmem_bytes``: symmetric memory for the ranks of other nodes; 0: use NVSHMEM only with ``rail=nvshmem``.
    """
    if is_capturing(backend.device):
        raise CapacityError(
            "the first low-latency call of a Buffer or decoder allocates memory that ranks share, which a CUDA graph "
            "cannot capture: make one such call before capturing"
        )
    domain = getattr(backend, "domain", None)
    if domain is not None:
        return CudaEngine(domain, num_sms, masks)
    if backend.device.type == "cpu":
        return ReferenceEngine(backend)
    config = backend.config
    reason: str | None = f"backend {backend.name} does not map the peers' memory"
    if backend.world_size > MAX_RANKS:  # more than backend nvlink serves: a domain for these calls alone
        reason = CudaEngine.why_no_domain(backend)
        if reason is None:
            domain = Domain(backend.group, backend.device, config.timeout_seconds, config.debug_waits)
            return CudaEngine(domain, num_sms, masks)
    if config.rail == "nvshmem" or nvshmem_bytes:
        config = replace(config, nvshmem_bytes=max(config.nvshmem_bytes, nvshmem_bytes))
        reason = NodesEngine.why_not(backend, config)
        if reason is None:
            return NodesEngine(backend, config, num_sms, masks)
    else:
        reason = f"{reason}, and rail=nvshmem is not set"
    if backend.rank == 0:
        _log.warning(
            "deepep_moe: low-latency calls run on the reference, through torch.distributed: %s. It is right, slow, and "
            "not for CUDA graphs; `deepep-moe doctor` says what is missing.",
            reason,
        )
    return ReferenceEngine(backend)


def as_told(error: Exception) -> DeepEPMoEError:
    """``error`` as the other ranks are told: whatever stopped this rank, they must not wait for it."""
    return error if isinstance(error, DeepEPMoEError) else DeepEPMoEError(f"{type(error).__name__}: {error}")


def _made_by_dispatch(call: DispatchCall) -> tuple[Tensor | None, ...]:
    return call.rows, call.scales, call.memory
