"""The Backend protocol: what moves tokens, and the plan it moves them by.

A *plan* is the routing of one batch: computed once, then used by dispatch, by combine and by the backward of
both. A *backend* executes plans over one process group. Everything above (dispatcher, autograd, ``Buffer``,
framework integrations) is written against this page and knows no backend by name.

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

Both layouts of received data (:class:`Layout`) are a function of the routing alone, so results are deterministic.
"""

from __future__ import annotations

import enum
import itertools
from typing import Literal, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.config import DispatcherConfig

Phase = Literal["plan", "dispatch", "combine"]

_backend_numbers = itertools.count()


def new_backend_number() -> int:
    """A number that no other backend of this process has."""
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
    """BF16 tokens travel as e4m3 with scales and arrive as BF16 again, without scales."""


class Backward(enum.IntEnum):
    """What the backward of a call will send. Ranks must agree: otherwise one waits in it for another that has none."""

    NONE = 0
    ROWS = 1
    ROWS_AND_WEIGHTS = 2


class Destinations(NamedTuple):
    """Who gets what, counted on this rank alone (no communication)."""

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

    def tensors(self) -> list[Tensor | None]:
        """The tensors that custom operators take, in the order of ``TensorPlan.from_tensors``."""
        ...


class Rows(NamedTuple):
    """What dispatch delivers."""

    x: Tensor  # rank layout [N, H] or expert layout [M, H]
    scales: Tensor | None  # [N or M, S]: as given for the tokens
    weights: Tensor | None  # rank layout [N, K] (0 where the route is owned elsewhere), expert layout [M]; fp32


class Tokens(NamedTuple):
    """What combine delivers."""

    x: Tensor  # [T, H]
    weights: Tensor | None  # [T, K] fp32: the weights carried back


@runtime_checkable
class Backend(Protocol):
    """Executes plans over one process group. Calls are collective unless said otherwise.

    Work is enqueued on the current stream of ``device`` (on a CPU it is done when the call returns); streams and
    events are the caller's business. Inputs are validated by the backend: errors are ``deepep_moe.errors``.
    """

    name: str
    plans_have_extra: bool
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
        """The reason why ``auto`` passes the backend by although it could run, or None. Collective on a GPU."""
        ...

    @property
    def usable(self) -> bool:
        """False once closed, or broken for good by a lost peer: then every call raises. Local."""
        ...

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        """Count destinations of ``topk_idx [T, K]`` (int32 or int64, -1 = dropped). Local, not collective."""
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
        """Exchange routing once and place every row.

        ``topk_idx [T, K]``: int32 or int64 global experts, -1 = dropped. Without it (K = 0) ``is_token_in_rank
        [T, R]`` bool and ``num_tokens_per_expert [E]`` int32 say where tokens go, and only the rank layout exists.
        ``max_recv`` / ``max_rows`` fix N and M beforehand so that the host waits for nothing: unused rows have -1
        in ``recv_topk_idx``, ``recv_rows`` and ``row_recv``, ``expert_counts_host`` is None, and more rows than
        that raise :class:`~deepep_moe.errors.CapacityError` within the next call. Otherwise the wait for N and M,
        and what it raises, may be left to their first use (:meth:`Plan.known_sizes`).
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
        """Send ``x [T, H]`` (with ``scales [T, S]`` and ``weights [T, K]`` fp32) to the ranks of its experts.

        ``Rows.scales`` are as given, or with ``Wire.E4M3`` ``[N or M, H / 128]`` with strides of the backend's choice.
        Where ``wire`` rounds, a rank's own rows are rounded alike, so that values do not depend on where an expert is.
        Padding rows of the expert layout are zero.

        ``into`` (expert layout): outputs of an earlier dispatch by a plan of as many rows, to which this one adds its
        own. It is for backends that are made of others.
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
        """Transpose of :meth:`dispatch`: sum the rows of each token, in fp32 and in a fixed order, at its source.

        ``x`` is ``[N, H]`` (rank layout) or ``[M, H]`` (expert layout). ``weights`` (``[N, K]`` or ``[M]`` fp32) are
        carried back and summed into ``[T, K]``, or, with ``apply_weights`` (expert layout only), multiplied into
        the rows before summing and not returned. ``bias``: up to two ``[T, H]`` tensors added to the result.
        Rows of other dtypes than the fp32 accumulator are rounded once per hop: one partial sum per (token, rank).
        """
        ...

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        """Take this rank's place in an operation that it refuses: its peers raise too instead of waiting for it.

        For callers that check more than the backend does. Raises ``error``.
        """
        ...

    def check(self) -> None:
        """Raise what went wrong in work already enqueued (timeouts, overflow). Local, does not wait for the device."""
        ...

    def close(self) -> None:
        """Free resources. Idempotent; using the backend afterwards raises :class:`~deepep_moe.errors.HandleError`."""
        ...
