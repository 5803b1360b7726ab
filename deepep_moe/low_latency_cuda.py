"""The low-latency engine with CUDA kernels over one NVLink domain (csrc/latency): one kernel per call or per half.

The host only launches. Rows in flight are in an *arena*: symmetric memory allocated once for each (M, hidden size) and
never moved, because captured graphs contain its addresses. Everything that differs between calls is counted on the
device.

Recoverable problems that kernels detect (an index out of range, a peer that refused its input) stop no rank: the call
completes without the bad input, and the rank that detected it raises after it has enqueued a later low-latency call, so
the ranks stay in step. Failures that last (a peer that does not answer, arguments that differ between ranks) are raised
by the next call. A failed call of the throughput engine freezes these kernels too: all ranks skip the same calls of
both engines until each of them has raised that error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepep_moe.backends import Backend
from deepep_moe.backends.exchange import gather
from deepep_moe.domain import Domain, SymmetricMemory, enter_stream
from deepep_moe.errors import CapacityError, DeepEPMoEError, PeerError, RankMismatchError
from deepep_moe.extension import _C, address
from deepep_moe.low_latency_engine import CombineCall, DispatchCall, DispatchShape, Format, Half

_SEND, _RECEIVE = Half.SEND, Half.RECEIVE  # reading a member of an enumeration takes as long as a call


class _Arena(NamedTuple):
    memory: SymmetricMemory
    view: _C.LatencyArena


def first_reason(backend: Backend, reason: str | None) -> str | None:
    """What stops the first rank that something stops, with the rank; equal on all ranks. Collective.

    Args:
        backend: of the ranks.
        reason: what stops this rank, or None.
    """
    reasons = gather("set-up", backend.group, backend.device, backend.config.timeout_seconds, reason)
    return next((f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one), None)


class CudaEngine:
    """:class:`~deepep_moe.low_latency_engine.Engine` of the ranks of ``domain``. Creating it is collective.

    Args:
        domain: the ranks and their memory.
        num_sms: SMs that the kernels may use; 0: all.
        masks: mask a peer that does not answer in time, instead of raising an error.
    """

    name = "cuda"

    def __init__(self, domain: Domain, num_sms: int, masks: bool) -> None:
        self._domain, self.device = domain, domain.device
        self._index: int = domain.device.index
        sms = num_sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        engine = domain.module.LatencyEngine
        blocks = min(max(_C.LATENCY_BLOCKS_PER_SM * sms, engine.fewest_blocks(domain.size)), _C.LATENCY_MAX_BLOCKS)
        domain.describe["ROW_FORMAT"] = lambda number: Format(number).name
        self._engine: _C.LatencyEngine = engine(domain.runtime, blocks, masks)
        self._control = domain.allocate(engine.control_bytes(), False)
        self._engine.set_control(self._control.addresses)
        self._arenas: dict[tuple[int, int], _Arena] = {}
        self._last: Tensor | None = None  # begins with the epoch of the last dispatch
        device_type, index = torch.empty((0,), dtype=torch.uint8, device=self.device).__dlpack_device__()
        self.signature = _C.TensorSignatures(device_type, index).of

    @staticmethod
    def why_no_domain(backend: Backend) -> str | None:
        """The reason a domain for low-latency calls alone cannot serve the group of ``backend``, or None; equal on all
        ranks. Collective."""
        config = backend.config
        if 0 < config.ranks_per_node < backend.world_size:
            return f"ranks_per_node = {config.ranks_per_node} cuts the group into several nodes"
        reason = Domain.supports(backend.group, backend.device, config.timeout_seconds, low_latency=True)
        return first_reason(backend, reason)

    def state_words(self, max_tokens: int, topk: int) -> int:
        return self._engine.places_words(self._domain.size, max_tokens, topk)

    def dispatch(self, call: DispatchCall, half: Half) -> None:
        shape, memory = call.shape, call.memory
        launch = shape.launch
        if launch is None:
            launch = shape.launch = self._prepare(shape)
        if half is not _RECEIVE:
            self._last = memory
        told = self._engine.dispatch(
            launch,
            half,
            call.x,
            call.topk_idx,
            memory,
            call.rows,
            call.scales,
            call.stats,
            call.wait_stats,
            enter_stream(self._index),
        )
        if told:
            self._tell(told, call, half)
        call.sent = True

    def combine(self, call: CombineCall, half: Half) -> None:
        dispatched, topk_idx = call.dispatched, call.topk_idx
        if half is _SEND:
            call.state = torch.empty_strided((1,), (1,), dtype=torch.int32, device=self.device)
        told = self._engine.combine(
            dispatched.shape.launch,
            half,
            call.x,
            topk_idx,
            topk_idx.dtype is torch.int64,
            call.topk_weights,
            dispatched.memory,
            call.state,
            call.out,
            call.wait_stats,
            enter_stream(self._index),
        )
        if told:
            self._tell(told, call, half)
        call.sent = True

    def _prepare(self, shape: DispatchShape) -> _C.LatencyShape:
        """The constant arguments of the kernels. A new (M, hidden size) allocates its arena, which is collective."""
        self._domain.raise_lasting()
        arena = self._arenas.get((shape.max_tokens, shape.hidden))
        if arena is None:
            arena = self._make_arena(shape)
        made: _C.LatencyShape = self._domain.module.LatencyShape(
            arena=arena.view,
            format=shape.format,
            num_tokens=shape.tokens,
            num_topk=shape.topk,
            num_experts=shape.num_experts,
            wide_idx=shape.wide_idx,
            ranges_at=shape.ranges_at,
            src_info_at=shape.src_info_at,
            counts_at=shape.counts_at,
        )
        return made

    def _tell(self, told: int, call: DispatchCall | CombineCall, half: Half) -> None:
        """Raise what had been reported when ``half`` of a call was launched.

        After a failure that lasts nothing was launched, and it is raised now. Anything else is raised once this rank
        has taken part in the whole call.
        """
        if told == _C.LATENCY_BROKEN:
            self._domain.raise_lasting()
        call.sent = True
        if half & Half.RECEIVE:
            self.check()

    # -- refusals ------------------------------------------------------------------------------------------------

    def refuse_dispatch(self, max_tokens: object, hidden: int, problem: DeepEPMoEError) -> bool:
        """See :class:`~deepep_moe.low_latency_engine.Engine`. The host waits until all peers have entered the call."""
        self._domain.raise_lasting()
        if self._arenas and not self._others_allocate(max_tokens, hidden):
            self._last = torch.empty((1,), dtype=torch.int32, device=self.device)
            self._refuse(_C.LatencyKind.DISPATCH, self._last, None)
            return True
        self._agree(max_tokens, hidden, problem)
        if self._arenas:
            self._withdraw()
        return False

    def _others_allocate(self, max_tokens: object, hidden: int) -> bool:
        """Whether other ranks wait in :meth:`_make_arena` instead of in the dispatch that this rank refuses."""
        others = torch.full((1,), -1, dtype=torch.int32, device=self.device)
        self._announce_refusal(others)
        state = int(others.item())
        if state < 0:  # kernels are frozen: assume that the others have the shape that this rank was given
            return isinstance(max_tokens, int) and (max_tokens, hidden) not in self._arenas
        return state == _C.LATENCY_ALLOCATING

    def _announce_refusal(self, others: Tensor) -> None:
        self._engine.announce_refusal(others.data_ptr(), self._domain.enter_stream())

    def refuse_combine(self, call: DispatchCall | None, problem: DeepEPMoEError) -> bool:
        self._domain.raise_lasting()
        if call is None and self._last is None:
            return False  # no dispatch yet, so no peer is in a combine
        self._refuse(_C.LatencyKind.COMBINE, None, self._last if call is None else call.memory)
        return True

    def _refuse(self, kind: _C.LatencyKind, passed_on: Tensor | None, source: Tensor | None) -> None:
        """Take part in a call without tokens; the arguments are those of ``_C.LatencyEngine.refuse``."""
        self._engine.refuse(
            kind=kind, passed_on=address(passed_on), source=address(source), stream=self._domain.enter_stream()
        )

    # -- arenas --------------------------------------------------------------------------------------------------

    def _make_arena(self, shape: DispatchShape) -> _Arena:
        """Symmetric memory for a new (M, hidden size). Collective."""
        max_tokens, hidden = shape.max_tokens, shape.hidden
        num_bytes = self._engine.arena_bytes(self._domain.size, max_tokens, hidden)
        what = f"num_max_dispatch_tokens_per_rank = {max_tokens}, hidden size {hidden}"
        if torch.cuda.is_current_stream_capturing():
            raise CapacityError(
                f"the first low-latency call with {what} allocates {num_bytes} bytes, which a CUDA graph cannot "
                "capture: make one such call before capturing"
            )

        announced = bool(self._arenas)
        if announced:  # peers that have this arena are in the call already: they report the difference
            self._announce(max_tokens, hidden, shape.topk, shape.num_experts, shape.format)
        problem = self._agree(max_tokens, hidden, None)
        if problem is not None:
            if announced:
                self._withdraw()
            raise problem
        try:
            memory = self._domain.allocate(num_bytes, True)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"no memory for {num_bytes} bytes of low-latency buffers ({what})") from error
        except CapacityError:
            if announced and self._domain.allocates_together:
                self._withdraw()
            raise
        arena = _Arena(memory, self._engine.add_arena(memory.addresses, max_tokens, hidden))
        self._arenas[max_tokens, hidden] = arena
        return arena

    def _agree(self, max_tokens: object, hidden: int, problem: DeepEPMoEError | None) -> DeepEPMoEError | None:
        """Before allocating: whether all ranks will allocate, with equal sizes. Collective.

        Args:
            max_tokens, hidden: of this rank.
            problem: why this rank will not allocate.

        Returns:
            The error to raise, or None.
        """
        mine = (None if problem is None else str(problem), max_tokens if isinstance(max_tokens, int) else 0, hidden)
        domain = self._domain
        told = gather("low-latency dispatch", domain.group, self.device, domain.timeout_seconds, mine)
        if problem is not None:
            return problem
        refusals = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _, _) in enumerate(told) if reason)
        if refusals:
            return PeerError(f"low-latency dispatch was refused by another rank of the group: {refusals}")
        for index, name in ((1, "num_max_dispatch_tokens_per_rank"), (2, "hidden size")):
            if len({values[index] for values in told}) > 1:
                values = ", ".join(f"{values[index]} on rank {rank}" for rank, values in enumerate(told))
                return RankMismatchError(f"{name} differs between the ranks of the group: {values}")
        return None

    def _announce(
        self, max_tokens: int, hidden: int, topk: int, num_experts: int, format: Format, withdrawn: bool = False
    ) -> None:
        """Announce the next dispatch to the peers, or withdraw that."""
        self._engine.announce(
            max_tokens=max_tokens,
            hidden=hidden,
            num_topk=topk,
            num_experts=num_experts,
            format=format,
            withdrawn=withdrawn,
            stream=self._domain.enter_stream(),
        )

    def _withdraw(self) -> None:
        """Withdraw what this rank announced, before any rank's next call would be compared with it. Collective."""
        self._announce(0, 0, 0, 0, Format.BF16, withdrawn=True)
        torch.cuda.synchronize(self.device)
        gather("low-latency dispatch", self._domain.group, self.device, self._domain.timeout_seconds, None)

    # -- masks and the end ---------------------------------------------------------------------------------------

    def update_mask(self, rank: int, masked: bool) -> None:
        if masked:
            self._engine.set_mask(rank, self._domain.enter_stream())
        else:
            self._lift_masks([rank])

    def query_mask(self, status: Tensor) -> None:
        self._engine.query_mask(status.data_ptr(), self._domain.enter_stream())

    def clean_mask(self) -> None:
        self._lift_masks(list(range(self._domain.size)))

    def _lift_masks(self, ranks: list[int]) -> None:
        self._engine.lift_masks(ranks, self._domain.enter_stream())

    def check(self) -> None:
        self._domain.raise_failure()
        self._domain.raise_notice()

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        self._arenas.clear()
        self._last = None
