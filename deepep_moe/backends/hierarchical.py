"""Several nodes: a token crosses the network once per node that wants it, then NVLink once per rank.

How one batch travels, with G ranks on each of N nodes:

* :meth:`HierarchicalBackend.plan` exchanges counts and what ranks must agree on over the whole group, then the routes
  of the tokens that cross, over the rails. What a rank holds then is a batch for the engine of its node, which plans it
  (hierarchical_plan.py says how rows come into the order of the protocol).
* :meth:`HierarchicalBackend.dispatch` sends a token to the rank of its own place in each node that wants it. While rows
  cross, the engine dispatches the rank's own tokens; then each chunk as it arrives.
* :meth:`HierarchicalBackend.combine` goes back: the engine sums a token's rows in each node, that one row crosses, and
  the rows of the nodes are summed at home.

Rows of other types than fp32 are rounded once per hop: the sum of a rank, the sum of a node, the result. Sums are fp32,
over the ranks of a node in their order, then over nodes in theirs. FP8 is made once, at the source.

Inside a node the engine is the nvlink backend, on a CPU the collective one: that composition is the reference.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

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
    overflow_text,
)
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.exchange import Agreement, Exchange, Fact, given_up
from deepep_moe.backends.hierarchical_batch import TO_NODE, Batches
from deepep_moe.backends.hierarchical_plan import (
    Chunk,
    Geometry,
    HierarchicalPlan,
    Way,
    place,
)
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.backends.rail import Rail, TorchRail
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, HandleError, InputError, PeerError, UnsupportedError
from deepep_moe.extension import VECTOR_BYTES
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from deepep_moe.shared import Shared
from deepep_moe.topology import find_nodes, node_groups

_CHUNK_BYTES = 16 << 20
_MOST_CHUNKS = 8


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
        self._exchange: Exchange | None = Exchange(group, device, config.timeout_seconds)
        self._node = Exchange(groups.node, device, config.timeout_seconds)
        self.rail: Rail = TorchRail(groups.rail, device, config)
        # What ranks share is compared here, over all nodes.
        engine = NVLinkBackend if device.type == "cuda" else CollectiveBackend
        self.engine: Backend = engine(groups.node, device, replace(config, check_agreement=False))
        self._batches = Batches(self._geometry, self._exchange, self.rail, self.engine)
        self._settings: Mapping[str, Fact] = config.shared()
        self._known: set[tuple[Phase, str]] = set()
        self._history = 0

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
        in_rank = self._tokens_in_ranks(topk_idx, num_experts)
        per_node = in_rank[:, self._geometry.by_node].view(-1, self.nodes.count, self.nodes.size).any(2)
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
        self._refuse_capture()
        exchange.count_plan()
        fixed = max_recv is not None or max_rows is not None
        with exchange.agreement("plan") as agreement:
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
                topk = 0 if topk_idx is None else topk_idx.shape[1]
                self.engine._check_limits(num_experts // self.nodes.count, topk)
            if topk_idx is not None:
                topk_idx = topk_idx.to(torch.int64, copy=True)
                in_rank = self._tokens_in_ranks(topk_idx, num_experts)
            else:
                assert is_token_in_rank is not None
                in_rank = is_token_in_rank
                topk_idx = torch.empty((in_rank.shape[0], 0), dtype=torch.int64, device=self.device)
            in_node = self._geometry.in_nodes(in_rank)
            agreement.private = self._batches.private(topk_idx, num_experts, in_rank, in_node)
            agreement.facts = {
                "num_experts": num_experts,
                "top-k": topk_idx.shape[1],
                "expert alignment": alignment,
                "calls before the plan": self._history,
                **self._settings,
                "fixed sizes": fixed,
            }
        shared = agreement.shared
        assert shared is not None and topk_idx is not None
        self._history = 0
        with self._moving("plan"):
            crossing = self._batches.crossing(shared >> TO_NODE, in_node)
            node_plan, facts = self._batches.plan(
                crossing, topk_idx, num_experts, alignment, in_rank, num_tokens_per_expert
            )
        if fixed:  # only sizes that were fixed beforehand can be too small
            with exchange.agreement("plan"):
                self._check_room(node_plan.num_recv, "received tokens", "max_recv", max_recv)
                self._check_room(node_plan.num_rows, "expert rows", "max_rows", max_rows)
        with self._moving("plan"):
            placed = place(self._geometry, node_plan, facts, alignment, max_recv, max_rows)
            prefix = (shared & ((1 << TO_NODE) - 1)).cumsum(0).to(self.device).reshape(-1)
            position = in_rank.cumsum(0, dtype=torch.int32) - 1
            plan = TensorPlan(
                num_experts=num_experts,
                alignment=alignment,
                identity=(self.number, exchange.plans),
                topk_idx=topk_idx,
                send_slot=torch.where(in_rank, position, -1).to(torch.int32),
                counted=torch.cat([prefix, placed.expert_counts, placed.expert_offsets]),
                received=placed.received,
                row_recv=placed.row_recv,
                expert_counts_host=None if fixed else node_plan.expert_counts_host,
            )
            way = Way.pack(self._geometry, crossing, node_plan, placed.arrived)
            return HierarchicalPlan(plan, way, self.engine.number)

    def _tokens_in_ranks(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        owner = torch.div(topk_idx, num_experts // self.world_size, rounding_mode="floor")  # -1 stays negative
        ranks = torch.arange(self.world_size, dtype=owner.dtype, device=self.device)
        return (owner.unsqueeze(-1) == ranks).any(1)

    def _check_room(self, needed: int, what: str, setting: str, limit: int | None) -> None:
        if limit is not None and needed > limit:
            raise CapacityError(overflow_text(self.config, self.rank, needed, what, setting, limit))

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        if phase == "plan":
            self._open().count_plan()
        try:
            with self._open().agreement(phase) if phase == "plan" else self._agreement(phase):
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
        beside = _beside(sent_scales, weights)
        count = self._num_chunks(plan, _row_bytes(sent) + (0 if beside is None else _row_bytes(beside)))
        chunks = plan.chunks(count)
        crossing = [
            [
                self.rail.start("dispatch", _select(part, chunk.tokens), chunk.sent, chunk.received, number, count)
                for part in (sent, beside)
                if part is not None
            ]
            for number, chunk in enumerate(chunks)
        ]
        own, *parts = plan.parts(layout, count)  # made while rows cross

        by_expert = layout is Layout.BY_EXPERT
        # BF16 that travels as e4m3 is the same e4m3 again after it was BF16 in between, so the engine can do both.
        through = by_expert and wire is Wire.E4M3_TO_BF16

        def inside(part: Plan, rows: Tensor, beside: Tensor | None, made: Rows | None) -> Rows:
            if not by_expert:
                return self.engine.dispatch(part, rows, layout=Layout.BY_EXPERT, scales=beside, into=made)
            part_scales, part_weights = _apart(beside, sent_scales, weights)
            if through:
                return self.engine.dispatch(part, rows, layout=layout, wire=wire, weights=part_weights, into=made)
            return self.engine.dispatch(part, rows, layout=layout, scales=part_scales, weights=part_weights, into=made)

        made = inside(own, x if through else sent, beside, None)
        for part, transfers in zip(parts, crossing):
            rows, *others = (finish() for finish in transfers)
            came = others[0] if others else None
            if through:
                came_scales, _ = _apart(came, sent_scales, weights)
                assert came_scales is not None
                rows = dequantize_e4m3(rows, came_scales, torch.bfloat16)
            made = inside(part, rows, came, made)
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
        count = self._num_chunks(plan, _row_bytes(x))
        chunks = plan.chunks(count)
        own, *parts = plan.parts(layout, count)
        crossing: list[list[Callable[[], Tensor]]] = []
        for number, (chunk, part) in enumerate(zip(chunks, parts)):  # what must cross goes first
            sums = self._combine_inside(part, x, layout, weights, apply_weights)
            crossing.append(
                [
                    self.rail.start("combine", rows, chunk.received, chunk.sent, number, count)
                    for rows in (sums.x, sums.weights)
                    if rows is not None
                ]
            )
        sums = self._combine_inside(own, x, layout, weights, apply_weights)
        back = [[finish() for finish in transfers] for transfers in crossing]
        tokens = self._sum_nodes(sums.x, chunks, [rows[0] for rows in back], bias)
        if sums.weights is None:
            return Tokens(tokens, None)
        return Tokens(tokens, self._sum_nodes(sums.weights, chunks, [rows[1] for rows in back], ()))

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

    def _sum_nodes(self, own: Tensor, chunks: list[Chunk], back: list[Tensor], bias: tuple[Tensor, ...]) -> Tensor:
        """At home: the sum of this node, and those that came back, in the order of the nodes."""
        if self.nodes.count == 1 and not bias:
            return own
        total = torch.zeros(own.shape, dtype=torch.float32, device=self.device)
        for node in range(self.nodes.count):
            if node == self.nodes.node:
                total += own.float()
                continue
            number = self._geometry.rail_nodes.index(node)
            for chunk, rows in zip(chunks, back):
                first = sum(chunk.sent.sizes[:number])
                share = slice(first, first + chunk.sent.sizes[number])
                # A token appears once per node: the order of the sum is the loop's.
                total.index_add_(0, chunk.tokens[share], rows[share].float())
        for added in bias:
            total += added.detach().float()
        return total.to(own.dtype)

    def _num_chunks(self, plan: HierarchicalPlan, row_bytes: int) -> int:
        """Equal on all ranks: it follows from what they agreed on."""
        limit = self.config.rail_chunk_bytes or (_CHUNK_BYTES if self.device.type == "cuda" else 0)
        if not limit:
            return 1
        return max(1, min(_MOST_CHUNKS, -(-plan.way.crossing.most * row_bytes // limit)))

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.engine.check()

    def close(self) -> None:
        if self._exchange is not None:
            self.engine.close()
        self._exchange = None

    def _open(self) -> Exchange:
        if self._exchange is None:
            raise HandleError("this backend was closed; make a new dispatcher or Buffer")
        return self._exchange

    def _own(self, plan: Plan) -> HierarchicalPlan:
        if isinstance(plan, HierarchicalPlan):
            return plan
        assert plan.extra is not None  # it went through operators
        return HierarchicalPlan(plan, Way(self._geometry, plan.extra), self.engine.number)

    def _refuse_capture(self) -> None:
        """All ranks capture or none: nothing is exchanged."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"the {self.rail.name} transport between nodes needs the host to know the counts, so a plan cannot be "
                "captured in a CUDA graph: make the plan before the capture, or use one node (nvlink)"
            )

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


def _select(rows: Tensor, index: Tensor) -> Tensor:
    if rows.dtype is torch.float8_e4m3fn:
        return rows.view(torch.uint8).index_select(0, index).view(rows.dtype)
    return rows.index_select(0, index)


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()
