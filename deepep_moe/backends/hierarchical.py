"""Several nodes: a token crosses the network once per node that wants it, then NVLink once per rank.

How one batch travels, with G ranks on each of N nodes:

* :meth:`HierarchicalBackend.plan` tells all ranks a summary of each rank's routes (hierarchical_counts.py), and the
  ranks of a rail all routes of each other. What a rank holds then is a batch for the backend of its node, which plans
  it (hierarchical_plan.py says how rows come into the order of the protocol).
* :meth:`HierarchicalBackend.dispatch` sends a token to the rank of its own place in each node that wants it. While rows
  cross, the backend of the node dispatches the rank's own tokens; then each chunk as it arrives.
* :meth:`HierarchicalBackend.combine` goes back: the sum of a token's rows in each node crosses as one row, and the rows
  of the nodes are summed at home.

The host waits once in a plan, for the summaries. With sizes that are fixed beforehand it waits on GPUs only the first
time; then everything can be captured in a CUDA graph, and what goes wrong is raised by the next call.

Rows of other types than fp32 are rounded once per hop: the sum of a rank, the sum of a node, the result. Sums are fp32,
over the ranks of a node in their order, then over nodes in theirs. FP8 is made once, at the source.

Inside a node runs the nvlink backend, on a CPU the collective one: that composition is the reference.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import (
    Backend,
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
)
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.exchange import Agreement, Exchange, Fact, as_bytes, given_up
from deepep_moe.backends.hierarchical_counts import SHARES, Counts, Crossing, Geometry, summarize, too_many_tokens
from deepep_moe.backends.hierarchical_plan import HierarchicalPlan, Parts, Way, place, positions
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.backends.rail import Blocks, Rail, TorchRail
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, HandleError, InputError, PeerError
from deepep_moe.extension import VECTOR_BYTES
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from deepep_moe.shared import Shared
from deepep_moe.topology import find_nodes, node_groups

_CHUNK_BYTES = 16 << 20


class HierarchicalBackend(Shared):
    """:class:`~deepep_moe.backends.base.Backend` of several nodes with equally many ranks of the group each.

    Args:
        group: the expert-parallel process group, of any members.
        device: where tensors live; on a GPU the nvlink backend serves each node.
        config: ``rail_chunk_bytes`` and what the backend of a node uses apply.
    """

    name = "hierarchical"
    plans_have_extra = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        self.group, self.device, self.config = group, device, config
        self.number = new_backend_number()
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.nodes = find_nodes(group, device, config)
        groups = node_groups(group, self.nodes)
        self._geometry = Geometry(self.nodes, groups, device)
        self._host_geometry = Geometry(self.nodes, groups, torch.device("cpu"))
        self._exchange: Exchange | None = Exchange(group, device, config.timeout_seconds)
        self._node = Exchange(groups.node, device, config.timeout_seconds)
        self.rail: Rail = TorchRail(groups.rail, device, config)
        # What ranks share is compared here, over all nodes.
        engine = NVLinkBackend if device.type == "cuda" else CollectiveBackend
        self.engine: Backend = engine(groups.node, device, replace(config, check_agreement=False))
        self._settings: Mapping[str, Fact] = config.shared()
        self._known: set[tuple[Phase, str]] = set()
        self._history = 0
        self._experts = 0  # of the last plan: all ranks send summaries of so many words
        self._most_tokens = config.max_tokens_per_rank  # of any rank in the plans so far: fixed sizes are made for it
        self._defers = device.type == "cuda"  # plans of fixed size make no host wait
        self._known_plans: set[tuple[int, int, int]] = set()
        self._deferred: _Deferred | None = None

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig | None = None) -> str | None:
        if (reason := given_up(group, device)) is not None:
            return reason
        if config is not None and config.rail == "nvshmem":
            return "rail=nvshmem is not there yet, rail=nccl is"
        nodes = find_nodes(group, device, config or DispatcherConfig())
        if (reason := nodes.why_unequal() or nodes.groups_apart) is not None:
            return f"hierarchical needs nodes of equal size: {reason}"
        groups = node_groups(group, nodes)
        engine = NVLinkBackend if device.type == "cuda" else CollectiveBackend
        reason = engine.supports(groups.node, device) or TorchRail.supports(groups.rail, device)
        return None if reason is None else f"inside the nodes: {reason}"

    @staticmethod
    def why_not_auto(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> str | None:
        """The reason why ``auto`` passes this backend by although it could run. Collective."""
        if device.type != "cuda":
            return "on a CPU collective is the reference"
        nodes = find_nodes(group, device, config)
        if nodes.count == 1:
            return "the group is on one node"
        if nodes.size == 1:
            return "every node has one rank of the group: a token crosses once per rank in any case"
        return None

    @property
    def usable(self) -> bool:
        return self._exchange is not None and self._exchange.usable and self.rail.usable and self.engine.usable

    # -- planning ------------------------------------------------------------------------------------------------

    def destinations(self, topk_idx: Tensor, num_experts: int) -> Destinations:
        self._open()
        check_topk_idx(topk_idx, num_experts, self.world_size, self.device)
        in_rank = self._geometry.in_ranks(topk_idx, num_experts)
        per_node = self._geometry.in_nodes(in_rank)
        routes = topk_idx.reshape(-1).long()
        per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=self.device)
        per_expert.index_add_(
            0,
            torch.where(routes >= 0, routes, num_experts),
            torch.ones(routes.shape, dtype=torch.int32, device=self.device),
        )
        return Destinations(
            num_tokens_per_rank=in_rank.sum(0, dtype=torch.int32),
            num_tokens_per_node=per_node.sum(0, dtype=torch.int32),
            num_tokens_per_expert=per_expert[:-1],
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
        self._check_deferred()
        exchange.count_plan()
        summary = torch.empty(0, dtype=torch.int64, device=self.device)
        words, facts = self._geometry.summary_words(self._experts), (num_experts, 0, alignment)
        without_wait = self._defers and max_recv is not None
        if topk_idx is not None and isinstance(topk_idx, Tensor) and topk_idx.dim() == 2:
            facts = (num_experts, topk_idx.shape[1], alignment)
        known = without_wait and facts in self._known_plans
        with exchange.agreement("plan", compared=not known, words=words) as agreement:
            check_plan_inputs(
                topk_idx,
                num_experts,
                alignment,
                is_token_in_rank,
                num_tokens_per_expert,
                self.world_size,
                self.device,
            )
            check_limits(max_recv, max_rows)
            if isinstance(self.engine, NVLinkBackend):
                self.engine._check_limits(num_experts // self.nodes.count, facts[1])
            if topk_idx is not None:
                topk_idx = topk_idx.to(torch.int64, copy=True)
                in_rank = self._geometry.in_ranks(topk_idx, num_experts)
            else:
                assert is_token_in_rank is not None
                in_rank = is_token_in_rank
                topk_idx = torch.empty((in_rank.shape[0], 0), dtype=torch.int64, device=self.device)
            if known and topk_idx.shape[0] > self._most_tokens:
                raise CapacityError(too_many_tokens(self.rank, topk_idx.shape[0], self._most_tokens))
            summary = summarize(
                self._geometry, topk_idx, num_experts, in_rank, num_tokens_per_expert, max_recv, max_rows
            )
            # Until all ranks are known to have as many experts, their summaries differ in size.
            agreement.private = summary if num_experts == self._experts else summary.new_zeros(words)
            agreement.facts = {
                "num_experts": num_experts,
                "top-k": topk_idx.shape[1],
                "expert alignment": alignment,
                "calls before the plan": self._history,
                **self._settings,
                "fixed sizes": max_recv is not None or max_rows is not None,
            }
        assert topk_idx is not None
        self._history = 0
        if known:
            return self._plan_without_wait(facts, summary, topk_idx, in_rank, max_recv or 0, max_rows)
        if num_experts != self._experts:
            self._experts = num_experts
            with exchange.agreement("plan", words=summary.shape[0]) as agreement:
                agreement.private = summary
        assert agreement.shared is not None and agreement.on_device is not None
        counts = Counts(self._host_geometry, agreement.shared, *facts)
        most_tokens = max(1, int(counts.tokens.max()))
        counts.raise_problems(self.config, most_tokens)
        self._most_tokens = max(self._most_tokens, most_tokens)
        with self._moving("plan"):
            num_recv = int(counts.received[self.rank]) if max_recv is None else max_recv
            num_rows = int(counts.rows[self.rank]) if max_rows is None else max_rows
            if without_wait:  # and from now on
                self._known_plans.add(facts)
                crossing = self._most_crossing()
            else:
                crossing = counts.sizes(most_tokens, exact=self.rail.moves_unused_rows)
            on_device = Counts(self._geometry, agreement.on_device, *facts)
            plan, way = self._plan(crossing, on_device, topk_idx, in_rank, num_recv, num_rows, None)
            if max_recv is None and max_rows is None:
                plan.expert_counts_host = counts.routes.view_as(counts.padded)[self.rank].clone()
            return HierarchicalPlan(plan, way, self.engine.number)

    def _plan_without_wait(
        self,
        facts: tuple[int, int, int],
        summary: Tensor,
        topk_idx: Tensor,
        in_rank: Tensor,
        max_recv: int,
        max_rows: int | None,
    ) -> Plan:
        """A plan of fixed size, of a kind that all ranks have made before. What is wrong with it the device finds out:
        it then drops all tokens and makes the sums NaN, and the next plan of every rank raises the error."""
        exchange = self._open()
        with self._moving("plan"):
            counts = Counts(self._geometry, exchange.tell_all("plan", summary), *facts)
            bad = counts.bad(self._most_tokens).any().to(torch.int32).view(1)
            if self._deferred is None or self._deferred.table.shape != counts.table.shape:
                self._deferred = _Deferred(counts.table)
            self._deferred.put(counts.table, facts)
            crossing = self._most_crossing()
            plan, way = self._plan(crossing, counts, topk_idx, in_rank, max_recv, max_rows or 0, bad)
            return HierarchicalPlan(plan, way, self.engine.number)

    def _most_crossing(self) -> Crossing:
        """What crosses at most by a plan of fixed size."""
        tokens = self._most_tokens
        return Crossing(tokens, (self.nodes.count - 1) * tokens, -(-tokens // SHARES), None, None)

    def _check_deferred(self) -> None:
        """Raise what is wrong with the last plan that made no host wait. All ranks find it in the same call."""
        self.rail.check()
        deferred = self._deferred
        if deferred is None or not deferred.pending or self._capturing():
            return
        table = deferred.take(self._open())
        counts = Counts(self._host_geometry, table, *deferred.facts)
        counts.raise_problems(self.config, self._most_tokens)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _plan(
        self,
        crossing: Crossing,
        counts: Counts,
        topk_idx: Tensor,
        in_rank: Tensor,
        num_recv: int,
        num_rows: int,
        bad: Tensor | None,
    ) -> tuple[TensorPlan, Way]:
        """A plan of sizes that the host knows. Makes no host wait. Where ``bad [1]`` is not 0 nothing moves."""
        geometry, (tokens, topk), room = self._geometry, topk_idx.shape, crossing.tokens
        num_experts, alignment = counts.num_experts, counts.alignment
        in_node = geometry.in_nodes(in_rank)[:, geometry.rail_nodes]
        in_node[:, geometry.rail_rank] = False

        # Over the rail: the routes of all tokens or, without routes, the ranks that want them.
        told = topk_idx if topk else in_rank[:, geometry.by_node]
        block = torch.full((room, told.shape[1]), -1 if topk else 0, dtype=torch.int32, device=self.device)
        block[:tokens] = told
        batch = self.rail.gather("plan", block).view(self.nodes.count * room, told.shape[1])
        experts_in_node = num_experts // self.nodes.count
        limits = {"max_recv": num_recv, "max_rows": num_rows}
        if isinstance(self.engine, NVLinkBackend):
            self.engine._reserve(max(batch.shape[0], self.engine._staging.tokens), topk, 0)
        if topk:
            routes = geometry.expert_in_node(batch.long(), num_experts)
            if bad is not None:
                routes = torch.where(bad > 0, -1, routes)
            here = (routes >= 0).any(1)
            node_plan = self.engine.plan(routes, experts_in_node, alignment=alignment, **limits)
        else:
            mine = slice(self.nodes.node * self.nodes.size, (self.nodes.node + 1) * self.nodes.size)
            in_rank_of_node = batch[:, mine] > (0 if bad is None else bad)
            here = in_rank_of_node.any(1)
            of_rail = counts.to_expert[geometry.rail_members].sum(0).view(self.world_size, -1)
            node_plan = self.engine.plan(
                None,
                experts_in_node,
                alignment=alignment,
                is_token_in_rank=in_rank_of_node,
                num_tokens_per_expert=of_rail[geometry.by_node[mine]].reshape(-1).to(torch.int32),
                **limits,
            )
        here = here.view(self.nodes.count, room)
        here[geometry.rail_rank] = False

        placed = place(geometry, counts, node_plan, room)
        sent, received = counts.crossing()
        position = in_rank.cumsum(0, dtype=torch.int32) - 1
        plan = TensorPlan(
            num_experts=num_experts,
            alignment=alignment,
            identity=(self.number, self._open().plans),
            topk_idx=topk_idx,
            send_slot=torch.where(in_rank, position, -1).to(torch.int32),
            counted=counts.counted(),
            received=placed.received,
            row_recv=placed.row_recv,
            expert_counts_host=None,
        )
        way = Way(
            geometry=geometry,
            crossing=crossing,
            sent=sent,
            received=received,
            rail_tokens=counts.tokens[geometry.rail_members],
            send_position=positions(in_node, 0),
            recv_position=positions(here, 1),
            slots=node_plan.send_slot,
            node_counted=node_plan.counted,
            experts=node_plan.recv_topk_idx,
            arrived=placed.arrived,
            bad=geometry.none_bad if bad is None else bad,
        )
        return plan, way

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        if phase == "plan":
            self._open().count_plan()
        try:
            with self._refusal(phase):
                raise error
        finally:
            del error  # its traceback holds this frame: together they would keep the caller's tensors alive

    def _refusal(self, phase: Phase) -> AbstractContextManager[Agreement]:
        if phase == "plan":
            return self._open().agreement(phase, words=self._geometry.summary_words(self._experts))
        return self._agreement(phase)

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
            self._check_row("x", x, x.dtype if wire is Wire.AS_GIVEN else torch.float8_e4m3fn)
            agreement.facts = {
                **_facts(plan, x, layout, weights, backward),
                "wire": wire,
                "scale columns": 0 if scales is None else scales.shape[1],
                "dtype of scales": torch.float32 if scales is None else scales.dtype,
            }
        with self._moving("dispatch"):
            return self._dispatch(self._own(plan), x.detach(), layout, wire, scales, weights)

    def _dispatch(
        self,
        plan: HierarchicalPlan,
        x: Tensor,
        layout: Layout,
        wire: Wire,
        scales: Tensor | None,
        weights: Tensor | None,
    ) -> Rows:
        sent, sent_scales = (x, scales) if wire is Wire.AS_GIVEN else quantize_e4m3(x)
        form = _Form.of(sent, sent_scales, weights)
        parts = plan.parts(layout, self._num_chunks(plan, form.pitch))
        packed, arriving = self.rail.buffers(_total(parts.send), _total(parts.recv), form.pitch)
        token, rank = (parts.send_rows >= 0).nonzero(as_tuple=True)
        packed[parts.send_rows[token, rank].long()] = form.pack(sent, sent_scales, weights)[token]
        chunks = _chunks(packed, parts.send), _chunks(arriving, parts.recv), parts.send, parts.recv
        finish = [
            self.rail.start("dispatch", *move, chunk, len(parts.crossing)) for chunk, move in enumerate(zip(*chunks))
        ]

        by_expert = layout is Layout.BY_EXPERT
        # BF16 that travels as e4m3 is the same e4m3 again after it was BF16 in between, so the node can do both.
        through = by_expert and wire is Wire.E4M3_TO_BF16

        def inside(part: Plan, rows: Rows, made: Rows | None) -> Rows:
            x, scales, weights = rows
            if not by_expert:
                beside = _beside(scales, weights)
                return self.engine.dispatch(part, x, layout=Layout.BY_EXPERT, scales=beside, into=made)
            if through:
                return self.engine.dispatch(part, x, layout=layout, wire=wire, weights=weights, into=made)
            return self.engine.dispatch(part, x, layout=layout, scales=scales, weights=weights, into=made)

        made = inside(parts.own, Rows(x, None, weights) if through else Rows(sent, sent_scales, weights), None)
        for part, came, wait in zip(parts.crossing, chunks[1], finish):
            wait()
            rows = form.unpack(came)
            if through:
                assert rows.scales is not None
                rows = Rows(dequantize_e4m3(rows.x, rows.scales, torch.bfloat16), None, rows.weights)
            made = inside(part, rows, made)
        if by_expert:
            return made
        # Scales and weights came beside the rows, in one.
        rows = made.x
        out_scales, out_weights = _apart(made.scales, sent_scales, weights)
        if out_weights is not None:
            out_weights = torch.where(plan.recv_topk_idx >= 0, out_weights, 0.0)
        if wire is Wire.E4M3_TO_BF16:
            assert out_scales is not None
            rows, out_scales = dequantize_e4m3(rows, out_scales, torch.bfloat16), None
        return Rows(rows, out_scales, out_weights)

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
        with self._agreement("combine") as agreement:
            check_combine(self, plan, x, layout=layout, weights=weights, apply_weights=apply_weights, bias=bias)
            self._check_row("x", x, x.dtype)
            agreement.facts = {**_facts(plan, x, layout, weights, backward), "weights multiplied": apply_weights}
        with self._moving("combine"):
            return self._combine(self._own(plan), x.detach(), layout, weights, apply_weights, bias)

    def _combine(
        self,
        plan: HierarchicalPlan,
        x: Tensor,
        layout: Layout,
        weights: Tensor | None,
        apply_weights: bool,
        bias: tuple[Tensor, ...],
    ) -> Tokens:
        form = _Form(x.dtype, x.shape[1], 0, plan.num_topk if weights is not None and not apply_weights else 0)
        parts, home = plan.parts(layout, self._num_chunks(plan, form.pitch)), plan.way.crossing.tokens
        sums, back = self.rail.buffers(_total(parts.recv), home + _total(parts.send), form.pitch)
        chunks = _chunks(sums, parts.recv), _chunks(back[home:], parts.send), parts.recv, parts.send
        finish = []
        for chunk, (part, (sent, received, *blocks)) in enumerate(zip(parts.crossing, zip(*chunks))):
            of_node = self._combine_inside(part, x, layout, weights, apply_weights)  # what must cross goes first
            sent.copy_(form.pack(of_node.x, None, of_node.weights))
            finish.append(self.rail.start("combine", sent, received, *blocks, chunk, len(parts.crossing)))
        own = self._combine_inside(parts.own, x, layout, weights, apply_weights)
        back[: plan.num_tokens] = form.pack(own.x, None, own.weights)
        for wait in finish:
            wait()
        rows = form.unpack(back)
        tokens = self._sum_nodes(plan, rows.x, parts, bias)
        return Tokens(tokens, None if rows.weights is None else self._sum_nodes(plan, rows.weights, parts, ()))

    def _combine_inside(
        self, part: Plan, x: Tensor, layout: Layout, weights: Tensor | None, apply_weights: bool
    ) -> Tokens:
        """Sums over the ranks of the node, at the ranks that hold the batch."""
        if layout is Layout.BY_EXPERT:
            return self.engine.combine(part, x, layout=Layout.BY_EXPERT, weights=weights, apply_weights=apply_weights)
        tokens = self.engine.combine(part, x, layout=Layout.BY_EXPERT).x
        if weights is None:
            return Tokens(tokens, None)
        # To the engine a row of the rank layout has one route: its weights are rows of their own.
        topk = weights.shape[1]
        filled = torch.nn.functional.pad(weights, (0, -topk % (VECTOR_BYTES // weights.element_size())))
        return Tokens(tokens, self.engine.combine(part, filled, layout=Layout.BY_EXPERT).x[:, :topk].contiguous())

    def _sum_nodes(self, plan: HierarchicalPlan, rows: Tensor, parts: Parts, bias: tuple[Tensor, ...]) -> Tensor:
        """At home: the sum of this node and those that came back, in the order of the nodes."""
        total = torch.zeros((plan.num_tokens, rows.shape[1]), dtype=torch.float32, device=self.device)
        for index in parts.home_rows.unbind(1):
            total += torch.where((index >= 0).unsqueeze(1), rows[index.clamp(min=0)].float(), 0.0)
        for added in bias:
            total += added.detach().float()
        if not plan.way.crossing.exact:
            total += torch.where(plan.way.bad > 0, torch.nan, 0.0)
        return total.to(rows.dtype)

    def _num_chunks(self, plan: HierarchicalPlan, row_bytes: int) -> int:
        """A power of two, equal on all ranks: it follows from what they agreed on."""
        limit = self.config.rail_chunk_bytes or (_CHUNK_BYTES if self.device.type == "cuda" else 0)
        num_bytes, chunks = plan.way.crossing.most * row_bytes, 1
        while limit and chunks < SHARES and chunks * limit < num_bytes:
            chunks *= 2
        return chunks

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self._check_deferred()
        self.engine.check()

    def close(self) -> None:
        if self._exchange is not None:
            self.engine.close()
            self.rail.close()
        self._exchange = None

    def _open(self) -> Exchange:
        if self._exchange is None:
            raise HandleError("this backend was closed; make a new dispatcher or Buffer")
        return self._exchange

    def _own(self, plan: Plan) -> HierarchicalPlan:
        if isinstance(plan, HierarchicalPlan):
            return plan
        assert plan.extra is not None  # it went through operators
        return HierarchicalPlan(plan, Way.unpack(self._geometry, plan.extra, plan.num_tokens), self.engine.number)

    def _check_row(self, argument: str, x: Tensor, dtype: torch.dtype) -> None:
        """What the nvlink backend asks of rows, before anything moves."""
        row_bytes = x.shape[1] * dtype.itemsize
        if self.device.type == "cuda" and row_bytes % VECTOR_BYTES:
            raise InputError(
                argument,
                f"shape {tuple(x.shape)} as {dtype}",
                f"a row of {row_bytes} bytes must be a multiple of {VECTOR_BYTES} bytes on GPUs",
            )

    @contextmanager
    def _agreement(self, phase: Phase) -> Iterator[Agreement]:
        """What ranks must share in a call.

        On a GPU the host would have to wait for the answer, so it is asked for a format that this rank has not used
        before; of the other calls all ranks compare a checksum when they make their next plan.
        """
        exchange = self._open()
        if self.device.type == "cpu":
            with exchange.agreement(phase) as agreement:
                yield agreement
            return
        mine = Agreement()
        try:
            yield mine
        except Exception:
            agreed_before = any(known[0] == phase for known in self._known)
            with exchange.moving(phase) if agreed_before else exchange.agreement(phase):
                raise
        formats = (phase, str({name: value for name, value in mine.facts.items() if name != "plan"}))
        if self.config.check_agreement and formats not in self._known:
            with exchange.agreement(phase) as agreement:
                agreement.facts = mine.facts
            self._known.add(formats)
        self._history = zlib.crc32(f"{formats}{mine.facts['plan']}".encode(), self._history)

    @contextmanager
    def _moving(self, phase: Phase) -> Iterator[None]:
        """Wrap what follows an agreement: whoever waits for this rank, in its node, its rail or the group, is told when
        it fails."""
        try:
            yield
        except Exception as error:
            reason = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
            self._open().break_off(phase, reason)
            self.rail.break_off(phase, reason)
            self._node.break_off(phase, reason)
            raise


def _facts(plan: Plan, x: Tensor, layout: Layout, weights: Tensor | None, backward: Backward) -> dict[str, Fact]:
    """What ranks must share in both directions, by the names that users know."""
    return {
        "plan": plan.number,
        "hidden size": x.shape[1],
        "dtype": x.dtype,
        "layout": layout,
        "weights": weights is not None,
        "backward": backward,
    }


def _beside(scales: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """What travels beside rows: ``[T, S + K]`` int32, bits of scales and weights."""
    parts = [part.detach().contiguous().view(torch.int32) for part in (scales, weights) if part is not None]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None


def _apart(beside: Tensor | None, scales: Tensor | None, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Inverse of :func:`_beside`, for rows of the same kind as those that ``scales`` and ``weights`` were given for."""
    if beside is None:
        return None, None
    count = 0 if scales is None else scales.shape[1]
    return (
        None if scales is None else beside[:, :count].view(scales.dtype),
        None if weights is None else beside[:, count:].view(torch.float32),
    )


class _Deferred:
    """The summaries of the last plan that made no host wait, on their way to the host."""

    def __init__(self, table: Tensor) -> None:
        self.table = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=table.device.type == "cuda")
        self._copied = torch.cuda.Event() if table.device.type == "cuda" else None
        self.pending = False
        self.facts = (0, 0, 0)

    def put(self, table: Tensor, facts: tuple[int, int, int]) -> None:
        """``facts``: experts, top-k and alignment of the plan."""
        self.table.copy_(table, non_blocking=True)
        self.facts, self.pending = facts, True
        if self._copied is not None and not torch.cuda.is_current_stream_capturing():
            self._copied.record()

    def take(self, exchange: Exchange) -> Tensor:
        """Wait for them: the device has made that plan by the time that the host makes the next one."""
        self.pending = False
        if self._copied is not None:
            exchange.wait_for("plan", self._copied)
        return self.table


class _Form(NamedTuple):
    """What a row in flight holds: channels, scales of 4 bytes, fp32 weights; padded to a multiple of 16 bytes."""

    dtype: torch.dtype
    hidden: int
    num_scales: int
    num_weights: int
    scale_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, x: Tensor, scales: Tensor | None, weights: Tensor | None) -> _Form:
        num_weights = 0 if weights is None else weights.shape[1]
        if scales is None:
            return cls(x.dtype, x.shape[1], 0, num_weights)
        return cls(x.dtype, x.shape[1], scales.shape[1], num_weights, scales.dtype)

    @property
    def row_bytes(self) -> int:
        return -(-self.hidden * self.dtype.itemsize // VECTOR_BYTES) * VECTOR_BYTES

    @property
    def pitch(self) -> int:
        return -(-(self.row_bytes + 4 * (self.num_scales + self.num_weights)) // VECTOR_BYTES) * VECTOR_BYTES

    def pack(self, x: Tensor, scales: Tensor | None, weights: Tensor | None) -> Tensor:
        packed = torch.zeros((x.shape[0], self.pitch), dtype=torch.uint8, device=x.device)
        first = self.row_bytes
        packed[:, : self.hidden * self.dtype.itemsize] = as_bytes(x)
        for part in (scales, weights):
            if part is not None:
                packed[:, first : first + 4 * part.shape[1]] = as_bytes(part)
                first += 4 * part.shape[1]
        return packed

    def unpack(self, rows: Tensor) -> Rows:
        """Views of packed rows."""
        first, scales, weights = self.row_bytes, None, None
        x = rows[:, : self.hidden * self.dtype.itemsize].view(self.dtype)
        if self.num_scales:
            scales = rows[:, first : first + 4 * self.num_scales].view(self.scale_dtype)
            first += 4 * self.num_scales
        if self.num_weights:
            weights = rows[:, first : first + 4 * self.num_weights].view(torch.float32)
        return Rows(x, scales, weights)


def _total(blocks: list[Blocks]) -> int:
    return sum(sum(block.sizes) for block in blocks)


def _chunks(rows: Tensor, blocks: list[Blocks]) -> tuple[Tensor, ...]:
    return rows.split([sum(block.sizes) for block in blocks])
