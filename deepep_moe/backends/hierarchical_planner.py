"""Making plans of several nodes: the exchange between ranks, and when the host waits for it.

Ranks exchange messages once per plan, with counts and routes together. The host waits for the sizes that follow from
them. With fixed sizes, on GPUs, it waits only in the first plan of a kind. Later plans are computed on the device alone
and can be captured in a CUDA graph; an error that the device finds in one is raised by the next plan of every rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Backend, Phase, Plan
from deepep_moe.backends.checks import check_limits, check_plan_inputs
from deepep_moe.backends.exchange import Agreement, Exchange
from deepep_moe.backends.headers import HEADER_WORDS, Fact
from deepep_moe.backends.hierarchical_counts import (
    NO_LIMIT,
    Arrived,
    Batch,
    Counts,
    Findings,
    count,
    digest,
    no_batch,
    positions,
    too_many_tokens,
)
from deepep_moe.backends.hierarchical_geometry import SHARES, Crossing, Geometry, Room
from deepep_moe.backends.hierarchical_plan import FIRST_ROUTE, HierarchicalPlan, Way, place
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.backends.rail import Rail
from deepep_moe.backends.tables import Tables
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, PeerError, UnsupportedError


@dataclass(eq=False)
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

    @cached_property
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

    def batch(self, device: torch.device) -> Batch:
        """The same in the dtypes of kernels."""
        in_rank = None
        if self.topk_idx is not None:
            topk_idx = self.topk_idx.to(torch.int64).contiguous()
        else:
            assert self.is_token_in_rank is not None
            in_rank = self.is_token_in_rank
            topk_idx = torch.empty((in_rank.shape[0], 0), dtype=torch.int64, device=device)
        return Batch(topk_idx, self.num_experts, in_rank, self.num_tokens_per_expert, self.max_recv, self.max_rows)


class Moving:
    """Context of the work after an agreement. If it fails on this rank, the operations in which other ranks may wait
    for it are aborted: in its node, its rail and the whole group.

    Args:
        phase: of the calls in the context.
        lines: the exchanges of these groups.
    """

    def __init__(self, phase: Phase, *lines: Exchange | Rail) -> None:
        self._phase, self._lines = phase, lines

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            reason = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
            for line in self._lines:
                line.break_off(self._phase, reason)


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
    exchange: Exchange
    rail: Rail
    engine: Backend
    mover: int
    config: DispatcherConfig
    number: int
    moving: Moving
    defers: bool
    """Whether plans of fixed size make no host wait."""
    agrees_first: bool
    """Whether headers of the size of :meth:`Exchange.agreement` go ahead of messages, whose sizes differ between
    backends. gloo ends the process if ranks send messages of different sizes."""
    _room: Room = field(default_factory=Room)  # in the messages of all ranks
    _most_tokens: int = 0  # of any rank in the plans so far: fixed sizes are made for it
    _known: set[tuple[int, int, int]] = field(default_factory=set)  # kinds of plans of fixed size
    _deferred: dict[int, Deferred] = field(default_factory=dict)  # by the size of what the host reads

    def __post_init__(self) -> None:
        self._most_tokens, self._shared = self.config.max_tokens_per_rank, self.config.shared()

    def plan(self, request: Request, history: int) -> Plan:
        """See :meth:`Backend.plan`. ``history``: of the calls before, which ranks compare."""
        exchange, geometry = self.exchange, self.geometry
        self.raise_deferred()
        exchange.check_usable("plan")
        exchange.count_plan()
        columns = request.kind[1] or geometry.num_ranks  # numbers per token in the messages within a rail
        without_wait = self.defers and request.max_recv is not None
        known = without_wait and all(isinstance(n, Hashable) for n in request.kind) and request.kind in self._known
        known = known and self._room.serves(self._room.experts, self._most_tokens, columns)
        if extension.is_capturing(geometry.device) and not known:
            raise UnsupportedError(
                "a CUDA graph captures only plans of fixed size of a kind (experts, top-k, alignment) that was planned "
                "before: set capacity_factor (num_worst_tokens of Buffer) and max_tokens_per_rank, and run once before"
            )
        if known:
            with exchange.moving("plan"):
                request.check(geometry, self.engine)
                batch = request.batch(geometry.device)
                if batch.topk_idx.shape[0] > self._most_tokens:
                    text = too_many_tokens(geometry.nodes.rank, batch.topk_idx.shape[0], self._most_tokens)
                    raise CapacityError(text)
            with self.moving:
                return self._plan_without_wait(request, batch, self._facts(request, history))
        try:
            request.check(geometry, self.engine)
            batch = request.batch(geometry.device)
            facts = self._facts(request, history)
        except Exception as error:
            self._refuse("plan", error, without_wait)
            raise
        new_size = request.num_experts != self._room.experts  # so messages may differ in size
        if new_size or self.agrees_first:
            self._compare("plan", facts, None)
            self._room = self._room._replace(experts=request.num_experts)
        while True:
            with exchange.moving("plan"):
                tables, arrived = self._exchange_counts(request, batch, facts, NO_LIMIT)
                findings = Findings(geometry, exchange.read("plan", tables.tensor("found")))
            if findings.differ:
                exchange.compare_headers("plan", facts, findings.headers, None)
            most_tokens = max(1, findings.most_tokens)
            room_for = max(most_tokens, self._most_tokens) if without_wait else most_tokens
            if self._room.serves(request.num_experts, room_for, columns):
                break
            self._room = self._room.grown(request.num_experts, room_for, columns)
        findings.raise_problems(self.config, NO_LIMIT, request.num_experts)
        self._most_tokens = max(self._most_tokens, most_tokens)
        with self.moving:
            if without_wait:
                self._known.add(request.kind)
                found = tables.tensor("found")
                if found.shape[0] not in self._deferred:  # now: a capture cannot allocate pinned memory
                    self._deferred[found.shape[0]] = Deferred(found)
                crossing = self._most_crossing()
            else:
                crossing = findings.crossing(most_tokens, exact=self.rail.moves_unused_rows)
            num_recv = findings.num_recv if request.max_recv is None else request.max_recv
            num_rows = findings.num_rows if request.max_rows is None else request.max_rows
            counts = None if request.fixed else findings.expert_rows.clone()
            return self._make(crossing, arrived, tables, request, batch, (num_recv, num_rows), counts, checked=True)

    @contextmanager
    def agreement(self, phase: Phase) -> Iterator[Agreement]:
        """As :meth:`Exchange.agreement`, by messages as large as those of plans: ranks that are in different calls find
        out that they are."""
        self.exchange.check_usable(phase)
        mine = Agreement()
        try:
            yield mine
        except Exception as error:
            self._refuse(phase, error, phase == "plan")
            raise
        except BaseException as error:  # KeyboardInterrupt, or what a signal handler raised
            self.exchange.break_off(phase, repr(error))
            raise
        self._compare(phase, mine.facts, None)

    def _refuse(self, phase: Phase, error: Exception, may_not_wait: bool) -> None:
        """Tell the other ranks, which exchange messages in ``phase``, of the ``error`` that this rank raises.

        ``may_not_wait``: they may make a plan without a host wait, and then take part in no exchange of reasons. So the
        group ends, if there are kinds of such plans.
        """
        if may_not_wait and self._known:
            self.exchange.break_off(phase, f"{type(error).__name__}: {error}")
            return
        with suppress(PeerError):
            self._compare(phase, {}, error)

    def _compare(self, phase: Phase, facts: dict[str, Fact], problem: Exception | None) -> None:
        """Tell all ranks ``facts``, or that this rank has a ``problem``, and raise what is wrong."""
        exchange, geometry = self.exchange, self.geometry
        if exchange.world_size == 1:
            return
        if self.agrees_first:
            exchange.exchange_headers(phase, Agreement(facts), problem)
            return
        header = exchange.header(phase, facts, refused=problem is not None)
        arrived = self._swap(phase, no_batch(geometry, header, self._room))
        headers = exchange.to_host(phase, arrived.summaries(geometry)[:, :HEADER_WORDS].contiguous())
        exchange.compare_headers(phase, facts, headers, problem)

    def _swap(self, phase: Phase, messages: Tensor) -> Arrived:
        swap = self.geometry.swap(messages, self._room)
        self.exchange.transfer(phase, [swap])
        return Arrived(swap.out, self._room)

    def _exchange_counts(
        self, request: Request, batch: Batch, facts: dict[str, Fact], most_tokens: int
    ) -> tuple[Tables, Arrived]:
        """The tables of the plan, as far as they follow from the messages of all ranks, and those messages."""
        geometry, (_, topk, alignment) = self.geometry, request.kind
        tables = Tables(geometry.device)
        messages = count(geometry, batch, self.exchange.header("plan", facts), self._room, tables)
        arrived = self._swap("plan", messages)
        digest(geometry, arrived, tables, has_routes=topk > 0, alignment=alignment, most_tokens=most_tokens)
        return tables, arrived

    def _facts(self, request: Request, history: int) -> dict[str, Fact]:
        num_experts, topk, alignment = request.kind
        return {
            "num_experts": num_experts,
            "top-k": topk,
            "expert alignment": alignment,
            "calls before the plan": history,
            **self._shared,
            "fixed sizes": request.fixed,
        }

    def _plan_without_wait(self, request: Request, batch: Batch, facts: dict[str, Fact]) -> Plan:
        """A plan of fixed size, of a kind that all ranks have made before. Where the device finds that it is an error,
        it drops all tokens and makes the sums NaN, until the next plan raises the error."""
        self._room = self._room._replace(experts=request.num_experts)
        tables, arrived = self._exchange_counts(request, batch, facts, self._most_tokens)
        found = tables.tensor("found")
        self._deferred[found.shape[0]].put(found, facts, request.num_experts)
        assert request.max_recv is not None
        sizes = request.max_recv, request.max_rows or 0
        return self._make(self._most_crossing(), arrived, tables, request, batch, sizes, None, checked=False)

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
                findings = Findings(self.geometry, deferred.take(self.exchange))
                if findings.differ:
                    self.exchange.compare_headers("plan", deferred.facts, findings.headers, None)
                findings.raise_problems(self.config, self._most_tokens, deferred.num_experts)

    def _make(
        self,
        crossing: Crossing,
        arrived: Arrived,
        tables: Tables,
        request: Request,
        batch: Batch,
        sizes: tuple[int, int],
        expert_counts_host: Tensor | None,
        *,
        checked: bool,
    ) -> HierarchicalPlan:
        """A plan of ``sizes`` N and M that the host knows. Makes no host wait.

        ``checked``: the host knows that the plan is no error; otherwise nothing moves where it is one.
        """
        geometry, alignment = self.geometry, request.alignment
        node_plan = self._plan_node(arrived, tables, batch, alignment, crossing.tokens, sizes)
        place(geometry, arrived, tables, node_plan, crossing.tokens, sizes)
        return HierarchicalPlan(
            Way(geometry, crossing, tables, node_plan, checked),
            batch.num_experts,
            alignment,
            (self.number, self.exchange.plans),
            batch.topk_idx,
            sizes,
            self.mover,
            expert_counts_host,
        )

    def _plan_node(
        self, arrived: Arrived, tables: Tables, batch: Batch, alignment: int, room: int, sizes: tuple[int, int]
    ) -> Plan:
        """The node's plan of ``room`` tokens of each rank of the rail. Adds ``recv_position`` to ``tables``."""
        geometry, engine, topk = self.geometry, self.engine, batch.topk_idx.shape[1]
        experts, (num_recv, num_rows) = batch.num_experts // geometry.num_nodes, sizes
        if isinstance(engine, NVLinkBackend):
            engine.reserve(geometry.num_nodes * room, topk)
        if topk:
            routes = self._routes_in_node(arrived, tables, batch, room, sizes)
            return engine.plan(routes, experts, alignment=alignment, max_recv=num_recv, max_rows=num_rows)
        first = geometry.nodes.node * geometry.node_size
        mine = slice(first, first + geometry.node_size)
        in_rank = self._told(arrived, tables, geometry.num_ranks, room, 0)[:, mine] > 0
        counts = Counts(geometry, arrived.summaries(geometry), batch.num_experts, False, alignment)
        of_rail = counts.to_expert[geometry.rail_members].sum(0).view(geometry.num_ranks, -1)
        per_expert = of_rail[geometry.by_node[mine]].reshape(-1).to(torch.int32)
        tables.put(recv_position=self._positions(in_rank.any(1), room))
        return engine.plan(
            None,
            experts,
            alignment=alignment,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            max_recv=num_recv,
            max_rows=num_rows,
        )

    def _routes_in_node(
        self, arrived: Arrived, tables: Tables, batch: Batch, room: int, sizes: tuple[int, int]
    ) -> Tensor:
        """``[N * C, K]`` int64 experts of the node. Adds ``recv_position`` to ``tables``, and memory for :func:`place`
        where kernels run."""
        geometry, topk = self.geometry, batch.topk_idx.shape[1]
        if geometry.kernels is None:
            told = self._told(arrived, tables, topk, room, -1)
            routes = geometry.expert_in_node(told.long(), batch.num_experts)
            tables.put(recv_position=self._positions((routes >= 0).any(1), room))
            return routes
        num_recv, num_rows = sizes
        tables.allocate(
            int64={},
            int32={
                "recv_position": (geometry.num_nodes, room),
                "received": (num_recv, 1 + 2 * topk),
                "row_recv": (num_rows,),
                "arrived": (num_recv, FIRST_ROUTE + topk),
            },
        )
        routes = torch.empty((geometry.num_nodes * room, topk), dtype=torch.int64, device=geometry.device)
        geometry.kernels.batch(
            messages=arrived.words.data_ptr(),
            experts=arrived.room.experts,
            message_room=arrived.room.route_words,
            room=room,
            num_topk=topk,
            routes=routes.data_ptr(),
            **tables.addresses("bad", "recv_position"),
            stream=extension.current_stream(geometry.device),
        )
        return routes

    def _told(self, arrived: Arrived, tables: Tables, columns: int, room: int, nothing: int) -> Tensor:
        """``[N * room, columns]`` int32 from the messages within the rail, by operators; ``nothing`` where
        there is no token."""
        geometry = self.geometry
        told = arrived.told(geometry, columns)[:, :room]
        token = torch.arange(room, dtype=torch.int64, device=geometry.device)
        there = (token < tables.tensor("rail_tokens").unsqueeze(1)) & (tables.tensor("bad") == 0)
        return torch.where(there.unsqueeze(2), told, nothing).view(geometry.num_nodes * room, columns)

    def _positions(self, here: Tensor, room: int) -> Tensor:
        here = here.view(self.geometry.num_nodes, room)
        here[self.geometry.rail_rank].fill_(False)
        return positions(here, 1)


class Deferred:
    """What the host reads of the last plan that made no host wait, on its way to the host. A captured graph writes it
    again whenever it is replayed."""

    def __init__(self, found: Tensor) -> None:
        on_gpu = found.device.type == "cuda"
        self._found = torch.zeros(found.shape, dtype=found.dtype, device="cpu", pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._captured = False
        self.pending = False
        self.facts: dict[str, Fact] = {}
        self.num_experts = 0

    def put(self, found: Tensor, facts: dict[str, Fact], num_experts: int) -> None:
        """``found``: see :func:`digest`."""
        self._found.copy_(found, non_blocking=True)
        self.facts, self.num_experts, self.pending = facts, num_experts, True
        if extension.is_capturing(found.device):
            self._captured = True
        elif self._copied is not None:
            self._copied.record()

    def take(self, exchange: Exchange) -> Tensor:
        """Wait for it. The device has usually made that plan long before the host makes the next one."""
        if self._copied is not None:
            exchange.wait_for("plan", self._copied)
        self.pending = self._captured
        found = self._found.clone()
        self._found.zero_()  # an error is raised once
        return found
