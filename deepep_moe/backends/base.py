"""The interface of backends: :class:`Backend` moves tokens between ranks, :class:`Plan` says where they go.

A *plan* is the routing of one batch: computed once, then used by dispatch, by combine and by the backward of
both. A *backend* executes plans over one process group. The layers above (dispatcher, autograd, ``Buffer``,
framework integrations) use this interface only and name no backend.

Symbols in shapes:

====  =====================================================================================
T     tokens of this rank (ranks may differ, 0 included)
H     hidden size
K     top-k (0 when a plan was made without expert indices)
R     ranks of the group; rank r owns experts ``r * L .. (r + 1) * L - 1``
E, L  experts of the group, experts of one rank (``E = R * L``)
N     rows received: one per (token, rank that owns at least one of its experts)
M     expert rows: one per (received row, local expert chosen by it), plus padding
====  =====================================================================================

The order of received rows depends on the routing only, in both layouts (:class:`Layout`), so results are
deterministic.
"""

from __future__ import annotations

import enum
import itertools
from typing import Literal, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.config import DispatcherConfig

Phase = Literal["plan", "dispatch", "combine", "barrier"]

_backend_numbers = itertools.count()


def new_backend_number() -> int:
    """A number that is unique among the backends of this process."""
    return next(_backend_numbers)


class Layout(enum.Enum):
    """The order of received rows."""

    BY_SOURCE = "by source"
    """Rank layout ``[N, ...]``: ordered by source rank, then by source token. The DeepEP 1.x ``Buffer`` uses it."""
    BY_EXPERT = "by expert"
    """Expert layout ``[M, ...]``: grouped by local expert; inside a group ordered by source rank, token and top-k
    position; each group padded at its end with zero rows to a multiple of ``alignment``. ``TokenDispatcher`` uses it.
    """


class Wire(enum.Enum):
    """The form in which dispatched rows travel and arrive."""

    AS_GIVEN = "as given"
    E4M3 = "e4m3"
    """BF16 tokens travel and arrive as e4m3 with one fp32 scale per 128 channels (see fp8.py)."""
    E4M3_TO_BF16 = "e4m3 to bf16"
    """BF16 tokens travel as e4m3 with scales and are converted back: they arrive as BF16, without scales."""


class Backward(enum.IntEnum):
    """What the backward of a call will send. Must be equal on all ranks, because the backward is collective too."""

    NONE = 0
    ROWS = 1
    ROWS_AND_WEIGHTS = 2


class Destinations(NamedTuple):
    """How many tokens and routes of this rank go where. Counted locally, without communication."""

    num_tokens_per_rank: Tensor  # [R] int32: tokens of this rank that go to each rank
    num_tokens_per_node: Tensor | None  # [nodes] int32; None when the group is one NVLink domain
    num_tokens_per_expert: Tensor  # [E] int32: routes of this rank to each expert
    is_token_in_rank: Tensor  # [T, R] bool


class Plan(Protocol):
    """Routing metadata of one batch. Owns its tensors: it stays valid when the same backend makes other plans.

    A backend returns its own implementation (:class:`~deepep_moe.backends.tensor_plan.TensorPlan` where the tensors
    exist already). Several values share one tensor; read-only views give the parts. All tensors are on the backend's
    device except ``identity`` and ``expert_counts_host``. -1 means "no route" everywhere.

    Reading ``num_recv``, ``num_rows`` or a tensor other than ``topk_idx`` may wait for the other ranks
    (:meth:`known_sizes`).
    """

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    @property
    def alignment(self) -> int:
        """The rows of one expert are padded to a multiple of this."""
        ...

    @property
    def identity(self) -> tuple[int, int] | Tensor:
        """:attr:`owner` and :attr:`number`; [2] int64 on the CPU in a plan that went through operators."""
        ...

    @property
    def owner(self) -> int:
        """:attr:`Backend.number` of the backend that made the plan; no other can execute it."""
        ...

    @property
    def number(self) -> int:
        """Counts the plans of a backend, including refused ones, so it is equal on all ranks for the same plan."""
        ...

    @property
    def num_tokens(self) -> int:
        """T."""
        ...

    @property
    def num_ranks(self) -> int:
        """R."""
        ...

    @property
    def num_topk(self) -> int:
        """K."""
        ...

    @property
    def num_recv(self) -> int:
        """N: rows in rank layout."""
        ...

    @property
    def num_rows(self) -> int:
        """M: rows in expert layout, including padding."""
        ...

    def known_sizes(self) -> tuple[int, int]:
        """N and M. Waits for the other ranks if they are not known yet, and raises the plan's error if it failed."""
        ...

    @property
    def topk_idx(self) -> Tensor:
        """[T, K] int64: global expert, or -1 (dropped route); may be the caller's own tensor."""
        ...

    @property
    def send_slot(self) -> Tensor:
        """[T, R] int32: index of the token among those this rank sends to rank r, or -1."""
        ...

    @property
    def counted(self) -> Tensor:
        """[R * R + 2 * L + 1] int64: :attr:`rank_prefix`, :attr:`expert_counts` and :attr:`expert_offsets`."""
        ...

    @property
    def rank_prefix(self) -> Tensor:
        """[R, R] int64: [s][d] = rows that rank d receives from ranks 0..s."""
        ...

    @property
    def expert_counts(self) -> Tensor:
        """[L] int64: rows of each local expert, without padding."""
        ...

    @property
    def expert_offsets(self) -> Tensor:
        """[L + 1] int64: first row of each local expert's padded group, then the end of the last group. That end is M,
        or less where M was fixed in advance."""
        ...

    @property
    def expert_counts_host(self) -> Tensor | None:
        """[L] int64 on the CPU: :attr:`expert_counts`; None where the sizes were fixed in advance."""
        ...

    @property
    def received(self) -> Tensor:
        """[N, 1 + 2 * K] int32: :attr:`recv_src_idx`, :attr:`recv_topk_idx` and :attr:`recv_rows`."""
        ...

    @property
    def recv_src_idx(self) -> Tensor:
        """[N] int32: token index at the source rank."""
        ...

    @property
    def recv_topk_idx(self) -> Tensor:
        """[N, K] int32: local expert of the row's route k, or -1 (the expert is on another rank)."""
        ...

    @property
    def recv_rows(self) -> Tensor:
        """[N, K] int32: expert row of the route, or -1."""
        ...

    @property
    def row_recv(self) -> Tensor:
        """[M] int32: the received row that the expert row is a copy of, or -1 (padding)."""
        ...

    @property
    def extra(self) -> Tensor | None:
        """[any] int32: data that only the backend that made the plan reads."""
        ...

    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of ``send_slot``, ``counted``, ``received`` and ``row_recv``, for kernels."""
        ...

    def tensors(self) -> list[Tensor | None]:
        """The tensors that custom operators take, in the order of ``TensorPlan.from_tensors``."""
        ...

    def memory(self) -> list[Tensor]:
        """Tensors that together cover the plan's memory on the device, to record streams with
        (``Tensor.record_stream``). They exist already: nothing is copied, as it may be in :meth:`tensors`."""
        ...


class Rows(NamedTuple):
    """What dispatch delivers."""

    x: Tensor  # [N, H] in rank layout, [M, H] in expert layout
    scales: Tensor | None  # [N or M, S], in the dtype of the scales that were sent
    weights: Tensor | None  # fp32; [N, K] in rank layout (0 where the expert is on another rank), [M] in expert layout


class Tokens(NamedTuple):
    """What combine delivers."""

    x: Tensor  # [T, H]
    weights: Tensor | None  # [T, K] fp32: the weights carried back


@runtime_checkable
class Backend(Protocol):
    """Executes plans over one process group. Calls are collective unless documented otherwise.

    On a GPU, work is enqueued on the current stream of ``device``; the caller manages streams and events. On a CPU it
    is complete when the call returns. Backends check their arguments and raise :mod:`deepep_moe.errors`.
    """

    name: str  # the value of DispatcherConfig.backend that selects it
    plans_have_extra: bool  # whether Plan.extra is set
    ignores: tuple[str, ...]  # settings that it does not read
    number: int  # from new_backend_number()
    group: dist.ProcessGroup
    rank: int
    world_size: int
    device: torch.device
    config: DispatcherConfig

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None: ...

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig | None = None) -> str | None:
        """The reason why this rank cannot use the backend, or None. Collective where ``device`` is a GPU."""
        ...

    @staticmethod
    def why_not_auto(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> str | None:
        """The reason why ``auto`` does not choose the backend although it can run, or None. Collective on a GPU."""
        ...

    @property
    def usable(self) -> bool:
        """False after :meth:`close` or a permanent failure such as a lost peer: every call then raises. Local."""
        ...

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        """Count the destinations of ``topk_idx [T, K]`` (int32 or int64, -1 = dropped route). Local."""
        ...

    def plan(
        self,
        topk_idx: Tensor | None,
        num_experts: int,
        *,
        alignment: int = 1,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        max_recv: int | None = None,
        max_rows: int | None = None,
    ) -> Plan:
        """Exchange the routing of one batch and compute the place of every row.

        Args:
            topk_idx: [T, K] int32 or int64 global experts, -1 = dropped route. None: ``is_token_in_rank`` and
                ``num_tokens_per_expert`` are needed instead, K is 0, and only the rank layout exists.
            num_experts: E, a multiple of R.
            alignment: pad the rows of each expert to a multiple of this.
            is_token_in_rank: [T, R] bool: whether the token goes to the rank.
            num_tokens_per_expert: [E] int32: tokens of this rank for each expert.
            max_recv, max_rows: fix N and M in advance, so that the host does not wait. Unused rows have -1 in
                ``recv_topk_idx``, ``recv_rows`` and ``row_recv``, and ``expert_counts_host`` is None.

        Returns:
            The plan. Without ``max_recv``, the wait for N and M may happen at their first use, with the errors it
            raises (:meth:`Plan.known_sizes`).

        Raises:
            InputError: on the rank with the bad argument; PeerError on the others.
            RankMismatchError: ranks disagree on an argument that must be equal.
            CapacityError: more rows than ``max_recv`` or ``max_rows``; from this call or the next one.
            PeerTimeoutError: a rank did not answer within ``timeout_seconds``.
        """
        ...

    def dispatch(
        self,
        plan: Plan,
        x: Tensor,
        *,
        layout: Layout,
        wire: Wire = Wire.AS_GIVEN,
        scales: Tensor | None = None,
        weights: Tensor | None = None,
        backward: Backward = Backward.NONE,
        into: Rows | None = None,
    ) -> Rows:
        """Send each token to the ranks of its experts.

        Args:
            plan: from :meth:`plan` of this backend.
            x: [T, H] bf16, fp16, fp32 or e4m3.
            layout: order of the received rows.
            wire: format of rows between ranks. If it rounds, rows that stay on their rank are rounded too, so that
                values do not depend on the rank of the expert.
            scales: [T, S] of a 4-byte dtype, sent beside the rows.
            weights: [T, K] fp32, sent beside the rows.
            backward: what the backward of this call will send.
            into: outputs of an earlier dispatch in expert layout, by a plan with as many rows; this call writes its
                rows into them. For backends that are composed of other backends.

        Returns:
            The received rows. Padding rows of the expert layout are zero. With ``Wire.E4M3`` scales are
            [N or M, H / 128] fp32, with strides chosen by the backend.
        """
        ...

    def combine(
        self,
        plan: Plan,
        x: Tensor,
        *,
        layout: Layout,
        weights: Tensor | None = None,
        apply_weights: bool = False,
        bias: tuple[Tensor, ...] = (),
        backward: Backward = Backward.NONE,
    ) -> Tokens:
        """Transpose of :meth:`dispatch`: sum the rows of each token at its source rank.

        Sums are in fp32 and in a fixed order. The partial sum of one (token, rank) is rounded to the dtype of ``x``
        before it is sent.

        Args:
            plan: from :meth:`plan` of this backend.
            x: [N, H] in rank layout, [M, H] in expert layout; bf16, fp16 or fp32.
            layout: order of the rows of ``x``.
            weights: [N, K] in rank layout, [M] in expert layout; fp32. Summed at the source rank and returned, unless
                ``apply_weights``.
            apply_weights: multiply the rows by ``weights`` before the sum (expert layout only); weights are not
                returned.
            bias: up to two [T, H] tensors of the dtype of ``x``, added to the result.
            backward: what the backward of this call will send.
        """
        ...

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        """Raise ``error``, after telling the peers, which then raise PeerError instead of waiting for this rank.

        For callers that check more than the backend does. ``phase`` is the call that the peers are in.
        """
        ...

    def waits(self) -> dict[str, float]:
        """Seconds that this rank has waited for its peers so far: by phase, or by peer where that is measured."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks have made this call. Collective.

        Raises:
            RankMismatchError: another rank is in another call (not on nvlink, whose other calls do not meet this one).
            PeerTimeoutError: a rank did not come within ``timeout_seconds``.
        """
        ...

    def check(self) -> None:
        """Raise errors of work that is already enqueued (timeouts, overflow). Local; does not wait for the device."""
        ...

    def close(self) -> None:
        """Free resources. Idempotent; using the backend afterwards raises :class:`~deepep_moe.errors.HandleError`."""
        ...
