"""The complete backend over torch.distributed: gloo on a CPU, NCCL on any GPU.

It needs no extension and no NVLink, so it runs everywhere and is what the kernels are compared with. How one
batch travels:

* :meth:`CollectiveBackend.plan` exchanges a header (counts, and what ranks must agree on) and then the top-k rows
  of the tokens; from these every rank computes where each row goes.
* :meth:`CollectiveBackend.dispatch` sends one packed row of bytes (token, scales, weights) per token and
  destination rank, and copies it into the layout asked for.
* :meth:`CollectiveBackend.combine` sums the expert rows of one token in fp32 and top-k order, rounds that partial
  sum to the rows' dtype, returns it, and sums what comes back in fp32 and rank order, then adds the biases.

All sums go over gathered rows in a fixed order, so results are bit-for-bit reproducible.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import (
    Backward,
    Destinations,
    Layout,
    Phase,
    Plan,
    Rows,
    Tokens,
    Wire,
    new_backend_number,
)
from deepep_moe.backends.checks import (
    check_combine,
    check_dispatch,
    check_limits,
    check_plan_inputs,
    check_topk_idx,
    overflow_text,
)
from deepep_moe.backends.exchange import Agreement, Exchange, as_bytes
from deepep_moe.backends.headers import Fact
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, HandleError, InputError
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from deepep_moe.shared import Shared


class CollectiveBackend(Shared):
    """:class:`~deepep_moe.backends.base.Backend` over the collectives of ``group``.

    Args:
        group: the expert-parallel process group; its backend must serve ``device`` (gloo: CPU, nccl: CUDA).
        device: where tensors live.
        config: ``timeout_seconds``, ``check_agreement`` and ``debug_waits`` apply.
    """

    name = "collective"
    plans_have_extra = False
    ignores: tuple[str, ...] = ("num_sms", "rail_chunk_bytes", "ranks_per_node")

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        self.group, self.device, self.config = group, device, config
        self.number = new_backend_number()
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InputError("group", group, "this process must be a member of the group")
        self._exchange: Exchange | None = Exchange(group, device, config.timeout_seconds)
        self._settings: Mapping[str, Fact] = config.shared()
        # runs at the end of the process at the latest
        self._say_waits = weakref.finalize(self, _print_waits, self.rank, self._exchange.waited)
        if not config.debug_waits:
            self._say_waits.detach()

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig | None = None) -> str | None:
        return None

    @staticmethod
    def why_not_auto(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> str | None:
        return None

    @property
    def usable(self) -> bool:
        return self._exchange is not None and self._exchange.usable

    # -- planning ------------------------------------------------------------------------------------------------

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        check_topk_idx(topk_idx, num_experts, self.world_size, self.device)
        in_rank = self._tokens_in_ranks(topk_idx, num_experts)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return Destinations(
            num_tokens_per_rank=in_rank.sum(0, dtype=torch.int32),
            num_tokens_per_node=None,
            num_tokens_per_expert=per_expert.to(torch.int32),
            is_token_in_rank=in_rank,
        )

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
        exchange = self._open()
        ranks = self.world_size
        exchange.count_plan()
        fixed = max_recv is not None or max_rows is not None
        with exchange.agreement("plan") as agreement:
            check_plan_inputs(
                topk_idx, num_experts, alignment, is_token_in_rank, num_tokens_per_expert, ranks, self.device
            )
            check_limits(max_recv, max_rows)
            if topk_idx is not None:
                in_rank = self._tokens_in_ranks(topk_idx, num_experts)
            else:
                assert is_token_in_rank is not None
                in_rank = is_token_in_rank
                topk_idx = torch.empty((in_rank.shape[0], 0), dtype=torch.int64, device=self.device)
            agreement.private = in_rank.sum(0).tolist()
            agreement.facts = {
                "num_experts": num_experts,
                "top-k": topk_idx.shape[1],
                "expert alignment": alignment,
                **self._settings,
                "fixed sizes": fixed,
            }
        counts, number = agreement.shared, exchange.plans
        assert counts is not None and topk_idx is not None
        with exchange.moving("plan"):
            prefix = counts.cumsum(0).to(device=self.device, dtype=torch.int64)
            send_counts, recv_counts = counts[self.rank].tolist(), counts[:, self.rank].tolist()
            position = in_rank.cumsum(0, dtype=torch.int32) - 1
            send_slot = torch.where(in_rank, position, -1).to(torch.int32)
            sent_tokens = in_rank.t().nonzero()[:, 1]
            meta = torch.cat([sent_tokens.unsqueeze(1), topk_idx[sent_tokens]], dim=1).to(torch.int32)
            meta = exchange.all_to_all("plan", meta, send_counts, recv_counts)

            experts_here, counted = num_experts // ranks, None
            if not topk_idx.shape[1]:
                assert num_tokens_per_expert is not None
                counted = self._exchange_counts(exchange, num_tokens_per_expert)
        # Only sizes that were fixed beforehand can be too small.
        with exchange.agreement("plan") if fixed else exchange.moving("plan"):
            recv_src_idx = self._fit(meta[:, 0].contiguous(), max_recv)
            local = self._fit(meta[:, 1:].to(torch.int64) - self.rank * experts_here, max_recv)
            recv_topk_idx = torch.where((local >= 0) & (local < experts_here), local, -1)
            if counted is None:
                placed = self._place(recv_topk_idx, experts_here, alignment, max_rows)
            else:
                placed = _no_expert_rows(recv_topk_idx, counted)
        return TensorPlan(
            num_experts=num_experts,
            alignment=alignment,
            identity=(self.number, number),
            topk_idx=topk_idx.to(torch.int64, copy=True),
            send_slot=send_slot,
            counted=torch.cat([prefix.reshape(-1), placed.counts, placed.offsets]),
            received=torch.cat([recv_src_idx.unsqueeze(1), recv_topk_idx.to(torch.int32), placed.recv_rows], dim=1),
            row_recv=placed.row_recv,
            expert_counts_host=None if fixed else placed.counts.to("cpu", copy=True),
        )

    def _tokens_in_ranks(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        owner = torch.div(topk_idx, num_experts // self.world_size, rounding_mode="floor")  # -1 stays negative
        return (owner.unsqueeze(-1) == torch.arange(self.world_size, dtype=torch.int64, device=self.device)).any(1)

    def _fit(self, rows: Tensor, limit: int | None) -> Tensor:
        """``rows`` filled with -1 to ``limit`` rows."""
        if limit is None:
            return rows
        if rows.shape[0] > limit:
            text = overflow_text(self.config, self.rank, rows.shape[0], "received tokens", "max_recv", limit)
            raise CapacityError(text, needed=rows.shape[0], room=limit)
        return torch.cat([rows, rows.new_full((limit - rows.shape[0], *rows.shape[1:]), -1)])

    def _place(self, recv_topk_idx: Tensor, experts_here: int, alignment: int, max_rows: int | None) -> _Placed:
        """Give every route its expert row: by expert, then received row, then top-k position."""
        routes = recv_topk_idx.reshape(-1)
        order = torch.where(routes >= 0, routes, experts_here).argsort(stable=True)
        counts = torch.bincount(routes[routes >= 0], minlength=experts_here)
        padded = (counts + alignment - 1) // alignment * alignment
        offsets = torch.cat([counts.new_zeros(1), padded.cumsum(0)])
        needed = int(offsets[-1])
        num_rows = needed if max_rows is None else max_rows
        if needed > num_rows:
            text = overflow_text(self.config, self.rank, needed, "expert rows", "max_rows", num_rows)
            raise CapacityError(text, needed=needed, room=num_rows)

        order = order[: int(counts.sum())]
        expert = routes[order]
        rank_in_group = (
            torch.arange(order.shape[0], dtype=torch.int64, device=self.device) - (counts.cumsum(0) - counts)[expert]
        )
        row = offsets[expert] + rank_in_group
        recv_rows = torch.full_like(routes, -1, dtype=torch.int32)
        recv_rows[order] = row.to(torch.int32)
        row_recv = torch.full((num_rows,), -1, dtype=torch.int32, device=self.device)
        row_recv[row] = (order // recv_topk_idx.shape[1]).to(torch.int32)
        return _Placed(recv_rows.view_as(recv_topk_idx), row_recv, counts, offsets)

    def _exchange_counts(self, exchange: Exchange, num_tokens_per_expert: Tensor) -> Tensor:
        """[L] int64: without expert indices, how many tokens each expert of this rank would get."""
        per_rank = num_tokens_per_expert.to(torch.int64).view(self.world_size, -1)
        ones = [1] * self.world_size
        return exchange.all_to_all("plan", per_rank, ones, ones).sum(0)

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        exchange = self._open()
        if phase == "plan":
            exchange.count_plan()
        try:
            with self._agreement(phase):
                raise error
        finally:
            del error  # its traceback holds this frame: together they would keep the caller's tensors alive

    # -- moving rows ---------------------------------------------------------------------------------------------

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
        with self._agreement("dispatch") as agreement:
            check_dispatch(self, plan, x, layout=layout, wire=wire, scales=scales, weights=weights)
            agreement.facts = {
                **_facts(plan, x, layout, weights, backward),
                "wire": wire,
                "scale columns": 0 if scales is None else scales.shape[1],
                "dtype of scales": torch.float32 if scales is None else scales.dtype,
            }
        with self._open().moving("dispatch"):
            return self._dispatch(plan, x, layout, wire, scales, weights, into, agreement)

    def _dispatch(
        self,
        plan: Plan,
        x: Tensor,
        layout: Layout,
        wire: Wire,
        scales: Tensor | None,
        weights: Tensor | None,
        into: Rows | None,
        agreement: Agreement,
    ) -> Rows:
        exchange = self._open()
        if wire is not Wire.AS_GIVEN:
            x, scales = quantize_e4m3(x)
        send_counts, recv_counts = self._counts("dispatch", plan)
        x = x.detach()
        parts = [x] + [part for part in (scales, weights) if part is not None]
        packed = torch.cat([as_bytes(part) for part in parts], dim=1)
        received = exchange.all_to_all("dispatch", packed[self._sent_tokens(plan)], send_counts, recv_counts)
        received = _resize(received, plan.num_recv)

        row_bytes = [part.shape[1] * part.element_size() for part in parts]
        columns = list(received.split(row_bytes, dim=1))
        recv_weights: Tensor | None = None
        if weights is not None:
            recv_weights = _typed(columns.pop(), torch.float32)
            recv_weights = torch.where(plan.recv_topk_idx >= 0, recv_weights, 0.0)
        dtype, kind = x.dtype, None if scales is None else scales.dtype
        if wire is Wire.E4M3_TO_BF16:
            rows = dequantize_e4m3(_typed(columns[0], dtype), _typed(columns[1], torch.float32), torch.bfloat16)
            columns, dtype, kind = [as_bytes(rows)], rows.dtype, None
        if layout is Layout.BY_EXPERT:
            source, route = (plan.recv_rows >= 0).nonzero(as_tuple=True)
            places = plan.recv_rows[source, route].long()
            outputs = [None, None] if into is None else [None if t is None else as_bytes(t) for t in into[:2]]
            columns = [
                (c.new_zeros((plan.num_rows, c.shape[1])) if out is None else out).index_copy_(0, places, c[source])
                for c, out in zip(columns, outputs)
            ]
            if recv_weights is not None:
                row_weights = recv_weights.new_zeros(plan.num_rows) if into is None else into.weights
                assert row_weights is not None
                row_weights[places] = recv_weights[source, route]
                recv_weights = row_weights
        return Rows(
            x=_typed(columns[0], dtype),
            scales=None if kind is None else _typed(columns[1], kind),
            weights=recv_weights,
        )

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
        """See the protocol. Weights of the rank layout are summed as given, also where the route is elsewhere."""
        with self._agreement("combine") as agreement:
            check_combine(self, plan, x, layout=layout, weights=weights, apply_weights=apply_weights, bias=bias)
            agreement.facts = {**_facts(plan, x, layout, weights, backward), "weights multiplied": apply_weights}
        with self._open().moving("combine"):
            return self._combine(plan, x, layout, weights, apply_weights, bias, agreement)

    def _combine(
        self,
        plan: Plan,
        x: Tensor,
        layout: Layout,
        weights: Tensor | None,
        apply_weights: bool,
        bias: tuple[Tensor, ...],
        agreement: Agreement,
    ) -> Tokens:
        exchange = self._open()
        x = x.detach()
        partial, back_weights = x, weights
        if layout is Layout.BY_EXPERT:
            partial, back_weights = _sum_routes(plan, x, weights, apply_weights)
        parts = [partial] + ([back_weights] if back_weights is not None else [])
        packed = torch.cat([as_bytes(part) for part in parts], dim=1)
        send_counts, recv_counts = self._counts("combine", plan)
        packed = _resize(packed, sum(recv_counts))
        back = exchange.all_to_all("combine", packed, recv_counts, send_counts)

        columns = back.split([part.shape[1] * part.element_size() for part in parts], dim=1)
        sent_tokens = self._sent_tokens(plan).split(send_counts)
        tokens = self._sum_ranks(_typed(columns[0], x.dtype), sent_tokens, plan.num_tokens, bias)
        if back_weights is None:
            return Tokens(tokens, None)
        return Tokens(tokens, self._sum_ranks(_typed(columns[1], torch.float32), sent_tokens, len(tokens)))

    def _sum_ranks(
        self, back: Tensor, sent_tokens: tuple[Tensor, ...], num_tokens: int, bias: tuple[Tensor, ...] = ()
    ) -> Tensor:
        total = torch.zeros((num_tokens, back.shape[1]), dtype=torch.float32, device=self.device)
        for tokens, rows in zip(sent_tokens, back.split([len(t) for t in sent_tokens]), strict=True):
            total.index_add_(0, tokens, rows.float())  # a token appears once per rank, so the order is that of the loop
        for added in bias:
            total += added.detach().float()
        return total.to(back.dtype)

    def _counts(self, phase: Phase, plan: Plan) -> tuple[list[int], list[int]]:
        prefix = self._open().to_host(phase, plan.rank_prefix)
        counts = prefix.diff(dim=0, prepend=prefix.new_zeros((1, self.world_size)))
        return counts[self.rank].tolist(), counts[:, self.rank].tolist()

    @staticmethod
    def _sent_tokens(plan: Plan) -> Tensor:
        return (plan.send_slot.t() >= 0).nonzero()[:, 1]

    # -- checks --------------------------------------------------------------------------------------------------

    def waits(self) -> dict[str, float]:
        return dict(self._open().waited)

    def check(self) -> None:
        pass  # every call raises its own errors

    def close(self) -> None:
        self._say_waits()
        self._exchange = None

    def _open(self) -> Exchange:
        if self._exchange is None:
            raise HandleError("this backend was closed; make a new dispatcher or Buffer")
        return self._exchange

    def barrier(self) -> None:
        with self._open().agreement("barrier"):
            pass

    def _agreement(self, phase: Phase) -> AbstractContextManager[Agreement]:
        """Calls on a CPU are always compared, because gloo ends the process if sizes differ."""
        compared = self.config.check_agreement or self.device.type == "cpu" or phase == "plan"
        return self._open().agreement(phase, compared=compared)


class _Placed(NamedTuple):
    """The expert layout of one plan; see the fields of the same name in :class:`Plan`."""

    recv_rows: Tensor
    row_recv: Tensor
    counts: Tensor
    offsets: Tensor


def _no_expert_rows(recv_topk_idx: Tensor, counts: Tensor) -> _Placed:
    """Without expert indices there are no expert rows, only counts."""
    return _Placed(
        recv_rows=torch.empty_like(recv_topk_idx, dtype=torch.int32),
        row_recv=torch.empty(0, dtype=torch.int32, device=recv_topk_idx.device),
        counts=counts,
        offsets=counts.new_zeros(counts.shape[0] + 1),
    )


def _print_waits(rank: int, waited: dict[str, float]) -> None:
    """For ``config.debug_waits``. A collective operation waits for all peers together."""
    told = ", ".join(f"{seconds * 1e3:.3f} ms in {phase}" for phase, seconds in waited.items())
    print(f"deepep_moe: rank {rank} waited for its peers {told}", flush=True)


def _facts(plan: Plan, x: Tensor, layout: Layout, weights: Tensor | None, backward: Backward) -> dict[str, Fact]:
    """Values of a dispatch or combine that must be equal on all ranks, by the names that users know."""
    return {
        "plan": plan.number,
        "hidden size": x.shape[1],
        "dtype": x.dtype,
        "layout": layout,
        "weights": weights is not None,
        "backward": backward,
    }


def _sum_routes(plan: Plan, rows: Tensor, weights: Tensor | None, apply_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Expert layout to rank layout: ``[M, H]`` -> ``[N, H]``, and weights ``[M]`` -> ``[N, K]`` unless applied."""
    total = torch.zeros((plan.num_recv, rows.shape[1]), dtype=torch.float32, device=rows.device)
    for route in plan.recv_rows.unbind(1):
        used = (route >= 0).nonzero()[:, 0]
        source = route[used].long()
        addend = rows[source].float()
        if apply_weights and weights is not None:
            addend *= weights[source].unsqueeze(1)
        total.index_add_(0, used, addend)
    if weights is None or apply_weights:
        return total.to(rows.dtype), None
    placed = plan.recv_rows >= 0
    carried = weights.new_zeros(plan.recv_rows.shape)
    carried[placed] = weights[plan.recv_rows[placed].long()]
    return total.to(rows.dtype), carried


def _typed(column: Tensor, dtype: torch.dtype) -> Tensor:
    """A column of packed rows as ``dtype``; copied unless it starts its own memory."""
    if column.shape[1] == 0:  # weights without expert indices
        return column.new_empty(column.shape, dtype=dtype)
    whole = column.is_contiguous() and column.storage_offset() == 0
    return (column if whole else column.clone(memory_format=torch.contiguous_format)).view(dtype)


def _resize(rows: Tensor, length: int) -> Tensor:
    """Cut or zero-fill, for plans of fixed size, which hold more or fewer rows than were sent."""
    if rows.shape[0] == length:
        return rows
    return torch.cat([rows[:length], rows.new_zeros((max(0, length - rows.shape[0]), rows.shape[1]))])
