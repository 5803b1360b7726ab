"""The parts in which the rows of a plan of several nodes move.

The first part is the rank's own tokens, which do not wait for the network; each chunk of what crosses is another. A
part is a plan for the backend of the node, and all parts write into the same outputs. Nothing here waits for the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Layout
from deepep_moe.backends.hierarchical_geometry import SHARES, share_of
from deepep_moe.backends.hierarchical_plan import (
    BATCH_INDEX,
    FIRST_ROUTE,
    POSITION,
    RUN,
    SHARE,
    HierarchicalPlan,
    Streams,
    Way,
)
from deepep_moe.backends.rail import Blocks
from deepep_moe.backends.tensor_plan import TensorPlan


class Parts:
    """How the rows of a plan move in ``chunks`` chunks (a power of two, at most :data:`SHARES`).

    Attributes:
        own: the node's plan of this rank's own tokens.
        crossing: the node's plan of each chunk's rows, in the order of the receive buffer.
        send, recv: blocks of each chunk.
        num_sent, num_received: rows of all of them.
        send_rows: [T, N] int32: the row of each token in the send buffer, which has the chunks one after the other, for
            each rank of the rail; -1 for none.
        home_rows: [T, N] int32: where the sum of each node is when a token is back at home: in the buffer of C rows of
            this node's own sums and of what comes back; -1 for none. Nodes in their order.
    """

    def __init__(self, plan: HierarchicalPlan, layout: Layout, chunks: int) -> None:
        way, geometry, crossing = plan.way, plan.way.geometry, plan.way.crossing
        self._streams = Streams(geometry.device)
        send_sizes = crossing.block_sizes(crossing.sent, chunks, geometry)
        recv_sizes = crossing.block_sizes(crossing.received, chunks, geometry)
        chunk_rows = [sum(sizes) for sizes in recv_sizes]
        self.num_sent, self.num_received = sum(map(sum, send_sizes)), sum(chunk_rows)
        by_expert = layout is Layout.BY_EXPERT
        if geometry.kernels is not None and plan.num_topk:
            tables = tables_by_kernels(plan, by_expert, chunks, self.num_received)
        else:
            tables = tables_by_operators(plan, by_expert, chunks, self.num_received)
        self.send_rows, self.home_rows = tables.send_rows, tables.home_rows
        used = (tables.send_used, tables.recv_used)
        send_used, recv_used = ([None] * chunks if crossing.exact else list(rows.unbind(0)) for rows in used)
        self.send = [Blocks(*blocks) for blocks in zip(send_sizes, send_used)]
        self.recv = [Blocks(*blocks) for blocks in zip(recv_sizes, recv_used)]

        row_recv = plan.row_recv if by_expert else plan.recv_src_idx.contiguous()
        ranks, topk = geometry.node_size, (tables.placed.shape[2] - 1) // 2
        rows = [plan.num_tokens, *chunk_rows]
        slots = [tables.own_slots, *tables.chunk_slots.split(chunk_rows)]
        self.own, *self.crossing = (
            TensorPlan(
                num_experts=(way.node_counted.shape[0] - ranks * ranks) // 2 * ranks,
                alignment=plan.alignment,
                identity=(plan.engine, plan.number),
                topk_idx=geometry.no_routes.expand(rows[part], topk),
                send_slot=slots[part],
                counted=tables.counted[part],
                received=tables.placed[part],
                row_recv=tables.no_padding if part else row_recv,  # the first part zeroes padding
                expert_counts_host=None,
            )
            for part in range(1 + chunks)
        )

    @classmethod
    def of(cls, plan: HierarchicalPlan, layout: Layout, chunks: int) -> Parts:
        """Kept with the plan for the way back."""
        parts = plan.kept_parts.get((layout, chunks))
        plan.way.use_on_current_stream()
        if not isinstance(parts, Parts):
            parts = plan.kept_parts[layout, chunks] = cls(plan, layout, chunks)
        parts.use_on_current_stream()
        return parts

    def use_on_current_stream(self) -> None:
        """They may have been made on another stream."""
        self._streams.use_on_current(self._tensors)

    def _tensors(self) -> list[Tensor]:
        used = [blocks.used for blocks in (*self.send, *self.recv) if blocks.used is not None]
        tensors = [self.send_rows, self.home_rows, *used]
        for part in (self.own, *self.crossing):
            tensors += [part.send_slot, part.counted, part.received, part.row_recv]
        return tensors


class Tables(NamedTuple):
    """The tensors of :class:`Parts`; P parts, the first of them this rank's own tokens."""

    send_used: Tensor
    """[chunks, N] int32: rows used of each block."""
    recv_used: Tensor
    """[chunks, N] int32"""
    send_rows: Tensor
    home_rows: Tensor
    counted: Tensor
    """[P, ...] int64: ``counted`` of each part."""
    own_slots: Tensor
    """[T, G] int32: ``send_slot`` of the first part."""
    chunk_slots: Tensor
    """[rows of the receive buffer, G] int32: of the others, one after the other."""
    no_padding: Tensor
    """[rows of the output] int32 zeros: ``row_recv`` of all parts but the first."""
    placed: Tensor
    """[P, M, 1 + 2 * K] int32: ``received`` of each part. In rank layout every rank has one expert, so to speak, and
    rows are placed among its rows (K = 1): the backend of a node knows no other way to be told the order."""


def tables_by_operators(plan: HierarchicalPlan, by_expert: bool, chunks: int, recv_rows: int) -> Tables:
    """By PyTorch's operators; ``recv_rows``: of the receive buffer."""
    way, geometry, tokens = plan.way, plan.way.geometry, plan.way.crossing.tokens
    device, ranks, nodes, me = geometry.device, geometry.node_size, geometry.num_nodes, geometry.rail_rank
    parts = 1 + chunks
    sent, received = _Rows(way, way.sent, chunks), _Rows(way, way.received, chunks)

    token = torch.arange(plan.num_tokens, dtype=torch.int64, device=device)
    send_rows = sent.rows(share_of(token, plan.num_tokens) * chunks // SHARES, way.send_position)
    home_rows = torch.where(send_rows >= 0, send_rows + tokens, -1)
    home_rows[:, me] = token

    # Rows of the batch: the row of the receive buffer, the part and the run of tokens with equal part.
    token = torch.arange(tokens, dtype=torch.int64, device=device)
    chunk = share_of(token.unsqueeze(0), way.rail_tokens.unsqueeze(1)).clamp(max=SHARES - 1) * chunks // SHARES
    rows = received.rows(chunk.t(), way.recv_position.t()).t()  # [N, C]
    part = chunk + 1
    part[me].fill_(0)
    rank = torch.arange(nodes, dtype=torch.int64, device=device)
    run = (rank.unsqueeze(1) * parts + part).reshape(-1)
    goes = way.slots >= 0
    counts = torch.zeros((nodes * parts, ranks), dtype=torch.int64, device=device).index_add_(0, run, goes.long())
    slots = torch.where(goes, way.slots - _moved(counts, parts)[run], -1).to(torch.int32)
    chunk_slots = torch.full((recv_rows + 1, ranks), -1, dtype=torch.int32, device=device)
    chunk_slots[torch.where(rows >= 0, rows, recv_rows).reshape(-1)] = slots
    goes_to = counts.view(nodes, parts, ranks).sum(0)  # [P, G]

    # Rows that reached this rank.
    arrived = way.arrived.long()
    used, place = arrived[:, RUN] >= 0, torch.div(arrived[:, RUN], nodes, rounding_mode="floor")
    remote = geometry.run_crosses[arrived[:, RUN].clamp(min=0)]
    part_of = torch.where(remote, arrived[:, SHARE] * chunks // SHARES + 1, 0)
    run = torch.where(used, arrived[:, RUN] * parts + part_of, ranks * nodes * parts)
    counts = torch.zeros(ranks * nodes * parts + 1, dtype=torch.int64, device=device)
    counts = counts.index_add_(0, run, torch.ones_like(run))[:-1]
    number = torch.arange(run.shape[0], dtype=torch.int64, device=device)
    moved = torch.cat([_moved(counts.unsqueeze(1), parts)[:, 0], counts.new_zeros(1)])
    index = torch.where(used, number - moved[run], run.shape[0])
    between = torch.zeros((parts, ranks, ranks), dtype=torch.int64, device=device)
    between[:, :, geometry.nodes.place] = counts.view(ranks, nodes, parts).sum(1).t()
    between[:, geometry.nodes.place, :] = goes_to
    prefix = between.cumsum(1).view(parts, -1)
    prefix = torch.where(way.node_counted[0] < 0, -1, prefix)  # a plan that failed on the device

    # This rank's own rows are read where they are in the part.
    starts = torch.cat([received.starts.new_zeros(1), received.starts[:, 0]])  # of each part
    batch_row = arrived[:, BATCH_INDEX].clamp(min=0)
    mine = used & (place == geometry.nodes.place)
    in_part = torch.where(remote, rows.reshape(-1)[batch_row] - starts[part_of], batch_row - me * tokens)
    source = torch.where(mine, in_part, 0)
    places = arrived[:, FIRST_ROUTE:] if by_expert else arrived[:, POSITION : POSITION + 1]
    experts = way.experts if by_expert else torch.zeros_like(places)
    entries = torch.cat([source.unsqueeze(1), experts, places], dim=1).to(torch.int32)
    placed = torch.full((parts, entries.shape[0] + 1, entries.shape[1]), -1, dtype=torch.int32, device=device)
    placed[part_of, index] = entries
    return Tables(
        send_used=sent.used,
        recv_used=received.used,
        send_rows=send_rows.to(torch.int32),
        home_rows=home_rows[:, geometry.rail_rank_of_node].to(torch.int32).contiguous(),
        counted=torch.cat([prefix, way.node_counted[ranks * ranks :].expand(parts, -1)], dim=1),
        own_slots=slots[me * tokens : me * tokens + plan.num_tokens],
        chunk_slots=chunk_slots[:-1],
        no_padding=torch.zeros(plan.num_rows if by_expert else plan.num_recv, dtype=torch.int32, device=device),
        placed=placed[:, :-1],
    )


def tables_by_kernels(plan: HierarchicalPlan, by_expert: bool, chunks: int, recv_rows: int) -> Tables:
    """The same in three kernels (csrc/nodes/parts.cu), in one piece of memory."""
    way, geometry, crossing = plan.way, plan.way.geometry, plan.way.crossing
    ranks, nodes, parts, topk = geometry.node_size, geometry.num_nodes, 1 + chunks, plan.num_topk
    tokens, counted_size = plan.num_tokens, way.node_counted.shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "counted": (parts, 2 * counted_size),  # int64; the others are int32
        # Zero beforehand.
        "batch_counts": (nodes * parts * ranks,),
        "arrived_counts": (nodes * parts * ranks,),
        "no_padding": (plan.num_rows if by_expert else plan.num_recv,),
        # -1 beforehand.
        "chunk_slots": (recv_rows, ranks),
        "placed": (parts, plan.num_recv, 1 + 2 * topk if by_expert else 3),
        "own_slots": (tokens, ranks),
        "send_rows": (tokens, nodes),
        "home_rows": (tokens, nodes),
        "send_used": (chunks, nodes),
        "recv_used": (chunks, nodes),
        "send_moves": (chunks, nodes),
        "recv_moves": (chunks, nodes),
        "recv_starts": (chunks,),
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=geometry.device)
    base, addresses = memory.data_ptr(), {}
    for name, size in zip(shapes, sizes):  # words of 4 bytes
        addresses[name] = base
        base += 4 * size
    assert geometry.kernels is not None
    geometry.kernels.parts(
        num_tokens=tokens,
        num_recv=plan.num_recv,
        num_topk=topk,
        room=crossing.tokens,
        chunks=chunks,
        exact=crossing.exact,
        most_of_share=crossing.most_of_share,
        by_expert=by_expert,
        counted_size=counted_size,
        experts_stride=way.experts.stride(0),
        **{
            name: getattr(way, name).data_ptr()
            for name in ("sent", "received", "rail_tokens", "send_position", "recv_position", "slots", "node_counted")
        },
        experts=way.experts.data_ptr(),
        arrived=way.arrived.data_ptr(),
        **addresses,
        stream=extension.current_stream(geometry.device),
    )
    made = {name: part.view(shapes[name]) for name, part in zip(shapes, memory.split(sizes)) if name in Tables._fields}
    made["counted"] = made["counted"].view(torch.int64)
    return Tables(**made)


class _Rows:
    """Rows of a buffer of packed rows: chunk after chunk, and in each a block for every rank of the rail."""

    def __init__(self, way: Way, shares: Tensor, chunks: int) -> None:
        nodes, exact = way.geometry.num_nodes, way.crossing.exact
        by_chunk = shares.view(nodes, chunks, -1).sum(2).t()  # [chunks, N]
        self._before = by_chunk.cumsum(0) - by_chunk  # rows of the chunks before
        sizes = by_chunk
        if not exact:
            sizes = torch.full_like(by_chunk, way.crossing.most_of_share * (SHARES // chunks))
            sizes[:, way.geometry.rail_rank].fill_(0)
        ends = sizes.reshape(-1).cumsum(0).view_as(sizes)
        self.starts = ends - sizes
        """[chunks, N] first row of each block."""
        self.used = by_chunk.to(torch.int32)
        """[chunks, N] rows used of each."""

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
