"""The plan of several nodes: which rows cross which rail, and where each lands inside its node.

A token goes over the rail to one rank of every other node that wants it, and from there to the ranks of that node. So
each rank has a *batch*: its own tokens, then those that came over the rail, by rail rank. The node's engine plans the
batch like any other, but it would order received rows by the rank that hands them on. The protocol orders them by the
rank they come from. As an engine takes the places of rows from its plan, the order costs no pass over rows: only the
places are changed, in the few numbers that a plan has per row.

Rows move in *parts*: the rank's own tokens, which do not wait for the network, and the chunks of what crosses. Each
part is a plan for the engine, and all parts write into the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deepep_moe.backends.base import Layout, Plan
from deepep_moe.backends.rail import Blocks
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.topology import NodeGroups, Nodes

# Columns of what is known about each row that reached this rank, before those of its routes' expert rows.
_BATCH_INDEX, _PLACE, _REMOTE, _NUMBER, _BLOCK, _POSITION, _FIRST_ROUTE = range(7)


class Geometry:
    """Nodes and rails as this rank sees them, as tensors on ``device`` where kernels need them."""

    def __init__(self, nodes: Nodes, groups: NodeGroups, device: torch.device) -> None:
        self.nodes, self.device = nodes, device
        self.num_ranks, self.node_size = len(nodes.node_of), nodes.size
        self.rail_ranks = groups.rails[nodes.place]
        self.rail_nodes = tuple(nodes.node_of[rank] for rank in self.rail_ranks)
        self.rail_rank = self.rail_ranks.index(nodes.rank)
        self.own_rail_rank = tuple(groups.rails[place].index(rank) for rank, place in enumerate(nodes.place_of))
        """[R] the place of each rank in its rail."""
        self.node_of, self.place_of = self.tensor(nodes.node_of), self.tensor(nodes.place_of)
        self.by_node = self.tensor([rank for members in nodes.members for rank in members])
        self.rail_rank_of = self.tensor(self.rail_ranks)
        order = []
        for place, rank in enumerate(nodes.members[nodes.node]):
            order += [rank, *(other for other in groups.rails[place] if other != rank)]
        self.arrival_order = self.tensor(order)
        """[R] source ranks in the order in which the engine of this node gives their rows."""

    def tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu").to(self.device)

    def expert_in_node(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """Global experts to experts of this node in the order of its ranks; -1 for those of other nodes."""
        local = num_experts // self.num_ranks
        owner = torch.div(topk_idx.clamp(min=0), local, rounding_mode="floor")
        here = (topk_idx >= 0) & (self.node_of[owner] == self.nodes.node)
        return torch.where(here, self.place_of[owner] * local + topk_idx % local, -1)

    def in_nodes(self, in_rank: Tensor) -> Tensor:
        """``[T, R]`` bool -> ``[T, N]``, nodes in the order of the rail's ranks."""
        by_node = in_rank[:, self.by_node].view(in_rank.shape[0], self.nodes.count, self.node_size).any(2)
        return by_node[:, list(self.rail_nodes)]


@dataclass(eq=False)
class Crossing:
    """What crosses this rank's rail, both ways."""

    sent: list[int]
    """[N] rows for each rail rank."""
    received: list[int]
    """[N] rows from each."""
    most: int
    """Rows that any rank of the group sends over its rail."""
    tokens: Tensor
    """[rows sent] integers: this rank's token in each, by rail rank."""


@dataclass(eq=False)
class Chunk:
    """Part of a :class:`Crossing`, from every rail rank its share."""

    tokens: Tensor
    sent: Blocks
    received: Blocks


class Way:
    """The way of a batch through the nodes: what a plan of this backend has beside the tensors of every plan.

    It is one tensor, so that it can go through operators with the others.

    Attributes:
        crossing: what crosses the rail.
        number: of the engine's plan of the batch.
        slots: [batch, G] int32: place of each row of the batch among those for each rank of the node, or -1.
        counted: what follows from the counts, as in :class:`Plan`, of the engine's plan.
        experts: [N, K] int32: local experts of each row that reached this rank, in the engine's order.
        arrived: [N, 6 + K] int32: about each such row: its index in the batch of the rank that handed it on, the place
            of that rank, 1 if it had crossed a rail, its number among those that crossed with it and how many these
            were, its position in rank layout, and its expert rows.
    """

    def __init__(self, geometry: Geometry, packed: Tensor, header: list[int] | None = None) -> None:
        nodes, size = geometry.nodes.count, geometry.node_size
        numbers = 5 + 2 * nodes
        self.geometry, self.packed = geometry, packed
        header = header or packed[:numbers].tolist()
        self.number, most, num_recv, topk, local, *rows = header
        sent, received = rows[:nodes], rows[nodes:]
        self.num_received, self.batch = num_recv, sum(received)
        shapes = [(sum(sent),), (num_recv, topk), (num_recv, _FIRST_ROUTE + topk), (size * size + 2 * local + 1,)]
        rest = packed[numbers:]
        parts = []
        for shape in shapes:
            count = math.prod(shape)
            parts.append(rest[:count].view(shape))
            rest = rest[count:]
        tokens, self.experts, self.arrived, self.counted = parts
        self.slots = rest.view(-1, size)
        self.crossing = Crossing(sent, received, most, tokens)

    @classmethod
    def pack(cls, geometry: Geometry, crossing: Crossing, node_plan: Plan, arrived: Tensor) -> Way:
        local = node_plan.num_experts // geometry.node_size
        header = [node_plan.number, crossing.most, node_plan.num_recv, node_plan.num_topk, local]
        header += crossing.sent + crossing.received
        parts = [
            geometry.tensor(header),
            crossing.tokens,
            node_plan.recv_topk_idx,
            arrived,
            node_plan.counted,
            node_plan.send_slot,
        ]
        packed = torch.cat([part.reshape(-1).to(torch.int32) for part in parts])
        return cls(geometry, packed, header)


class HierarchicalPlan(TensorPlan):
    """A :class:`Plan` that knows the :class:`Way` of its rows.

    Args:
        plan: as every backend has it.
        engine: number of the engine's backend.
    """

    def __init__(self, plan: Plan, way: Way, engine: int) -> None:
        super().__init__(**{field.name: getattr(plan, field.name) for field in fields(TensorPlan)})
        self.extra = way.packed
        self.way, self._engine = way, engine
        self._parts: dict[tuple[Layout, int], list[Plan]] = {}

    def chunks(self, count: int) -> list[Chunk]:
        """What crosses, in ``count`` chunks."""
        crossing = self.way.crossing
        if count == 1:
            return [Chunk(crossing.tokens, Blocks(tuple(crossing.sent)), Blocks(tuple(crossing.received)))]
        sent = [_shares(rows, count) for rows in crossing.sent]
        received = [_shares(rows, count) for rows in crossing.received]
        order = self._chunk_of_rows(crossing.sent, count).argsort(stable=True)
        sizes = [sum(shares[c] for shares in sent) for c in range(count)]
        return [
            Chunk(
                tokens,
                Blocks(tuple(shares[c] for shares in sent)),
                Blocks(tuple(shares[c] for shares in received)),
            )
            for c, tokens in enumerate(crossing.tokens[order].split(sizes))
        ]

    def parts(self, layout: Layout, count: int) -> list[Plan]:
        """The engine's plans: of this rank's own tokens, then of each of ``count`` chunks. Kept for the way back."""
        way, device = self.way, self.way.geometry.device
        if (layout, count) not in self._parts:
            own = self.num_tokens
            batch = torch.arange(way.slots.shape[0], dtype=torch.int64, device=device)
            indices = [batch[:own], batch[own:]]
            if count > 1:
                order = self._chunk_of_rows(way.crossing.received, count).argsort(stable=True)
                sizes = [sum(_shares(rows, count)[c] for rows in way.crossing.received) for c in range(count)]
                indices[1:] = indices[1][order].split(sizes)
            number, block = way.arrived[:, _NUMBER], way.arrived[:, _BLOCK].clamp(min=1)
            chunk = ((number + 1) * count - 1).div(block, rounding_mode="floor")
            part_of = torch.where(way.arrived[:, _REMOTE] > 0, chunk + 1, 0)
            self._parts[layout, count] = [
                self._part(layout, number, index, part_of == number) for number, index in enumerate(indices)
            ]
        parts = self._parts[layout, count]
        if device.type == "cuda":  # they may have been made on another stream
            for part in parts:
                for tensor in (part.send_slot, part.counted, part.received, part.row_recv):
                    tensor.record_stream(torch.cuda.current_stream(device))
        return parts

    def _chunk_of_rows(self, counts: list[int], chunks: int) -> Tensor:
        """The chunk of each row of blocks of ``counts`` rows."""
        number, block = number_in_blocks(counts, self.way.geometry.device)
        size = self.way.geometry.tensor(counts)[block]
        return ((number + 1) * chunks - 1).div(size, rounding_mode="floor")

    def _part(self, layout: Layout, number: int, batch_index: Tensor, belongs: Tensor) -> Plan:
        """The rows at ``batch_index`` of the batch, and those that reach this rank (``belongs``), as an engine's plan.

        In rank layout every rank has one expert, so to speak, and rows are placed among its rows: an engine knows no
        other way to be told the order.
        """
        way, geometry = self.way, self.way.geometry
        device, ranks, arrived = geometry.device, geometry.node_size, self.way.arrived
        goes = way.slots[batch_index] >= 0
        send_slot = torch.where(goes, goes.cumsum(0) - 1, -1).to(torch.int32)

        place = arrived[:, _PLACE].long()
        counts = torch.zeros((ranks, ranks), dtype=torch.int64, device=device)
        from_place = torch.zeros(ranks, dtype=torch.int64, device=device).index_add_(0, place, belongs.long())
        counts[geometry.nodes.place] = goes.sum(0)
        counts[:, geometry.nodes.place] = from_place
        counted = torch.cat([counts.cumsum(0).reshape(-1), way.counted[ranks * ranks :]])

        # This rank's own rows are read where they are in this part.
        batch = way.slots.shape[0]
        where = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        where[batch_index] = torch.arange(batch_index.shape[0], dtype=torch.int32, device=device)
        source = where[torch.where(place == geometry.nodes.place, arrived[:, _BATCH_INDEX].long(), batch)]
        if layout is Layout.BY_EXPERT:
            places, experts, row_recv = arrived[:, _FIRST_ROUTE:], way.experts, self.row_recv
        else:
            places = arrived[:, _POSITION : _POSITION + 1]
            experts, row_recv = torch.zeros_like(places), self.recv_src_idx.contiguous()
        rows = torch.cat([source.unsqueeze(1), experts, places], dim=1).to(torch.int32)
        index = torch.where(belongs, belongs.cumsum(0) - 1, rows.shape[0])  # the others go to a row that is cut off
        received = torch.full((rows.shape[0] + 1, rows.shape[1]), -1, dtype=torch.int32, device=device)
        received[index] = rows
        return TensorPlan(
            num_experts=(way.counted.shape[0] - ranks * ranks) // 2 * ranks,
            alignment=self.alignment,
            identity=(self._engine, way.number),
            topk_idx=torch.zeros((), dtype=torch.int64, device=device).expand(batch_index.shape[0], places.shape[1]),
            send_slot=send_slot,
            counted=counted,
            received=received[:-1],
            # The first part zeroes padding; to the others no row is padding.
            row_recv=row_recv if number == 0 else torch.zeros_like(row_recv),
            expert_counts_host=None,
        )


@dataclass(eq=False)
class Placed:
    """What a :class:`HierarchicalPlan` takes from :func:`place`; see there and in :class:`Plan`."""

    expert_counts: Tensor
    expert_offsets: Tensor
    received: Tensor
    row_recv: Tensor
    arrived: Tensor


def place(
    geometry: Geometry, node_plan: Plan, facts: Tensor, alignment: int, max_recv: int | None, max_rows: int | None
) -> Placed:
    """The final places of the rows that reach this rank, of which there are at most as many as the limits.

    The rows of one source rank are a run in the engine's order and in the protocol's, and so are those of a source rank
    and an expert: a run moves as a whole, and nothing needs to be sorted.

    Args:
        facts: [N, 4] int32, in the engine's order: source rank, token, number and block as in :class:`Way`.
    """
    device, num_recv, topk = geometry.device, node_plan.num_recv, node_plan.num_topk
    local = node_plan.num_experts // geometry.node_size
    source = facts[:, 0].long()
    from_source = _count(source, geometry.num_ranks)
    moved = _before(from_source) - _before(from_source, geometry.arrival_order)
    position = torch.arange(num_recv, dtype=torch.int64, device=device) + moved[source]

    expert, rows = node_plan.recv_topk_idx, node_plan.recv_rows
    counts, num_rows = node_plan.expert_counts, 0
    offsets = torch.zeros(local + 1, dtype=torch.int64, device=device)
    if topk:
        num_rows = node_plan.num_rows if max_rows is None else max_rows
        offsets[1:] = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
        run = source.unsqueeze(1) * local + expert
        in_run = _count(torch.where(expert >= 0, run, -1), geometry.num_ranks * local).view(-1, local)
        moved = _before(in_run) - _before(in_run, geometry.arrival_order)
        rows = torch.where(expert >= 0, rows + moved.reshape(-1)[torch.where(expert >= 0, run, 0)], -1)

    num_out = num_recv if max_recv is None else max_recv
    received = torch.full((num_out, 1 + 2 * topk), -1, dtype=torch.int32, device=device)
    received[position] = torch.cat([facts[:, 1:2], expert, rows], dim=1).to(torch.int32)
    row_recv = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    row_recv[torch.where(rows >= 0, rows, num_rows)] = position.to(torch.int32).unsqueeze(1).expand(-1, topk)

    handed_on = node_plan.rank_prefix[:, geometry.nodes.place].contiguous()
    arrived = [
        node_plan.recv_src_idx,
        torch.searchsorted(handed_on, torch.arange(num_recv, dtype=torch.int64, device=device), right=True),
        geometry.node_of[source] != geometry.nodes.node,
        facts[:, 2],
        facts[:, 3],
        position,
    ]
    return Placed(
        expert_counts=counts,
        expert_offsets=offsets,
        received=received,
        row_recv=row_recv[:-1],
        arrived=torch.cat([torch.stack([a.to(torch.int32) for a in arrived], dim=1), rows.to(torch.int32)], dim=1),
    )


def _count(numbers: Tensor, kinds: int) -> Tensor:
    """How often each of ``kinds`` numbers comes; -1 does not count. Like bincount, without a host wait."""
    flat = numbers.reshape(-1)
    counts = torch.zeros(kinds + 1, dtype=torch.int64, device=flat.device)
    return counts.index_add_(0, torch.where(flat >= 0, flat, kinds), torch.ones_like(flat))[:-1]


def _before(counts: Tensor, order: Tensor | None = None) -> Tensor:
    """The sum of the counts that come before each one along the first dimension, in this order of it."""
    if order is None:
        return counts.cumsum(0) - counts
    sums = torch.empty_like(counts)
    sums[order] = _before(counts[order])
    return sums


def number_in_blocks(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of ``sum(counts)`` rows its number in its block, and its block."""
    total = sum(counts)
    sizes = torch.tensor(counts, dtype=torch.int64, device="cpu").to(device)
    block = torch.arange(len(counts), dtype=torch.int64, device=device).repeat_interleave(sizes, output_size=total)
    return torch.arange(total, dtype=torch.int64, device=device) - (sizes.cumsum(0) - sizes)[block], block


def positions(marks: Tensor, total: int) -> Tensor:
    """Of ``marks [T, N]`` bool, ``total`` of them set: the row of each, by column and then row, without a host wait."""
    flat = marks.t().reshape(-1)
    index = torch.where(flat, flat.cumsum(0) - 1, total)
    rows = torch.arange(marks.shape[0], dtype=torch.int64, device=marks.device).repeat(marks.shape[1])
    found = torch.empty(total + 1, dtype=torch.int64, device=marks.device)
    found[index] = rows
    return found[:total]


def _shares(rows: int, count: int) -> list[int]:
    """``rows`` cut into ``count`` shares."""
    return [rows * (c + 1) // count - rows * c // count for c in range(count)]
