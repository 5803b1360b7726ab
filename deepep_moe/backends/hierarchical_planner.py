"""Making plans of several nodes: what ranks tell each other, and when the host waits for it.

The host waits once in a plan, for the summaries of all ranks, and knows all sizes then. With sizes that are fixed
beforehand it waits on GPUs only for the first plan of a kind. Later ones compute everything on the device and can be
captured in a CUDA graph. What the device finds wrong with such a plan, the next plan of every rank raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Backend, Phase, Plan
from deepep_moe.backends.checks import check_limits, check_plan_inputs
from deepep_moe.backends.exchange import Exchange, Fact
from deepep_moe.backends.hierarchical_counts import (
    SHARES,
    Counted,
    Counts,
    Crossing,
    Geometry,
    count,
    positions,
    too_many_tokens,
)
from deepep_moe.backends.hierarchical_plan import HierarchicalPlan, Way, place
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.backends.rail import Rail
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, PeerError, UnsupportedError


@dataclass(frozen=True)
class Request:
    """The arguments of :meth:`Backend.plan`."""

    topk_idx: Tensor | None
    num_experts: int
    alignment: int
    is_token_in_rank: Tensor | None
    num_tokens_per_expert: Tensor | None
    max_recv: int | None
    max_rows: int | None

    @property
    def fixed(self) -> bool:
        return self.max_recv is not None or self.max_rows is not None

    @property
    def kind(self) -> tuple[int, int, int]:
        """Experts, top-k and alignment."""
        routes = isinstance(self.topk_idx, Tensor) and self.topk_idx.dim() == 2
        return self.num_experts, self.topk_idx.shape[1] if routes and self.topk_idx is not None else 0, self.alignment

    def check(self, geometry: Geometry, engine: Backend) -> None:
        """What this rank alone can see."""
        check_plan_inputs(
            self.topk_idx,
            self.num_experts,
            self.alignment,
            self.is_token_in_rank,
            self.num_tokens_per_expert,
            geometry.num_ranks,
            geometry.device,
        )
        check_limits(self.max_recv, self.max_rows)
        if isinstance(engine, NVLinkBackend):
            engine._check_limits(self.num_experts // geometry.num_nodes, self.kind[1])

    def count(self, geometry: Geometry) -> tuple[Tensor, Counted]:
        """``[T, K]`` int64, the plan's own, and what this rank counts."""
        if self.topk_idx is not None:
            topk_idx, in_rank = self.topk_idx.to(torch.int64, copy=True).contiguous(), None
        else:
            assert self.is_token_in_rank is not None
            in_rank = self.is_token_in_rank
            topk_idx = torch.empty((in_rank.shape[0], 0), dtype=torch.int64, device=geometry.device)
        return topk_idx, count(
            geometry,
            topk_idx,
            self.num_experts,
            in_rank,
            self.num_tokens_per_expert,
            self.max_recv,
            self.max_rows,
        )


class Moving:
    """Wraps what follows an agreement: whoever waits for this rank, in its node, its rail or the group, is told when it
    fails.

    Args:
        lines: over which others may wait for this rank.
    """

    def __init__(self, *lines: Exchange | Rail) -> None:
        self._lines = lines

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
            for line in self._lines:
                line.break_off(phase, reason)
            raise


@dataclass
class Planner:
    """Makes the plans of one backend.

    Args:
        exchange: of the whole group.
        engine: a backend of this rank's node, which plans its batch.
        mover: number of the backend of the node that moves rows.
        number: of the backend that the plans belong to.
        moving: wraps what follows an agreement.
    """

    geometry: Geometry
    host_geometry: Geometry
    exchange: Exchange
    rail: Rail
    engine: Backend
    mover: int
    config: DispatcherConfig
    number: int
    moving: Moving
    defers: bool
    """Whether plans of fixed size make no host wait."""
    _experts: int = 0  # of the last plan: all ranks send summaries of so many words
    _most_tokens: int = 0  # of any rank in the plans so far: fixed sizes are made for it
    _known: set[tuple[int, int, int]] = field(default_factory=set)  # kinds of plans of fixed size
    _deferred: dict[tuple[int, ...], Deferred] = field(default_factory=dict)  # by size of the summaries

    def __post_init__(self) -> None:
        self._most_tokens = self.config.max_tokens_per_rank

    @property
    def words(self) -> int:
        """Of a summary."""
        return self.geometry.summary_words(self._experts)

    def plan(self, request: Request, history: int) -> Plan:
        """See :meth:`Backend.plan`. ``history``: of the calls before, which ranks compare."""
        exchange, geometry = self.exchange, self.geometry
        self.raise_deferred()
        exchange.count_plan()
        without_wait = self.defers and request.max_recv is not None
        known = without_wait and request.kind in self._known
        words = self.words
        if extension.is_capturing(geometry.device) and not known:
            raise UnsupportedError(
                "a CUDA graph captures only plans of fixed size of a kind (experts, top-k, alignment) that was planned "
                "before: set capacity_factor (num_worst_tokens of Buffer) and max_tokens_per_rank, and run once before"
            )
        with exchange.agreement("plan", compared=not known, words=words) as agreement:
            request.check(geometry, self.engine)
            topk_idx, counted = request.count(geometry)
            if known and topk_idx.shape[0] > self._most_tokens:
                raise CapacityError(too_many_tokens(geometry.nodes.rank, topk_idx.shape[0], self._most_tokens))
            summary = counted.summary
            # Until all ranks are known to have as many experts, their summaries differ in size.
            agreement.private = summary if request.num_experts == self._experts else summary.new_zeros(words)
            agreement.facts = self._facts(request, history)
        if known:
            with self.moving("plan"):
                return self._plan_without_wait(request, topk_idx, counted)
        if request.num_experts != self._experts:
            self._experts = request.num_experts
            with exchange.agreement("plan", words=self.words) as agreement:
                agreement.private = summary
        assert agreement.shared is not None and agreement.on_device is not None
        counts = Counts(self.host_geometry, agreement.shared, *request.kind)
        most_tokens = max(1, int(counts.tokens.max()))
        counts.raise_problems(self.config, most_tokens)
        self._most_tokens = max(self._most_tokens, most_tokens)
        with self.moving("plan"):
            if without_wait:
                self._known.add(request.kind)
                size = tuple(agreement.on_device.shape)
                if size not in self._deferred:  # now: a capture cannot allocate pinned memory
                    self._deferred[size] = Deferred(agreement.on_device)
                crossing = self._most_crossing()
            else:
                crossing = counts.sizes(most_tokens, exact=self.rail.moves_unused_rows)
            me = geometry.nodes.rank
            num_recv = int(counts.received[me]) if request.max_recv is None else request.max_recv
            num_rows = int(counts.rows[me]) if request.max_rows is None else request.max_rows
            on_device = Counts(geometry, agreement.on_device, *request.kind)
            plan = self._make(crossing, on_device, request, topk_idx, counted, num_recv, num_rows, None)
            if not request.fixed:
                plan.expert_counts_host = counts.routes.view_as(counts.padded)[me].clone()
            return plan

    def _facts(self, request: Request, history: int) -> dict[str, Fact]:
        num_experts, topk, alignment = request.kind
        return {
            "num_experts": num_experts,
            "top-k": topk,
            "expert alignment": alignment,
            "calls before the plan": history,
            **self.config.shared(),
            "fixed sizes": request.fixed,
        }

    def _plan_without_wait(self, request: Request, topk_idx: Tensor, counted: Counted) -> Plan:
        """A plan of fixed size, of a kind that all ranks have made before. Where the device finds that it is an error,
        it drops all tokens and makes the sums NaN, until the next plan raises the error."""
        counts = Counts(self.geometry, self.exchange.tell_all("plan", counted.summary), *request.kind)
        bad = counts.bad(self._most_tokens).any().to(torch.int32).view(1)
        self._deferred[tuple(counts.table.shape)].put(counts.table, request.kind)
        assert request.max_recv is not None
        return self._make(
            self._most_crossing(), counts, request, topk_idx, counted, request.max_recv, request.max_rows or 0, bad
        )

    def _most_crossing(self) -> Crossing:
        """What crosses at most by a plan of fixed size."""
        tokens, others = self._most_tokens, self.geometry.num_nodes - 1
        of_share = -(-tokens // SHARES)
        return Crossing(tokens, others * tokens, of_share, others * of_share, None, None)

    def raise_deferred(self) -> None:
        """Raise what is wrong with the last plan that made no host wait. All ranks find it in the same call."""
        if extension.is_capturing(self.geometry.device):
            return
        for deferred in self._deferred.values():
            if deferred.pending:
                counts = Counts(self.host_geometry, deferred.take(self.exchange), *deferred.kind)
                counts.raise_problems(self.config, self._most_tokens)

    def _make(
        self,
        crossing: Crossing,
        counts: Counts,
        request: Request,
        topk_idx: Tensor,
        counted: Counted,
        num_recv: int,
        num_rows: int,
        bad: Tensor | None,
    ) -> HierarchicalPlan:
        """A plan of sizes that the host knows. Makes no host wait. Where ``bad [1]`` is not 0 nothing moves."""
        geometry, room, topk = self.geometry, crossing.tokens, topk_idx.shape[1]
        # Over the rail: the routes of all tokens or, without routes, the ranks that want them.
        told = topk_idx
        if not topk:
            assert request.is_token_in_rank is not None
            told = request.is_token_in_rank[:, geometry.by_node]
        block = torch.full((room, told.shape[1]), -1 if topk else 0, dtype=torch.int32, device=geometry.device)
        block[: told.shape[0]] = told
        batch = self.rail.gather("plan", block).view(geometry.num_nodes * room, told.shape[1])
        node_plan, recv_position = self._plan_node(batch, counts, topk, num_recv, num_rows, bad)
        placed, digest = place(counts, node_plan, room), counts.digest
        plan = TensorPlan(
            num_experts=counts.num_experts,
            alignment=counts.alignment,
            identity=(self.number, self.exchange.plans),
            topk_idx=topk_idx,
            send_slot=counted.send_slot,
            counted=digest.counted,
            received=placed.received,
            row_recv=placed.row_recv,
            expert_counts_host=None,
        )
        way = Way(
            geometry=geometry,
            crossing=crossing,
            sent=digest.sent,
            received=digest.received,
            rail_tokens=digest.rail_tokens,
            send_position=counted.send_position,
            recv_position=recv_position,
            slots=node_plan.send_slot,
            node_counted=node_plan.counted,
            experts=node_plan.recv_topk_idx,
            arrived=placed.arrived,
            bad=geometry.none_bad if bad is None else bad,
        )
        return HierarchicalPlan(plan, way, self.mover)

    def _plan_node(
        self, batch: Tensor, counts: Counts, topk: int, num_recv: int, num_rows: int, bad: Tensor | None
    ) -> tuple[Plan, Tensor]:
        """The node's plan of ``batch [N * C, K or R]``, and ``[N, C]`` int32: the number of each of its tokens among
        those of one rank that cross to this rank, or -1."""
        geometry, engine, room = self.geometry, self.engine, batch.shape[0] // self.geometry.num_nodes
        experts = counts.num_experts // geometry.num_nodes
        if isinstance(engine, NVLinkBackend):
            engine.reserve(batch.shape[0], topk)
        if topk:
            routes, position = self._routes_in_node(batch, counts.num_experts, room, bad)
            plan = engine.plan(routes, experts, alignment=counts.alignment, max_recv=num_recv, max_rows=num_rows)
            return plan, position
        first = geometry.nodes.node * geometry.node_size
        mine = slice(first, first + geometry.node_size)
        in_rank = batch[:, mine] > (0 if bad is None else bad)
        of_rail = counts.to_expert[geometry.rail_members].sum(0).view(geometry.num_ranks, -1)
        plan = engine.plan(
            None,
            experts,
            alignment=counts.alignment,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=of_rail[geometry.by_node[mine]].reshape(-1).to(torch.int32),
            max_recv=num_recv,
            max_rows=num_rows,
        )
        return plan, self._positions(in_rank.any(1), room)

    def _routes_in_node(self, batch: Tensor, num_experts: int, room: int, bad: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[N * C, K]`` int64 experts of the node, and the numbers of the tokens."""
        geometry = self.geometry
        if geometry.kernels is None:
            routes = geometry.expert_in_node(batch.long(), num_experts)
            if bad is not None:
                routes = torch.where(bad > 0, -1, routes)
            return routes, self._positions((routes >= 0).any(1), room)
        routes = torch.empty(batch.shape, dtype=torch.int64, device=geometry.device)
        position = torch.empty((geometry.num_nodes, room), dtype=torch.int32, device=geometry.device)
        geometry.kernels.batch(
            told=batch.data_ptr(),
            bad=extension.address(bad),
            room=room,
            num_topk=batch.shape[1],
            num_experts=num_experts,
            routes=routes.data_ptr(),
            recv_position=position.data_ptr(),
            stream=extension.current_stream(geometry.device),
        )
        return routes, position

    def _positions(self, here: Tensor, room: int) -> Tensor:
        here = here.view(self.geometry.num_nodes, room)
        here[self.geometry.rail_rank].fill_(False)
        return positions(here, 1)


class Deferred:
    """The summaries of the last plan that made no host wait, on their way to the host. A captured graph writes them
    again whenever it is replayed."""

    def __init__(self, table: Tensor) -> None:
        on_gpu = table.device.type == "cuda"
        self._table = torch.zeros(table.shape, dtype=table.dtype, device="cpu", pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._captured = False
        self.pending = False
        self.kind = (0, 0, 0)

    def put(self, table: Tensor, kind: tuple[int, int, int]) -> None:
        """``kind``: see :attr:`Request.kind`."""
        self._table.copy_(table, non_blocking=True)
        self.kind, self.pending = kind, True
        if extension.is_capturing(table.device):
            self._captured = True
        elif self._copied is not None:
            self._copied.record()

    def take(self, exchange: Exchange) -> Tensor:
        """Wait for them. The device has usually made that plan long before the host makes the next one."""
        if self._copied is not None:
            exchange.wait_for("plan", self._copied)
        self.pending = self._captured
        table = self._table.clone()
        self._table.zero_()  # an error is raised once
        return table
