"""The low-latency calls as kernels over one NVLink domain (csrc/latency): one kernel per call, or per half of it.

The host only launches. Rows in flight lie in an *arena*, symmetric memory that is made once for each (M, hidden size)
and stays where it is: captured graphs hold it. Everything that changes from call to call is counted on the device.

What kernels notice (an index out of range, a peer that refused its input) stops no rank: the call goes on without it,
and the rank that noticed raises when it has enqueued a later low-latency call, so that the ranks stay in step. What
ends it all (a peer that does not answer, ranks that differ) is raised by the next call. A call of the throughput engine
that failed freezes these kernels too: the ranks skip the same calls of both engines until each has raised that error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepep_moe.backends.exchange import gather
from deepep_moe.domain import Domain
from deepep_moe.errors import CapacityError, DeepEPMoEError, PeerError, RankMismatchError
from deepep_moe.extension import _C
from deepep_moe.low_latency_engine import CombineCall, DispatchCall, Format, Half
from deepep_moe.peer_memory import PeerMemory


class _Arena(NamedTuple):
    memory: PeerMemory
    view: _C.LatencyArena


class _Shape(NamedTuple):
    """Of the last dispatch: what a rank that refuses its input takes part with."""

    arena: _Arena
    topk: int
    num_experts: int
    format: Format
    places: Tensor


class CudaEngine:
    """:class:`~deepep_moe.low_latency_engine.Engine` of the ranks of ``domain``. Collective to make.

    Args:
        num_sms: SMs that the kernels may use; 0: all.
        masks: a peer that does not answer in time is masked instead of being an error.
    """

    name = "cuda"

    def __init__(self, domain: Domain, num_sms: int, masks: bool) -> None:
        self._domain, self.device = domain, domain.device
        sms = num_sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        blocks = min(max(_C.LATENCY_BLOCKS_PER_SM * sms, domain.size + 1), _C.LATENCY_MAX_BLOCKS)
        domain.describe["ROW_FORMAT"] = lambda number: Format(number).name
        self._engine: _C.LatencyEngine = _C.LatencyEngine(domain.runtime, blocks, masks)
        self._control = PeerMemory(domain.group, self.device, _C.LatencyEngine.control_bytes())
        self._engine.set_control(self._control.addresses)
        self._arenas: dict[tuple[int, int], _Arena] = {}
        self._last: _Shape | None = None

    def dispatch(self, call: DispatchCall, half: Half) -> None:
        told = self._told()
        tokens, topk = call.topk_idx.shape
        arena = self._arenas.get((call.max_tokens, call.hidden))
        if arena is None:
            arena = self._make_arena(call.max_tokens, call.hidden, topk, call.num_experts, call.format)
        if half & Half.SEND:
            words = _C.LatencyEngine.places_words(self._domain.size, call.max_tokens, topk)
            call.state = torch.empty_strided((words,), (1,), dtype=torch.int32, device=self.device)
            self._last = _Shape(arena, topk, call.num_experts, call.format, call.state)
        self._engine.dispatch(
            arena.view,
            half=half,
            format=call.format,
            refused=False,
            x=call.x.data_ptr(),
            topk_idx=call.topk_idx.data_ptr(),
            wide_idx=call.topk_idx.dtype == torch.int64,
            num_tokens=tokens,
            num_topk=topk,
            num_experts=call.num_experts,
            places=call.state.data_ptr(),
            rows=call.rows.data_ptr(),
            scales=_address(call.scales),
            counts=call.counts.data_ptr(),
            src_info=call.src_info.data_ptr(),
            layout_range=call.layout_range.data_ptr(),
            stats=_address(call.stats),
            wait_stats=_address(call.wait_stats),
            stream=self._domain.enter_stream(),
        )
        if told and half & Half.RECEIVE:
            self.check()

    def combine(self, call: CombineCall, half: Half) -> None:
        told = self._told()
        dispatched = call.dispatched
        tokens, topk = call.topk_idx.shape
        if half == Half.SEND:
            call.state = torch.empty_strided((1,), (1,), dtype=torch.int32, device=self.device)
        self._engine.combine(
            self._arenas[dispatched.max_tokens, dispatched.hidden].view,
            half=half,
            format=dispatched.format,
            refused=False,
            x=call.x.data_ptr(),
            topk_idx=call.topk_idx.data_ptr(),
            wide_idx=call.topk_idx.dtype == torch.int64,
            weights=call.topk_weights.data_ptr(),
            num_tokens=tokens,
            num_topk=topk,
            num_experts=dispatched.num_experts,
            places=dispatched.state.data_ptr(),
            epoch=_address(call.state),
            out=call.out.data_ptr(),
            wait_stats=_address(call.wait_stats),
            stream=self._domain.enter_stream(),
        )
        if told and half & Half.RECEIVE:
            self.check()

    def _told(self) -> bool:
        """Raise what ended it all; whether there is something else, to be raised when this rank's part is enqueued."""
        self._domain.raise_lasting()
        return self._domain.runtime.failure is not None or self._domain.runtime.notice is not None

    # -- refusals ------------------------------------------------------------------------------------------------

    def refuse_dispatch(self, max_tokens: int, hidden: int, problem: DeepEPMoEError) -> None:
        self._domain.raise_lasting()
        if self._last is None:
            self._agree(max_tokens, hidden, problem)
            return
        arena, topk, num_experts, format, _ = self._last
        # It receives what the others send, and throws it away: their rows must not stay in the arena.
        slots, experts = self._domain.size * arena.view.max_tokens, num_experts // self._domain.size
        memory = torch.empty(
            experts * slots * (2 * arena.view.hidden + 4), dtype=torch.uint8, device=self.device
        )  # rows, src_info
        scales = torch.empty(experts * slots * (arena.view.hidden // 128 + 1), dtype=torch.int32, device=self.device)
        counts = torch.empty(experts, dtype=torch.int32, device=self.device)
        ranges = torch.empty((experts, self._domain.size), dtype=torch.int64, device=self.device)
        words = _C.LatencyEngine.places_words(self._domain.size, arena.view.max_tokens, topk)
        places = torch.empty(words, dtype=torch.int32, device=self.device)
        self._engine.dispatch(
            arena.view,
            half=Half.BOTH,
            format=format,
            refused=True,
            x=0,
            topk_idx=0,
            wide_idx=True,
            num_tokens=0,
            num_topk=topk,
            num_experts=num_experts,
            places=places.data_ptr(),
            rows=memory.data_ptr() + 4 * experts * slots,
            scales=scales.data_ptr(),
            counts=counts.data_ptr(),
            src_info=memory.data_ptr(),
            layout_range=ranges.data_ptr(),
            stats=0,
            wait_stats=0,
            stream=self._domain.enter_stream(),
        )
        self._last = self._last._replace(places=places)

    def refuse_combine(self, call: DispatchCall | None, problem: DeepEPMoEError) -> None:
        self._domain.raise_lasting()
        last = self._last
        if call is not None:
            arena = self._arenas[call.max_tokens, call.hidden]
            last = _Shape(arena, call.topk_idx.shape[1], call.num_experts, call.format, call.state)
        if last is None:
            return  # without a dispatch nobody is in a combine
        self._engine.combine(
            last.arena.view,
            half=Half.BOTH,
            format=last.format,
            refused=True,
            x=0,
            topk_idx=0,
            wide_idx=True,
            weights=0,
            num_tokens=0,
            num_topk=last.topk,
            num_experts=last.num_experts,
            places=last.places.data_ptr(),
            epoch=0,
            out=0,
            wait_stats=0,
            stream=self._domain.enter_stream(),
        )

    # -- arenas --------------------------------------------------------------------------------------------------

    def _make_arena(self, max_tokens: int, hidden: int, topk: int, num_experts: int, format: Format) -> _Arena:
        """Symmetric memory for a new (M, hidden size). Collective."""
        num_bytes = _C.LatencyEngine.arena_bytes(self._domain.size, max_tokens, hidden)
        what = f"num_max_dispatch_tokens_per_rank = {max_tokens}, hidden size {hidden}"
        if torch.cuda.is_current_stream_capturing():
            raise CapacityError(
                f"the first low-latency call with {what} allocates {num_bytes} bytes, which a CUDA graph cannot "
                "capture: make one such call before capturing"
            )

        def announce(withdrawn: bool) -> None:
            self._engine.announce(
                max_tokens=max_tokens,
                hidden=hidden,
                num_topk=topk,
                num_experts=num_experts,
                format=format,
                withdrawn=withdrawn,
                stream=self._domain.enter_stream(),
            )

        announced = bool(self._arenas)
        if announced:  # peers that have this arena are in the call already: let them name the difference
            announce(withdrawn=False)
        try:
            self._agree(max_tokens, hidden, None)
        except RankMismatchError:
            if announced:  # before any rank makes its next call, which would be taken for this one
                announce(withdrawn=True)
                torch.cuda.synchronize(self.device)
                gather("low-latency dispatch", self._domain.group, self.device, self._domain.timeout_seconds, None)
            raise
        try:
            memory = PeerMemory(self._domain.group, self.device, num_bytes)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"no memory for {num_bytes} bytes of low-latency buffers ({what})") from error
        arena = _Arena(memory, _C.LatencyArena(memory.addresses, max_tokens, hidden))
        self._arenas[max_tokens, hidden] = arena
        return arena

    def _agree(self, max_tokens: int, hidden: int, problem: DeepEPMoEError | None) -> None:
        """Before the ranks allocate: whether all of them will, and the same."""
        mine = (None if problem is None else str(problem), max_tokens, hidden)
        domain = self._domain
        told = gather("low-latency dispatch", domain.group, self.device, domain.timeout_seconds, mine)
        if problem is not None:
            return  # the caller raises it
        refusals = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _, _) in enumerate(told) if reason)
        if refusals:
            raise PeerError(f"low-latency dispatch was refused by another rank of the group: {refusals}")
        for index, name in ((1, "num_max_dispatch_tokens_per_rank"), (2, "hidden size")):
            if len({values[index] for values in told}) > 1:
                values = ", ".join(f"{values[index]} on rank {rank}" for rank, values in enumerate(told))
                raise RankMismatchError(f"{name} differs between the ranks of the group: {values}")

    # -- masks and the end ---------------------------------------------------------------------------------------

    def update_mask(self, rank: int, masked: bool) -> None:
        if masked:
            self._engine.set_mask(rank, self._domain.enter_stream())
        else:
            self._lift_masks(1 << rank)

    def query_mask(self, status: Tensor) -> None:
        self._engine.query_mask(status.data_ptr(), self._domain.enter_stream())

    def clean_mask(self) -> None:
        self._lift_masks((1 << self._domain.size) - 1)

    def _lift_masks(self, ranks: int) -> None:
        self._engine.lift_masks([arena.view for arena in self._arenas.values()], ranks, self._domain.enter_stream())

    def check(self) -> None:
        self._domain.raise_failure()
        self._domain.raise_notice()

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._arenas.clear()
        self._last = None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
