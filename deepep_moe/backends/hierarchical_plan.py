"""The plan of several nodes: which rows cross which rail, and where each lands inside its node.

A token goes over the rail to one rank of every other node that wants it, and from there to the ranks of that node. So
each rank has a *batch* of N * C tokens: C of each rank of its rail (its own among them), of which those without an
expert in this node are left out. The backend of the node plans the batch like any other, but it orders received rows by
the rank that hands them on. The protocol orders them by the rank they come from. A plan is what places rows, so the
order costs no pass over rows: :func:`place` changes the places.

Rows move in *parts*: the rank's own tokens, which do not wait for the network, and the chunks of what crosses. Each
part is a plan for the backend of the node, and all parts write into the same outputs (:class:`Parts`).

Nothing here waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deepep_moe.backends.base import Layout, Plan
from deepep_moe.backends.exchange import to_device
from deepep_moe.backends.hierarchical_counts import SHARES, Counts, Crossing, Geometry, share_of
from deepep_moe.backends.rail import Blocks
from deepep_moe.backends.tensor_plan import TensorPlan

# Columns of what is known about each row that reached this rank, before those of its routes' expert rows.
_RUN, _SHARE, _POSITION, _BATCH_INDEX, _FIRST_ROUTE = range(5)


@dataclass(eq=False)
class Way:
    """The way of a batch through the nodes: what a plan of this backend has beside the tensors of every plan.

    All tensors are int64 or int32 on the device.
    """

    geometry: Geometry
    crossing: Crossing
    sent: Tensor
    """[N, SHARES] tokens of this rank for each rank of the rail, by share."""
    received: Tensor
    """[N, SHARES] tokens of each rank of the rail for this rank, by share."""
    rail_tokens: Tensor
    """[N] tokens of each rank of the rail."""
    send_position: Tensor
    """[T, N]: the number of each token among those for a rank of the rail, or -1."""
    recv_position: Tensor
    """[N, C]: the number of each token of a rank of the rail among those for this rank, or -1."""
    slots: Tensor
    """[N * C, G]: ``send_slot`` of the node's plan."""
    node_counted: Tensor
    """``counted`` of the node's plan."""
    experts: Tensor
    """[N, K] int32: local experts of each row that reached this rank, in the order of the node's plan."""
    arrived: Tensor
    """[N, 4 + K] int32 about each such row: its place and rail rank in one number (``Geometry.runs``), its share, its
    position in rank layout, its index in the batch of the rank that handed it on, and its expert rows. The first is -1
    in rows that are not used."""
    bad: Tensor
    """[1] int32: not 0 where the device found that the plan is an error; only in plans of fixed size."""

    def pack(self) -> Tensor:
        """All of it in one int32 tensor, so that it can go through operators with the tensors of the plan."""
        crossing = self.crossing
        header = [int(crossing.exact), crossing.tokens, crossing.most, crossing.most_of_share, *self.arrived.shape]
        parts = [to_device(torch.tensor(header, dtype=torch.int32, device="cpu"), self.geometry.device)]
        parts += [getattr(self, name) for name in _WAY_TENSORS]
        return torch.cat([part.reshape(-1).to(torch.int32) for part in parts])

    @classmethod
    def unpack(cls, geometry: Geometry, packed: Tensor, num_tokens: int) -> Way:
        """Inverse of :meth:`pack`. On a GPU it waits for the host."""
        exact, tokens, most, most_of_share, rows, columns = packed[:6].tolist()
        nodes, topk = geometry.num_nodes, columns - _FIRST_ROUTE
        shapes = {
            "sent": (nodes, SHARES),
            "received": (nodes, SHARES),
            "rail_tokens": (nodes,),
            "send_position": (num_tokens, nodes),
            "recv_position": (nodes, tokens),
            "slots": (nodes * tokens, geometry.node_size),
            "experts": (rows, topk),
            "arrived": (rows, columns),
            "bad": (1,),
            "node_counted": (-1,),
        }
        rest, tensors = packed[6:], {}
        for name, shape in shapes.items():
            size = rest.shape[0] if shape == (-1,) else torch.Size(shape).numel()
            tensors[name], rest = rest[:size].view(shape), rest[size:]
        sent, received = (tensors[name].tolist() if exact else None for name in ("sent", "received"))
        return cls(geometry, Crossing(tokens, most, most_of_share, sent, received), **tensors)


_WAY_TENSORS = (
    "sent",
    "received",
    "rail_tokens",
    "send_position",
    "recv_position",
    "slots",
    "experts",
    "arrived",
    "bad",
    "node_counted",
)


class HierarchicalPlan(TensorPlan):
    """A :class:`Plan` that knows the :class:`Way` of its rows.

    Args:
        plan: as every backend has it.
        engine: number of the node's backend.
    """

    def __init__(self, plan: TensorPlan, way: Way, engine: int) -> None:
        super().__init__(**{field.name: getattr(plan, field.name) for field in fields(TensorPlan)})
        self.way, self._engine = way, engine
        self._parts: dict[tuple[Layout, int], Parts] = {}

    def tensors(self) -> list[Tensor | None]:
        return [*super().tensors()[:-1], self.way.pack()]

    def parts(self, layout: Layout, chunks: int) -> Parts:
        """How rows move in so many chunks. Kept for the way back."""
        if (layout, chunks) not in self._parts:
            self._parts[layout, chunks] = Parts(self, self._engine, layout, chunks)
        parts = self._parts[layout, chunks]
        parts.use_on_current_stream()
        return parts


class Parts:
    """How the rows of a plan move in ``chunks`` chunks (a power of two, at most :data:`SHARES`).

    Attributes:
        own: the node's plan of this rank's own tokens.
        crossing: the node's plan of each chunk's rows, in the order of the receive buffer.
        send, recv: blocks of each chunk.
        send_rows: [T, N] int32: the row of each token in the send buffer, which has the chunks one after the other, for
            each rank of the rail; -1 for none.
        home_rows: [T, N] int32: where the sum of each node is when a token is back at home: in the buffer of C rows of
            this node's own sums and of what comes back; -1 for none. Nodes in their order.
    """

    def __init__(self, plan: HierarchicalPlan, engine: int, layout: Layout, chunks: int) -> None:
        way, geometry, crossing = plan.way, plan.way.geometry, plan.way.crossing
        self._device = geometry.device
        send_sizes = crossing.block_sizes(crossing.sent, chunks, geometry)
        recv_sizes = crossing.block_sizes(crossing.received, chunks, geometry)
        sent = _Rows(way, way.sent, chunks)
        received = _Rows(way, way.received, chunks)
        self.send = [Blocks(sizes, used) for sizes, used in zip(send_sizes, sent.used)]
        self.recv = [Blocks(sizes, used) for sizes, used in zip(recv_sizes, received.used)]

        token = torch.arange(plan.num_tokens, dtype=torch.int64, device=self._device)
        chunk = share_of(token, plan.num_tokens) * chunks // SHARES
        rows = sent.rows(chunk, way.send_position)
        self.send_rows = rows.to(torch.int32)
        home = torch.where(rows >= 0, rows + crossing.tokens, -1)
        home[:, geometry.rail_rank] = token
        self.home_rows = home[:, geometry.rail_rank_of_node].to(torch.int32).contiguous()
        self.own, *self.crossing = self._plans(plan, engine, layout, chunks, received, [sum(s) for s in recv_sizes])

    def use_on_current_stream(self) -> None:
        """They may have been made on another stream."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        tensors = [self.send_rows, self.home_rows, *(b.used for b in (*self.send, *self.recv) if b.used is not None)]
        for part in (self.own, *self.crossing):
            tensors += [part.send_slot, part.counted, part.received, part.row_recv]
        for tensor in tensors:
            tensor.record_stream(stream)

    @staticmethod
    def _plans(
        plan: HierarchicalPlan, engine: int, layout: Layout, chunks: int, received: _Rows, chunk_rows: list[int]
    ) -> list[Plan]:
        """In rank layout every rank has one expert, so to speak, and rows are placed among its rows: the backend of a
        node knows no other way to be told the order."""
        way, geometry, tokens = plan.way, plan.way.geometry, plan.way.crossing.tokens
        device, ranks, nodes, me = geometry.device, geometry.node_size, geometry.num_nodes, geometry.rail_rank
        parts = 1 + chunks

        # Rows of the batch: the row of the receive buffer, the part and the run of tokens with equal part.
        token = torch.arange(tokens, dtype=torch.int64, device=device)
        chunk = share_of(token.unsqueeze(0), way.rail_tokens.unsqueeze(1)).clamp(max=SHARES - 1) * chunks // SHARES
        rows = received.rows(chunk.t(), way.recv_position.t()).t()  # [N, C]
        part = chunk + 1
        part[me] = 0
        rank = torch.arange(nodes, dtype=torch.int64, device=device)
        run = (rank.unsqueeze(1) * parts + part).reshape(-1)
        goes = way.slots >= 0
        counts = torch.zeros((nodes * parts, ranks), dtype=torch.int64, device=device).index_add_(0, run, goes.long())
        slots = torch.where(goes, way.slots - _moved(counts, parts)[run], -1).to(torch.int32)
        own_slots = slots[me * tokens : me * tokens + plan.num_tokens]
        total = sum(chunk_rows)
        crossing_slots = torch.full((total + 1, ranks), -1, dtype=torch.int32, device=device)
        crossing_slots[torch.where(rows >= 0, rows, total).reshape(-1)] = slots
        crossing_slots[total] = -1
        goes_to = counts.view(nodes, parts, ranks).sum(0)  # [parts, G]

        # Rows that reached this rank.
        arrived = way.arrived.long()
        used, place = arrived[:, _RUN] >= 0, torch.div(arrived[:, _RUN], nodes, rounding_mode="floor")
        remote = geometry.run_crosses[arrived[:, _RUN].clamp(min=0)]
        part_of = torch.where(remote, arrived[:, _SHARE] * chunks // SHARES + 1, 0)
        run = torch.where(used, arrived[:, _RUN] * parts + part_of, ranks * nodes * parts)
        counts = torch.zeros(ranks * nodes * parts + 1, dtype=torch.int64, device=device)
        counts = counts.index_add_(0, run, torch.ones_like(run))[:-1]
        number = torch.arange(run.shape[0], dtype=torch.int64, device=device)
        moved = torch.cat([_moved(counts.unsqueeze(1), parts)[:, 0], counts.new_zeros(1)])
        index = torch.where(used, number - moved[run], run.shape[0])
        counts_between = torch.zeros((parts, ranks, ranks), dtype=torch.int64, device=device)
        counts_between[:, :, geometry.nodes.place] = counts.view(ranks, nodes, parts).sum(1).t()
        counts_between[:, geometry.nodes.place, :] = goes_to
        prefix = counts_between.cumsum(1).view(parts, -1)
        prefix = torch.where(way.node_counted[0] < 0, -1, prefix)  # a plan that failed on the device

        # This rank's own rows are read where they are in the part.
        starts = torch.cat([received.starts.new_zeros(1), received.starts[:, 0]])  # of each part
        batch_row = arrived[:, _BATCH_INDEX].clamp(min=0)
        mine = used & (place == geometry.nodes.place)
        in_part = torch.where(remote, rows.reshape(-1)[batch_row] - starts[part_of], batch_row - me * tokens)
        source = torch.where(mine, in_part, 0)
        if layout is Layout.BY_EXPERT:
            places, experts, row_recv = arrived[:, _FIRST_ROUTE:], way.experts, plan.row_recv
        else:
            places = arrived[:, _POSITION : _POSITION + 1]
            experts, row_recv = torch.zeros_like(places), plan.recv_src_idx.contiguous()
        entries = torch.cat([source.unsqueeze(1), experts, places], dim=1).to(torch.int32)
        placed = torch.full((parts, entries.shape[0] + 1, entries.shape[1]), -1, dtype=torch.int32, device=device)
        placed[part_of, index] = entries
        placed[:, -1] = -1

        no_padding = torch.zeros_like(row_recv)
        topk = places.shape[1]
        plans, first = [], 0
        for number_of_part in range(parts):
            own = number_of_part == 0
            count = plan.num_tokens if own else chunk_rows[number_of_part - 1]
            plans.append(
                TensorPlan(
                    num_experts=(way.node_counted.shape[0] - ranks * ranks) // 2 * ranks,
                    alignment=plan.alignment,
                    identity=(engine, plan.number),
                    topk_idx=torch.zeros((), dtype=torch.int64, device=device).expand(count, topk),
                    send_slot=own_slots if own else crossing_slots[first : first + count],
                    counted=torch.cat([prefix[number_of_part], way.node_counted[ranks * ranks :]]),
                    received=placed[number_of_part, :-1],
                    row_recv=row_recv if own else no_padding,  # the first part zeroes padding
                    expert_counts_host=None,
                )
            )
            first += 0 if own else count
        return plans


class _Rows:
    """Rows of a buffer of packed rows: chunk after chunk, and in each a block for every rank of the rail."""

    def __init__(self, way: Way, shares: Tensor, chunks: int) -> None:
        nodes, exact = way.geometry.num_nodes, way.crossing.exact
        by_chunk = shares.view(nodes, chunks, -1).sum(2).t()  # [chunks, N]
        self._before = by_chunk.cumsum(0) - by_chunk  # rows of the chunks before
        sizes = by_chunk
        if not exact:
            sizes = torch.full_like(by_chunk, way.crossing.most_of_share * (SHARES // chunks))
            sizes[:, way.geometry.rail_rank] = 0
        ends = sizes.reshape(-1).cumsum(0).view_as(sizes)
        self.starts = ends - sizes
        """[chunks, N] first row of each block."""
        self.used: list[Tensor | None] = [None] * chunks if exact else list(by_chunk.to(torch.int32).unbind(0))

    def rows(self, chunk: Tensor, position: Tensor) -> Tensor:
        """``chunk [n]`` or ``[n, N]`` and ``position [n, N]`` among all rows for the rank -> row or -1, ``[n, N]``."""
        moved = self.starts - self._before
        if chunk.dim() == 1:
            moved = moved[chunk]
        else:
            moved = moved.gather(0, chunk)
        return torch.where(position >= 0, position + moved, -1)


def _moved(counts: Tensor, parts: int) -> Tensor:
    """``counts [runs * parts, n]`` rows, by run and then part -> how far rows move down when they are numbered within
    their part instead of all together, ``[runs * parts, n]``."""
    before = counts.cumsum(0) - counts
    by_run = counts.view(-1, parts, counts.shape[1])
    return before - (by_run.cumsum(0) - by_run).view_as(counts)


@dataclass(eq=False)
class Placed:
    """What a :class:`HierarchicalPlan` takes from :func:`place`; see there and in :class:`Plan`."""

    received: Tensor
    row_recv: Tensor
    arrived: Tensor


def place(geometry: Geometry, counts: Counts, node_plan: Plan, tokens: int) -> Placed:
    """The final places of the rows that reach this rank.

    The rows of one source rank are a run in the order of the node's plan and in that of the protocol, and so are those
    of a source rank and an expert: a run moves as a whole, and nothing needs to be sorted.

    Args:
        counts: on the device.
        node_plan: of as many rows as the plan has.
        tokens: C.
    """
    device, num_recv, num_rows, topk = geometry.device, node_plan.num_recv, node_plan.num_rows, node_plan.num_topk
    me = geometry.nodes.rank
    runs = counts.to_rank[:, me : me + 1]  # of rows, then of each local expert
    if topk:
        runs = torch.cat([runs, counts.to_expert.view(geometry.num_ranks, geometry.num_ranks, -1)[:, me]], dim=1)
    in_order = runs[geometry.runs]
    moved = torch.empty_like(runs)
    moved[geometry.runs] = in_order - in_order.cumsum(0)
    moved += runs.cumsum(0) - runs  # [R, 1 + L]

    batch_index = node_plan.recv_src_idx.long()
    used, number = batch_index >= 0, torch.arange(num_recv, dtype=torch.int64, device=device)
    handed_on = node_plan.rank_prefix[:, geometry.nodes.place].contiguous()
    place_of = torch.searchsorted(handed_on, number, right=True)
    run = place_of * geometry.num_nodes + torch.div(batch_index, tokens, rounding_mode="floor")
    source = geometry.runs[torch.where(used, run, 0)]
    token = batch_index % tokens
    position = torch.where(used, number + moved[source, 0], num_recv)
    expert, rows = node_plan.recv_topk_idx, node_plan.recv_rows.long()
    if topk:
        rows = torch.where(expert >= 0, rows + moved[source, 1:].gather(1, expert.long().clamp(min=0)), -1)

    received = torch.full((num_recv + 1, 1 + 2 * topk), -1, dtype=torch.int32, device=device)
    received[position] = torch.cat([token.unsqueeze(1), expert, rows], dim=1).to(torch.int32)
    received[num_recv] = -1
    row_recv = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    row_recv[torch.where(rows >= 0, rows, num_rows)] = position.to(torch.int32).unsqueeze(1).expand(-1, topk)
    share = torch.where(used, share_of(token, counts.tokens[source]), 0)
    about = [torch.where(used, run, -1), share, position, batch_index]
    arrived = torch.cat([torch.stack(about, dim=1), rows], dim=1).to(torch.int32)
    return Placed(received[:-1], row_recv[:-1], arrived)


def positions(marks: Tensor, dim: int) -> Tensor:
    """The number of each set mark among those along ``dim``, or -1: int32."""
    return torch.where(marks, marks.cumsum(dim, dtype=torch.int32) - 1, -1).to(torch.int32)
