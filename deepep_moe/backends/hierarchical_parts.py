"""The parts in which the rows of a plan of several nodes move.

The first part is the rank's own tokens, which do not wait for the network; each chunk of what crosses is another. A
part is a plan for the backend of the node, and all parts write into the same outputs. Nothing here waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe.backends.base import Layout
from deepep_moe.backends.hierarchical_counts import SHARES, share_of
from deepep_moe.backends.hierarchical_plan import (
    BATCH_INDEX,
    FIRST_ROUTE,
    POSITION,
    RUN,
    SHARE,
    HierarchicalPlan,
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
        send_rows: [T, N] int32: the row of each token in the send buffer, which has the chunks one after the other, for
            each rank of the rail; -1 for none.
        home_rows: [T, N] int32: where the sum of each node is when a token is back at home: in the buffer of C rows of
            this node's own sums and of what comes back; -1 for none. Nodes in their order.
    """

    def __init__(self, plan: HierarchicalPlan, layout: Layout, chunks: int) -> None:
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
        self.own, *self.crossing = self._plans(plan, layout, chunks, received, [sum(s) for s in recv_sizes])

    @classmethod
    def of(cls, plan: HierarchicalPlan, layout: Layout, chunks: int) -> Parts:
        """Kept with the plan for the way back."""
        parts = plan.kept_parts.get((layout, chunks))
        if not isinstance(parts, Parts):
            parts = plan.kept_parts[layout, chunks] = cls(plan, layout, chunks)
        parts.use_on_current_stream()
        return parts

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
        plan: HierarchicalPlan, layout: Layout, chunks: int, received: _Rows, chunk_rows: list[int]
    ) -> list[TensorPlan]:
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
        used, place = arrived[:, RUN] >= 0, torch.div(arrived[:, RUN], nodes, rounding_mode="floor")
        remote = geometry.run_crosses[arrived[:, RUN].clamp(min=0)]
        part_of = torch.where(remote, arrived[:, SHARE] * chunks // SHARES + 1, 0)
        run = torch.where(used, arrived[:, RUN] * parts + part_of, ranks * nodes * parts)
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
        batch_row = arrived[:, BATCH_INDEX].clamp(min=0)
        mine = used & (place == geometry.nodes.place)
        in_part = torch.where(remote, rows.reshape(-1)[batch_row] - starts[part_of], batch_row - me * tokens)
        source = torch.where(mine, in_part, 0)
        if layout is Layout.BY_EXPERT:
            places, experts, row_recv = arrived[:, FIRST_ROUTE:], way.experts, plan.row_recv
        else:
            places = arrived[:, POSITION : POSITION + 1]
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
                    identity=(plan.engine, plan.number),
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
