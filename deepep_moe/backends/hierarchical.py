"""The backend over several nodes: a token crosses the network once per destination node, then NVLink once per rank.

With G ranks on each of N nodes:

* :meth:`HierarchicalBackend.plan` exchanges a summary of each rank's routes among all ranks, and all routes among the
  ranks of a rail (hierarchical_counts.py). The backend of the node then plans the tokens that these ranks send to the
  node (hierarchical_plan.py).
* :meth:`HierarchicalBackend.dispatch` sends a token over its rail to each node that has one of its experts. While rows
  cross, the backend of the node dispatches the rank's own tokens, then each chunk as it arrives.
* :meth:`HierarchicalBackend.combine` reverses this: each node sends the sum of its rows for a token back as one row,
  and the token's own rank sums the rows of the nodes.

A plan has one host wait, for the summaries. With fixed sizes, on GPUs, only the first plan of a kind has one; later
plans can be captured in a CUDA graph, and their errors are raised by the next call.

Sums are fp32, over the ranks of a node in their order, then over nodes in theirs. Rows of other types are rounded once
per hop: after the sum of a rank, of a node, and of all nodes. Rows are converted to FP8 once, at the source.

Inside a node runs the nvlink backend; on CPUs the collective backend, and that composition is the reference.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
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
from deepep_moe.backends.checks import check_combine, check_dispatch, check_topk_idx
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.exchange import Exchange, given_up
from deepep_moe.backends.headers import HEADER_WORDS, Fact
from deepep_moe.backends.hierarchical_geometry import SHARES, Geometry
from deepep_moe.backends.hierarchical_parts import Parts
from deepep_moe.backends.hierarchical_plan import HierarchicalPlan, Way
from deepep_moe.backends.hierarchical_planner import Moving, Planner, Request
from deepep_moe.backends.local import RowFormat, expand_rows, pack_rows, sum_packed_rows
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.backends.rail import Blocks, Rail, TorchRail
from deepep_moe.backends.rail_nvshmem import NvshmemRail
from deepep_moe.backends.rollcall import GRACE_SECONDS
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import HandleError, InputError
from deepep_moe.extension import VECTOR_BYTES
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from deepep_moe.shared import Shared
from deepep_moe.topology import find_nodes, node_groups

_CHUNK_BYTES = 32 << 20  # at 50 GB/s this takes 0.7 ms, more than the host needs to start a chunk (0.25 ms on an H100)


class HierarchicalBackend(Shared):
    """:class:`~deepep_moe.backends.base.Backend` of several nodes with equally many ranks of the group each.

    Args:
        group: the expert-parallel process group, of any members.
        device: where tensors live; on a GPU the nvlink backend serves each node.
        config: ``rail_chunk_bytes`` and what the backend of a node uses apply.
    """

    name = "hierarchical"
    plans_have_extra = True
    ignores: tuple[str, ...] = ()

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        self.group, self.device, self.config = group, device, config
        self.number = new_backend_number()
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.nodes = find_nodes(group, device, config)
        groups = node_groups(group, self.nodes)
        self._geometry = Geometry(self.nodes, groups, device)
        # A rank that fails in its node first looks for those of its node, and only then writes a note for all.
        grace_seconds = 2.5 * GRACE_SECONDS
        self._exchange: Exchange | None = Exchange(group, device, config.timeout_seconds, grace_seconds)
        self._node = Exchange(groups.node, device, config.timeout_seconds)
        by_nvshmem = config.rail == NvshmemRail.name
        self.rail: Rail = (
            NvshmemRail(groups.rail, device, config, group) if by_nvshmem else TorchRail(groups.rail, device, config)
        )
        # What ranks share is compared here, over all nodes.
        engine = NVLinkBackend if device.type == "cuda" else CollectiveBackend
        inside = replace(config, check_agreement=False)
        self.engine: Backend = engine(groups.node, device, inside)
        """Moves rows inside the node. Another one plans: it holds places for the batch of a node, which is larger than
        what moves at once, and so it never needs memory for rows."""
        self._plan_engine: Backend = engine(groups.node, device, inside)
        for one in (self.engine, self._plan_engine):
            if isinstance(one, NVLinkBackend):
                one.checks_arguments = False  # this backend does
        self._formats: dict[tuple[object, ...], bytes] = {}
        """Phase and facts of calls, and the same as text."""
        self._known: set[tuple[object, ...]] = set()
        """Those that all ranks have compared."""
        self._history = 0
        lines = (self._exchange, self.rail, self._node)
        self._moving: dict[Phase, Moving] = {phase: Moving(phase, *lines) for phase in ("plan", "dispatch", "combine")}
        self._planner = Planner(
            self._geometry,
            self._exchange,
            self.rail,
            self._plan_engine,
            self.engine.number,
            config,
            self.number,
            self._moving["plan"],
            defers=device.type == "cuda",
            agrees_first=device.type == "cpu",
        )

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig | None = None) -> str | None:
        if (reason := given_up(group, device)) is not None:
            return reason
        nodes = find_nodes(group, device, config or DispatcherConfig())
        if (reason := nodes.why_unequal() or nodes.groups_apart) is not None:
            return f"hierarchical needs nodes of equal size: {reason}"
        groups = node_groups(group, nodes)
        engine = NVLinkBackend if device.type == "cuda" else CollectiveBackend
        reason = engine.supports(groups.node, device) or TorchRail.supports(groups.rail, device)
        if reason is not None:
            return f"inside the nodes: {reason}"
        if config is not None and config.rail == NvshmemRail.name and (missing := NvshmemRail.supports(device)):
            return f"rail=nvshmem cannot run here (rail=nccl can): {missing}"
        return None

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
        engines = self._plan_engine.usable and self.engine.usable
        return self._exchange is not None and self._exchange.usable and self.rail.usable and engines

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
        self._open()
        self.rail.check()
        history, self._history = self._history, 0
        request = Request(topk_idx, num_experts, alignment, is_token_in_rank, num_tokens_per_expert, max_recv, max_rows)
        return self._planner.plan(request, history)

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        exchange = self._open()
        if phase == "plan":
            exchange.count_plan()
        try:
            with self._refusing(phase):
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
        def check() -> dict[str, Fact]:
            check_dispatch(self, plan, x, layout=layout, wire=wire, scales=scales, weights=weights)
            self._check_row("x", x, x.dtype if wire is Wire.AS_GIVEN else torch.float8_e4m3fn)
            return {
                **_facts(plan, x, layout, weights, backward),
                "wire": wire,
                "scale columns": 0 if scales is None else scales.shape[1],
                "dtype of scales": torch.float32 if scales is None else scales.dtype,
            }

        self._agree("dispatch", check)
        with self._moving["dispatch"]:
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
        by_expert, quantize = layout is Layout.BY_EXPERT, wire is not Wire.AS_GIVEN
        format = RowFormat.of(x, scales, weights, quantize=quantize)
        parts = self._parts(plan, layout, format.pitch)
        packed, arriving = self.rail.buffers(parts.num_sent, parts.num_received, format.pitch)
        pack_rows(x, parts.send_rows, packed, format, scales=scales, weights=weights)
        chunks = list(zip(_chunks(packed, parts.send), _chunks(arriving, parts.recv), parts.send, parts.recv))
        finish = [self.rail.start("dispatch", *move, number, len(chunks)) for number, move in enumerate(chunks)]

        def inside(part: Plan, rows: Rows, wire: Wire, made: Rows | None) -> Rows:
            x, scales, weights = rows
            if not by_expert:
                scales, weights = _beside(scales, weights), None
            return self.engine.dispatch(
                part, x, layout=Layout.BY_EXPERT, wire=wire, scales=scales, weights=weights, into=made
            )

        # BF16 that crosses as e4m3 is the same e4m3 again after it was BF16 in between: the node's backend gets BF16.
        through = by_expert and wire is Wire.E4M3_TO_BF16
        if quantize and not by_expert:
            x, scales = quantize_e4m3(x)
        made = inside(parts.own, Rows(x, scales, weights), wire if by_expert else Wire.AS_GIVEN, None)
        for part, (_, came, *_), wait in zip(parts.crossing, chunks, finish):
            wait()
            rows = _dequantized(came, format) if through else views(came, format)
            made = inside(part, rows, wire if through else Wire.AS_GIVEN, made)
        if by_expert:
            return made
        # Scales and weights came beside the rows, in one.
        x, (out_scales, out_weights) = made.x, _apart(made.scales, scales, weights)
        if out_weights is not None:
            out_weights = torch.where(plan.recv_topk_idx >= 0, out_weights, 0.0)
        if wire is Wire.E4M3_TO_BF16:
            assert out_scales is not None
            x, out_scales = dequantize_e4m3(x, out_scales, torch.bfloat16), None
        return Rows(x, out_scales, out_weights)

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
        def check() -> dict[str, Fact]:
            check_combine(self, plan, x, layout=layout, weights=weights, apply_weights=apply_weights, bias=bias)
            self._check_row("x", x, x.dtype)
            return {**_facts(plan, x, layout, weights, backward), "weights multiplied": apply_weights}

        self._agree("combine", check)
        with self._moving["combine"]:
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
        carry = weights is not None and not apply_weights
        format = RowFormat(x.dtype, x.shape[1], num_weights=plan.num_topk if carry else 0)
        parts, home = self._parts(plan, layout, format.pitch), plan.way.crossing.tokens
        packed, back = self.rail.buffers(parts.num_received, home + parts.num_sent, format.pitch)
        chunks = list(zip(_chunks(packed, parts.recv), _chunks(back[home:], parts.send), parts.recv, parts.send))
        finish = []
        for number, (part, move) in enumerate(zip(parts.crossing, chunks)):  # what must cross goes first
            self._combine_inside(part, x, layout, weights, apply_weights, views(move[0], format))
            finish.append(self.rail.start("combine", *move, number, len(chunks)))
        own = views(back[: plan.num_tokens], format)
        self._combine_inside(parts.own, x, layout, weights, apply_weights, own)
        for wait in finish:
            wait()
        headers = None
        if not plan.way.checked:  # headers that differ make the sums NaN
            bad = torch.cat([self._geometry.none_bad, plan.way.tables.tensor("bad")])
            headers = bad.long().unsqueeze(1).repeat(1, HEADER_WORDS)
        return Tokens(*sum_packed_rows(back, parts.home_rows, format, bias=bias, headers=headers))

    def _combine_inside(
        self, part: Plan, x: Tensor, layout: Layout, weights: Tensor | None, apply_weights: bool, out: Rows
    ) -> None:
        """Sums over the ranks of the node, at the ranks that hold the batch."""
        into = Tokens(out.x, out.weights)
        if layout is Layout.BY_EXPERT:
            if isinstance(self.engine, NVLinkBackend):
                self.engine.combine(part, x, layout=layout, weights=weights, apply_weights=apply_weights, into=into)
                return
            sums = self.engine.combine(part, x, layout=layout, weights=weights, apply_weights=apply_weights)
        else:
            sums = self.engine.combine(part, x, layout=Layout.BY_EXPERT)
            if weights is not None:
                # To the node's backend a row of the rank layout has one route: its weights are rows of their own.
                topk = weights.shape[1]
                filled = torch.nn.functional.pad(weights, (0, -topk % (VECTOR_BYTES // weights.element_size())))
                carried = self.engine.combine(part, filled, layout=Layout.BY_EXPERT).x[:, :topk]
                sums = Tokens(sums.x, carried)
        for to, values in zip(into, sums):
            if to is not None and values is not None:
                to.copy_(values)

    def _parts(self, plan: HierarchicalPlan, layout: Layout, row_bytes: int) -> Parts:
        """How rows of so many bytes move. The number of chunks is a power of two, and equal on all ranks: it follows
        from what they agreed on."""
        limit = self.config.rail_chunk_bytes or (_CHUNK_BYTES if self.device.type == "cuda" else 0)
        num_bytes, chunks = plan.way.crossing.most * row_bytes, 1
        while limit and chunks < SHARES and chunks * limit < num_bytes:
            chunks *= 2
        parts = Parts.of(plan, layout, chunks)
        if isinstance(self.engine, NVLinkBackend):
            self.engine.reserve(plan.way.crossing.most_rows(chunks), parts.own.num_topk)
        return parts

    # -- checks --------------------------------------------------------------------------------------------------

    def waits(self) -> dict[str, float]:
        return dict(self._open().waited)

    def check(self) -> None:
        self.rail.check()
        self._planner.raise_deferred()
        self._plan_engine.check()
        self.engine.check()

    def close(self) -> None:
        if self._exchange is not None:
            self._plan_engine.close()
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
        assert isinstance(plan, TensorPlan) and plan.extra is not None  # it went through operators
        return HierarchicalPlan(
            Way.unpack(self._geometry, plan.extra, plan),
            plan.num_experts,
            plan.alignment,
            plan.identity,
            plan.topk_idx,
            plan.known_sizes(),
            self.engine.number,
            plan.expert_counts_host,
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

    def barrier(self) -> None:
        self._open()
        with self._planner.agreement("barrier"):
            pass

    def _agree(self, phase: Phase, check: Callable[[], dict[str, Fact]]) -> None:
        """Compare what ranks must share in a call, and check this rank's input: ``check`` returns facts or raises.

        On a GPU the host would have to wait for the answer, so ranks compare formats only that they have not used
        before; of the other calls they compare a checksum when they make their next plan.
        """
        self._open()
        if self.device.type == "cpu":
            with self._planner.agreement(phase) as agreement:
                agreement.facts = check()
            return
        try:
            facts = check()
        except Exception:
            with self._refusing(phase):
                raise
        number, *others = facts.values()
        form = (phase, *others)
        text = self._formats.get(form)
        if text is None:
            text = self._formats[form] = str(form).encode()
        if self.config.check_agreement and form not in self._known:
            with self._planner.agreement(phase) as agreement:
                agreement.facts = facts
            self._known.add(form)
        self._history = zlib.crc32(text + str(number).encode(), self._history)

    def _refusing(self, phase: Phase) -> AbstractContextManager[object]:
        """Context in which this rank raises the error of a call that the others make."""
        compared_before = any(known[0] == phase for known in self._known)
        return self._open().moving(phase) if compared_before else self._planner.agreement(phase)


def _facts(plan: Plan, x: Tensor, layout: Layout, weights: Tensor | None, backward: Backward) -> dict[str, Fact]:
    """What ranks must share in both directions, by the names that users know. The number of the plan is the first."""
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


def views(packed: Tensor, format: RowFormat) -> Rows:
    """The parts of packed rows, where they are."""
    scales = format.row_bytes
    weights = scales + 4 * format.num_scales
    return Rows(
        packed[:, : format.dense_bytes].view(format.dtype),
        packed[:, scales:weights].view(format.scale_dtype) if format.num_scales else None,
        packed[:, weights : weights + 4 * format.num_weights].view(torch.float32) if format.num_weights else None,
    )


def _dequantized(packed: Tensor, format: RowFormat) -> Rows:
    """Packed rows of e4m3 as BF16."""
    rows = packed.shape[0]
    every = torch.zeros((rows, format.num_weights), dtype=torch.int32, device=packed.device)
    return expand_rows(packed, format, rows, rows, layout=Layout.BY_SOURCE, places=every, dequantize=True)


def _chunks(rows: Tensor, blocks: list[Blocks]) -> tuple[Tensor, ...]:
    return (rows,) if len(blocks) == 1 else rows.split([sum(block.sizes) for block in blocks])
