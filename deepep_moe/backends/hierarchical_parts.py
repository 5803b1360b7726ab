"""The parts in which the rows of a plan of several nodes move.

The first part is the rank's own tokens, which do not wait for the network; each chunk of what crosses is another. A
part is a plan for the backend of the node, and all parts write into the same outputs. Nothing here waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Layout
from deepep_moe.backends.hierarchical_geometry import SHARES, share_of
from deepep_moe.backends.hierarchical_plan import BATCH_INDEX, FIRST_ROUTE, POSITION, RUN, SHARE, HierarchicalPlan, Way
from deepep_moe.backends.rail import Blocks
from deepep_moe.backends.tables import Tables
from deepep_moe.backends.tensor_plan import PlanBase


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
        geometry, crossing = plan.way.geometry, plan.way.crossing
        send_sizes = crossing.block_sizes(crossing.sent, chunks, geometry)
        recv_sizes = crossing.block_sizes(crossing.received, chunks, geometry)
        chunk_rows = [sum(sizes) for sizes in recv_sizes]
        self.num_sent, self.num_received = sum(map(sum, send_sizes)), sum(chunk_rows)
        by_expert = layout is Layout.BY_EXPERT
        self.tables = Tables(geometry.device)
        make = tables_by_operators if geometry.kernels is None or not plan.num_topk else tables_by_kernels
        make(self.tables, plan, by_expert, chunks, self.num_received)
        if not by_expert:
            self.tables.put(row_recv=plan.recv_src_idx.contiguous())
        self.send_rows, self.home_rows = self.tables.tensor("send_rows"), self.tables.tensor("home_rows")
        send_used: list[Tensor] | list[None] = [None] * chunks
        recv_used: list[Tensor] | list[None] = send_used
        if not crossing.exact:
            send_used, recv_used = (list(self.tables.tensor(name).unbind(0)) for name in ("send_used", "recv_used"))
        self.send = [Blocks(*blocks) for blocks in zip(send_sizes, send_used)]
        self.recv = [Blocks(*blocks) for blocks in zip(recv_sizes, recv_used)]

        self.own = Part(plan, self.tables, by_expert, 0, 0, plan.num_tokens)
        self.crossing = []
        first = 0
        for part, rows in enumerate(chunk_rows, 1):
            self.crossing.append(Part(plan, self.tables, by_expert, part, first, rows))
            first += rows

    @classmethod
    def of(cls, plan: HierarchicalPlan, layout: Layout, chunks: int) -> Parts:
        """Kept with the plan for the way back."""
        parts = plan.kept_parts.get((layout, chunks))
        plan.way.use_on_current_stream()  # it may have been made on another
        if parts is None:
            parts = plan.kept_parts[layout, chunks] = cls(plan, layout, chunks)
        assert isinstance(parts, Parts)
        parts.tables.on_new_stream()
        return parts


class Part(PlanBase):
    """One part as a plan for the backend of the node.

    Args:
        plan: of all parts.
        tables: of all parts, see :func:`tables_by_operators`.
        part: its number.
        first: its first row of the receive buffer.
        num_tokens: its rows there, or the rank's own tokens.
    """

    extra = expert_counts_host = None

    def __init__(
        self, plan: HierarchicalPlan, tables: Tables, by_expert: bool, part: int, first: int, num_tokens: int
    ) -> None:
        # The plan keeps its parts: with a reference to it, it would not be freed before garbage collection.
        self._tables, self._part, self._first, self._no_routes = tables, part, first, plan.way.geometry.no_routes
        self.num_experts, self.num_ranks = plan.way.node_plan.num_experts, plan.way.geometry.node_size
        self.alignment, self.identity = plan.alignment, (plan.mover, plan.number)
        self.num_tokens, self.num_topk = num_tokens, plan.num_topk if by_expert else 1
        self.num_recv, self.num_rows = plan.num_recv, plan.num_rows if by_expert else plan.num_recv
        self._row_recv = plan.way.tables if by_expert else tables  # where it is: the first part zeroes padding

    def known_sizes(self) -> tuple[int, int]:
        return self.num_recv, self.num_rows

    def addresses(self) -> tuple[int, int, int, int]:
        tables, part, ranks = self._tables, self._part, self.num_ranks
        counted_size = ranks * ranks + 2 * (self.num_experts // ranks) + 1
        return (
            tables.address("chunk_slots") + 4 * self._first * ranks if part else tables.address("own_slots"),
            tables.address("counted") + 8 * part * counted_size,
            tables.address("placed") + 4 * part * self.num_recv * (1 + 2 * self.num_topk),
            tables.address("no_padding") if part else self._row_recv.address("row_recv"),
        )

    @property
    def topk_idx(self) -> Tensor:
        return self._no_routes.expand(self.num_tokens, self.num_topk)

    @property
    def send_slot(self) -> Tensor:
        if self._part:
            return self._tables.tensor("chunk_slots")[self._first : self._first + self.num_tokens]
        return self._tables.tensor("own_slots")

    @property
    def counted(self) -> Tensor:
        return self._tables.tensor("counted")[self._part]

    @property
    def received(self) -> Tensor:
        return self._tables.tensor("placed")[self._part]

    @property
    def row_recv(self) -> Tensor:
        return self._tables.tensor("no_padding") if self._part else self._row_recv.tensor("row_recv")


def tables_by_operators(tables: Tables, plan: HierarchicalPlan, by_expert: bool, chunks: int, recv_rows: int) -> None:
    """Make the tensors of :class:`Parts`, by PyTorch's operators. P parts, the first of them this rank's own tokens:

    * ``send_used``, ``recv_used`` [chunks, N] int32: rows used of each block.
    * ``send_rows``, ``home_rows``: see :class:`Parts`.
    * ``counted`` [P, ...] int64: ``counted`` of each part.
    * ``own_slots`` [T, G] int32: ``send_slot`` of the first part.
    * ``chunk_slots`` [rows of the receive buffer, G] int32: of the others, one after the other.
    * ``no_padding`` [rows of the output] int32 zeros: ``row_recv`` of all parts but the first, which zeroes padding.
    * ``placed`` [P, N, 1 + 2 * K] int32: ``received`` of each part. The rank layout is an expert layout with one expert
      per rank (K = 1), because only expert rows can be placed in another order than the node's plan has.

    Args:
        tables: gets them.
        recv_rows: rows of the receive buffer.
    """
    way, geometry, tokens = plan.way, plan.way.geometry, plan.way.crossing.tokens
    slots, node_counted = way.node_plan.send_slot, way.node_plan.counted
    rail_tokens, arrived = way.tables.tensor("rail_tokens"), way.tables.tensor("arrived").long()
    recv_position = way.tables.tensor("recv_position")
    device, ranks, nodes, me = geometry.device, geometry.node_size, geometry.num_nodes, geometry.rail_rank
    parts = 1 + chunks
    sent, received = (_Rows(way, way.tables.tensor(name), chunks) for name in ("send_shares", "recv_shares"))

    token = torch.arange(plan.num_tokens, dtype=torch.int64, device=device)
    send_rows = sent.rows(share_of(token, plan.num_tokens) * chunks // SHARES, way.tables.tensor("send_position"))
    home_rows = torch.where(send_rows >= 0, send_rows + tokens, -1)
    home_rows[:, me] = token

    # Rows of the batch: the row of the receive buffer, the part and the run of tokens with equal part.
    token = torch.arange(tokens, dtype=torch.int64, device=device)
    chunk = share_of(token.unsqueeze(0), rail_tokens.unsqueeze(1)).clamp(max=SHARES - 1) * chunks // SHARES
    rows = received.rows(chunk.t(), recv_position.t()).t()  # [N, C]
    part = chunk + 1
    part[me].fill_(0)
    rank = torch.arange(nodes, dtype=torch.int64, device=device)
    run = (rank.unsqueeze(1) * parts + part).reshape(-1)
    goes = slots >= 0
    counts = torch.zeros((nodes * parts, ranks), dtype=torch.int64, device=device).index_add_(0, run, goes.long())
    slots = torch.where(goes, slots - _moved(counts, parts)[run], -1).to(torch.int32)
    chunk_slots = torch.full((recv_rows + 1, ranks), -1, dtype=torch.int32, device=device)
    chunk_slots[torch.where(rows >= 0, rows, recv_rows).reshape(-1)] = slots
    goes_to = counts.view(nodes, parts, ranks).sum(0)  # [P, G]

    # Rows that reached this rank.
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
    prefix = torch.where(node_counted[0] < 0, -1, prefix)  # a plan that failed on the device

    # This rank's own rows are read where they are in the part.
    starts = torch.cat([received.starts.new_zeros(1), received.starts[:, 0]])  # of each part
    batch_row = arrived[:, BATCH_INDEX].clamp(min=0)
    mine = used & (place == geometry.nodes.place)
    in_part = torch.where(remote, rows.reshape(-1)[batch_row] - starts[part_of], batch_row - me * tokens)
    source = torch.where(mine, in_part, 0)
    places = arrived[:, FIRST_ROUTE:] if by_expert else arrived[:, POSITION : POSITION + 1]
    experts = way.node_plan.recv_topk_idx if by_expert else torch.zeros_like(places)
    entries = torch.cat([source.unsqueeze(1), experts, places], dim=1).to(torch.int32)
    placed = torch.full((parts, entries.shape[0] + 1, entries.shape[1]), -1, dtype=torch.int32, device=device)
    placed[part_of, index] = entries
    tables.put(
        send_used=sent.used,
        recv_used=received.used,
        send_rows=send_rows.to(torch.int32),
        home_rows=home_rows[:, geometry.rail_rank_of_node].to(torch.int32).contiguous(),
        counted=torch.cat([prefix, node_counted[ranks * ranks :].expand(parts, -1)], dim=1),
        own_slots=slots[me * tokens : me * tokens + plan.num_tokens],
        chunk_slots=chunk_slots[:-1],
        no_padding=torch.zeros(plan.num_rows if by_expert else plan.num_recv, dtype=torch.int32, device=device),
        placed=placed[:, :-1].contiguous(),
    )


def tables_by_kernels(tables: Tables, plan: HierarchicalPlan, by_expert: bool, chunks: int, recv_rows: int) -> None:
    """The same in three kernels (csrc/nodes/parts.cu)."""
    way, geometry, crossing = plan.way, plan.way.geometry, plan.way.crossing
    ranks, nodes, parts, topk = geometry.node_size, geometry.num_nodes, 1 + chunks, plan.num_topk
    tokens, node_plan = plan.num_tokens, way.node_plan
    slots, node_counted, node_received, _ = node_plan.addresses()
    counted_size = ranks * ranks + 2 * (node_plan.num_experts // ranks) + 1
    shapes = {
        # Zeroed by the kernels.
        "batch_counts": (nodes * parts * ranks,),
        "arrived_counts": (nodes * parts * ranks,),
        "no_padding": (plan.num_rows if by_expert else plan.num_recv,),
        # Filled with -1 by the kernels.
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
    tables.allocate(int64={"counted": (parts, counted_size)}, int32=shapes)
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
        sent=way.tables.address("send_shares"),
        received=way.tables.address("recv_shares"),
        slots=slots,
        node_counted=node_counted,
        experts=node_received + 4,
        experts_stride=1 + 2 * topk,
        **way.tables.addresses("rail_tokens", "send_position", "recv_position", "arrived"),
        **tables.addresses("counted", *shapes),
        stream=extension.current_stream(geometry.device),
    )


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
