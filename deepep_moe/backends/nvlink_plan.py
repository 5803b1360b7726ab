"""The plan of the nvlink backend: kernels fill it in while the host continues."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from deepep_moe.backends.base import Layout, Plan
from deepep_moe.backends.tensor_plan import PlanBase
from deepep_moe.errors import HandleError
from deepep_moe.extension import _C

_WORD = 4  # bytes of an int32, the unit of all sizes below


class DevicePlan(PlanBase):
    """A :class:`Plan` whose tensors are views of one or two allocations, created on first access.

    Kernels take addresses, and creating a tensor takes as much host time as a launch. The host needs only N and M, to
    allocate outputs. It waits for them (``finish``) on first use, so it can enqueue other work until then.

    Args:
        topk_idx: [T, K] int64.
        inputs: other tensors that the kernels read; kept alive with the plan.
        finish: waits for N and M and returns them; None if ``sizes`` is given.
        sizes: N and M, if they are known in advance.
    """

    def __init__(
        self,
        num_experts: int,
        alignment: int,
        identity: tuple[int, int],
        topk_idx: Tensor,
        num_ranks: int,
        *,
        inputs: list[Tensor | None],
        finish: Callable[[DevicePlan], tuple[int, int]] | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        self.num_experts, self.alignment, self.topk_idx = num_experts, alignment, topk_idx
        self.identity, self.extra, self._inputs = identity, None, inputs
        self._ranks, self._finish, self._sizes = num_ranks, finish, sizes
        self._tokens, self._topk = topk_idx.shape
        self._counted_size = num_ranks * num_ranks + 2 * (num_experts // num_ranks) + 1
        self._received_words = 1 + 2 * self._topk
        self._memory: Tensor | None = None  # holds counted and send_slot
        self._room: Tensor | None = None  # holds received and row_recv; usually the same allocation
        self._room_starts = self._room_recv = 0
        self._counts: Tensor | None = None
        if finish is not None:
            self._counts = torch.empty(num_experts // num_ranks, dtype=torch.int64, device="cpu")
        self._routes: dict[Layout, _C.Route] = {}
        self._streams: set[int] = set()  # streams recorded with the allocator as users of the memory

    # -- memory --------------------------------------------------------------------------------------------------

    def allocate(self, max_recv: int, max_rows: int, stream: int) -> None:
        """Allocate memory for at most ``max_recv`` and ``max_rows`` rows on ``stream``, which must be current."""
        fixed, room = 0, max_recv * self._received_words + max_rows
        if self._memory is None:
            fixed = 2 * self._counted_size + self._tokens * self._ranks
        memory = torch.empty_strided((fixed + room,), (1,), dtype=torch.int32, device=self.topk_idx.device)
        if self._memory is None:
            self._memory, self._streams = memory, {stream}
        elif self._streams != {stream}:
            self._streams = set()
        self._room, self._room_starts, self._room_recv = memory, fixed, max_recv

    @property
    def is_placed(self) -> bool:
        """Whether memory for the rows has been allocated."""
        return self._room is not None

    def addresses(self) -> tuple[int, int, int, int]:
        assert self._memory is not None and self._room is not None
        counted = self._memory.data_ptr()
        received = self._room.data_ptr() + _WORD * self._room_starts
        row_recv = received + _WORD * self._room_recv * self._received_words
        return counted + 2 * _WORD * self._counted_size, counted, received, row_recv

    def route(self, layout: Layout, stream: int) -> _C.Route:
        """The plan as a kernel argument, for a kernel that runs on ``stream``, which must be current."""
        route = self._routes.get(layout)
        if route is None:
            self.known_sizes()
            route = self._routes[layout] = _route(self, layout, self.addresses())
        if stream not in self._streams:  # callers cannot record the memory, because they do not see it
            self._streams.add(stream)
            for memory in (self._memory, self._room):
                assert memory is not None
                memory.record_stream(torch.cuda.current_stream(memory.device))
        return route

    @property
    def counts_address(self) -> int:
        """Address of ``expert_counts_host``."""
        assert self._counts is not None
        return self._counts.data_ptr()

    # -- the Plan protocol ---------------------------------------------------------------------------------------

    def known_sizes(self) -> tuple[int, int]:
        if self._sizes is None:
            if self._finish is None:
                raise HandleError("this plan failed when it was made; make another")
            finish, self._finish = self._finish, None
            self._sizes = finish(self)
        return self._sizes

    def memory(self) -> list[Tensor]:
        self.known_sizes()  # may allocate
        assert self._memory is not None and self._room is not None
        return [self.topk_idx, self._memory, *([] if self._room is self._memory else [self._room])]

    @property
    def num_tokens(self) -> int:
        return self._tokens

    @property
    def num_topk(self) -> int:
        return self._topk

    @property
    def num_ranks(self) -> int:
        return self._ranks

    @property
    def num_recv(self) -> int:
        return self.known_sizes()[0]

    @property
    def num_rows(self) -> int:
        return self.known_sizes()[1]

    @cached_property
    def counted(self) -> Tensor:
        self.known_sizes()
        assert self._memory is not None
        return self._memory[: 2 * self._counted_size].view(torch.int64)

    @cached_property
    def send_slot(self) -> Tensor:
        self.known_sizes()
        assert self._memory is not None
        first = 2 * self._counted_size
        return self._memory[first : first + self._tokens * self._ranks].view(self._tokens, self._ranks)

    @cached_property
    def received(self) -> Tensor:
        num_recv, _ = self.known_sizes()
        assert self._room is not None
        words = self._room[self._room_starts : self._room_starts + num_recv * self._received_words]
        return words.view(num_recv, self._received_words)

    @cached_property
    def row_recv(self) -> Tensor:
        _, num_rows = self.known_sizes()
        assert self._room is not None
        first = self._room_starts + self._room_recv * self._received_words
        return self._room[first : first + num_rows]

    @cached_property
    def expert_counts_host(self) -> Tensor | None:
        self.known_sizes()
        return self._counts


def route_of(plan: Plan, layout: Layout, stream: int) -> _C.Route:
    """The plan as a kernel argument, for a kernel that runs on ``stream``, which must be current."""
    if isinstance(plan, DevicePlan):
        return plan.route(layout, stream)
    assert isinstance(plan, PlanBase)
    route = plan.routes.get(layout)
    if not isinstance(route, _C.Route):
        route = plan.routes[layout] = _route(plan, layout, plan.addresses())
    return route


def _route(plan: Plan, layout: Layout, addresses: tuple[int, ...]) -> _C.Route:
    send_slot, counted, received, row_recv = addresses
    return _C.Route(
        plan=plan.number,
        num_tokens=plan.num_tokens,
        num_topk=plan.num_topk,
        max_recv=plan.num_recv,
        max_rows=plan.num_rows,
        send_slot=send_slot,
        counted=counted,
        received=received,
        row_recv=row_recv,
        grouped=layout is Layout.BY_EXPERT,
    )
