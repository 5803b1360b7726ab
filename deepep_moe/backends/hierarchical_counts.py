"""What the ranks of several nodes tell each other about a batch before they plan it, and what follows from it.

Every rank sends one row of numbers to all ranks (:func:`summarize`). Where the host waits for these rows it knows all
sizes of the plan at once, so a plan waits for the host once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.checks import overflow_text
from deepep_moe.backends.exchange import reason_of, refused_by
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, DeepEPMoEError, InputError
from deepep_moe.extension import _C, why_not_on
from deepep_moe.topology import NodeGroups, Nodes

SHARES = 8
"""The tokens of a rank are counted in this many shares of consecutive tokens: a chunk is one or more of them."""
# Summaries begin with these. An index below -1 or beyond the experts is marked by 1 more than it, no such index by 0.
_TOKENS, _LOWEST, _HIGHEST, _MAX_RECV, _MAX_ROWS, _NUM_HEAD = range(6)
_NO_LIMIT = 2**31 - 1


class Geometry:
    """Nodes and rails as this rank sees them, as tensors on ``device`` where device code needs them."""

    def __init__(self, nodes: Nodes, groups: NodeGroups, device: torch.device) -> None:
        self.nodes, self.device = nodes, device
        self.num_ranks, self.num_nodes, self.node_size = len(nodes.node_of), nodes.count, nodes.size
        self.rail_ranks = groups.rails[nodes.place]
        self.rail_rank = self.rail_ranks.index(nodes.rank)
        """The place of this rank in its rail."""
        self.node_of, self.place_of = self.tensor(nodes.node_of), self.tensor(nodes.place_of)
        self.by_node = self.tensor([rank for members in nodes.members for rank in members])
        """[R] ranks, node by node."""
        self.rail_nodes = self.tensor([nodes.node_of[rank] for rank in self.rail_ranks])
        """[N] the node of each rank of the rail."""
        self.rail_rank_of_node = self.tensor([self.rail_ranks.index(rank) for rank in nodes.rail(nodes.place)])
        """[N] for each node the place of its rank in the rail."""
        self.runs = self.tensor([rank for rail in groups.rails for rank in rail])
        """[G * N] source ranks in the order in which the backend of this node delivers their rows."""
        self.run_crosses = self.node_of[self.runs] != nodes.node
        """[G * N] whether they are of other nodes."""
        self.rail_members = self.tensor(self.rail_ranks)
        """[N] ranks of the rail."""
        self.none_bad = torch.zeros(1, dtype=torch.int32, device=device)
        self.kernels: _C.NodeMap | None = None
        """The kernels of csrc/nodes on these nodes, where the extension serves the device."""
        if why_not_on(device) is None:
            self.kernels = _C.NodeMap(
                num_ranks=self.num_ranks,
                num_nodes=self.num_nodes,
                node_size=self.node_size,
                rank=nodes.rank,
                node=nodes.node,
                place=nodes.place,
                rail_rank=self.rail_rank,
                **{
                    name: getattr(self, name).data_ptr()
                    for name in ("node_of", "place_of", "rail_members", "rail_nodes", "runs")
                },
            )

    def tensor(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu").to(self.device)

    def expert_in_node(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """Global experts to experts of this node in the order of its ranks; -1 for those of other nodes."""
        local = num_experts // self.num_ranks
        owner = torch.div(topk_idx.clamp(min=0, max=num_experts - 1), local, rounding_mode="floor")
        here = (topk_idx >= 0) & (self.node_of[owner] == self.nodes.node)
        return torch.where(here, self.place_of[owner] * local + topk_idx % local, -1)

    def in_ranks(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """``[T, R]`` bool: the ranks that own an expert of each token."""
        owner = torch.div(topk_idx.long(), num_experts // self.num_ranks, rounding_mode="floor")
        owner = torch.where((topk_idx >= 0) & (topk_idx < num_experts), owner, self.num_ranks)
        marks = torch.zeros((topk_idx.shape[0], self.num_ranks + 1), dtype=torch.bool, device=self.device)
        return marks.scatter_(1, owner, True)[:, :-1]

    def in_nodes(self, in_rank: Tensor) -> Tensor:
        """``[T, R]`` bool -> ``[T, N]``."""
        return in_rank[:, self.by_node].view(in_rank.shape[0], self.num_nodes, self.node_size).any(2)

    def summary_words(self, num_experts: int) -> int:
        return _NUM_HEAD + self.num_ranks + self.num_nodes * SHARES + num_experts


@dataclass(eq=False)
class Crossing:
    """What crosses this rank's rail, both ways: sizes that the host knows.

    In plans of exact size ``sent`` and ``received`` count rows. In plans of fixed size, and where the rail wants equal
    blocks (:attr:`Rail.moves_unused_rows`), they are None and each block of a chunk has room for ``most_of_share`` rows
    of each of its shares.
    """

    tokens: int
    """C: the batch has room for so many tokens of each rank of the rail."""
    most: int
    """Rows that any rank of the group sends over its rail, at most."""
    most_of_share: int
    """Rows that any rank sends to another node from one share of its tokens, at most."""
    most_received: int
    """Rows that any rank receives over its rail from one share of the tokens of all, at most."""
    sent: list[list[int]] | None
    """[N][SHARES] tokens for each rank of the rail."""
    received: list[list[int]] | None
    """[N][SHARES] tokens from each."""

    @property
    def exact(self) -> bool:
        """Whether blocks have no unused rows."""
        return self.sent is not None

    def most_rows(self, chunks: int) -> int:
        """Rows of a part, own tokens or a chunk, on any rank, at most."""
        return max(self.tokens, self.most_received * (SHARES // chunks))

    def block_sizes(self, shares: list[list[int]] | None, chunks: int, geometry: Geometry) -> list[tuple[int, ...]]:
        """[chunks][N] rows."""
        each = SHARES // chunks
        if shares is None:
            size = self.most_of_share * each
            sizes = tuple(0 if rank == geometry.rail_rank else size for rank in range(geometry.num_nodes))
            return [sizes] * chunks
        return [tuple(sum(of_rank[c * each : (c + 1) * each]) for of_rank in shares) for c in range(chunks)]


def share_of(token: Tensor, num_tokens: Tensor | int) -> Tensor:
    """The share that ``token`` of ``num_tokens`` belongs to."""
    if isinstance(num_tokens, int):
        return torch.div(token * SHARES, max(num_tokens, 1), rounding_mode="floor")
    return torch.div(token * SHARES, num_tokens.clamp(min=1), rounding_mode="floor")


class Counted(NamedTuple):
    """A batch, counted on this rank alone."""

    summary: Tensor
    """[words] int64: what this rank tells all ranks. The number of tokens, marks of expert indices that do not exist,
    the limits, tokens for each rank [R], tokens for each node and share [N, SHARES], routes to each expert [E]."""
    send_slot: Tensor
    """[T, R] int32: the number of each token among those for a rank, or -1."""
    send_position: Tensor
    """[T, N] int32: the same for the ranks of the rail; -1 for this rank."""


def count(
    geometry: Geometry,
    topk_idx: Tensor,
    num_experts: int,
    in_rank: Tensor | None,
    num_tokens_per_expert: Tensor | None,
    max_recv: int | None,
    max_rows: int | None,
) -> Counted:
    """Count a batch, without a host wait. Without routes, ``in_rank [T, R]`` and counts of the experts are given."""
    limits = [_NO_LIMIT if limit is None else limit for limit in (max_recv, max_rows)]
    (tokens, topk), device = topk_idx.shape, geometry.device
    if geometry.kernels is None or not topk:
        if in_rank is None:
            in_rank = geometry.in_ranks(topk_idx, num_experts)
        return _count_by_operators(geometry, topk_idx, num_experts, in_rank, num_tokens_per_expert, limits)
    counted = Counted(
        torch.zeros(geometry.summary_words(num_experts), dtype=torch.int64, device=device),
        torch.empty((tokens, geometry.num_ranks), dtype=torch.int32, device=device),
        torch.empty((tokens, geometry.num_nodes), dtype=torch.int32, device=device),
    )
    geometry.kernels.summarize(
        topk_idx=topk_idx.data_ptr(),
        num_tokens=tokens,
        num_topk=topk,
        num_experts=num_experts,
        max_recv=limits[0],
        max_rows=limits[1],
        **{name: tensor.data_ptr() for name, tensor in counted._asdict().items()},
        stream=extension.current_stream(device),
    )
    return counted


def _count_by_operators(
    geometry: Geometry,
    topk_idx: Tensor,
    num_experts: int,
    in_rank: Tensor,
    num_tokens_per_expert: Tensor | None,
    limits: list[int],
) -> Counted:
    device, tokens = geometry.device, topk_idx.shape[0]
    in_node = geometry.in_nodes(in_rank)
    share = share_of(torch.arange(tokens, dtype=torch.int64, device=device), tokens)
    to_node = torch.zeros((SHARES, geometry.num_nodes), dtype=torch.int64, device=device)
    to_node.index_add_(0, share, in_node.long())
    head = torch.zeros(_NUM_HEAD, dtype=torch.int64, device=device)
    for word, value in zip((_TOKENS, _MAX_RECV, _MAX_ROWS), (tokens, *limits)):
        head[word].fill_(value)  # (an assignment would copy from the host, which waits)
    if topk_idx.shape[1]:
        routes = topk_idx.reshape(-1)
        good = (routes >= 0) & (routes < num_experts)
        to_expert = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        to_expert = to_expert.index_add_(0, torch.where(good, routes, num_experts), torch.ones_like(routes))[:-1]
        if tokens:
            head[_LOWEST] = (routes.amin() + 1).clamp(max=0)
            head[_HIGHEST] = torch.where(routes.amax() >= num_experts, routes.amax() + 1, 0)
    else:
        assert num_tokens_per_expert is not None
        to_expert = num_tokens_per_expert.long()
    crossing = in_node[:, geometry.rail_nodes]
    crossing[:, geometry.rail_rank].fill_(False)
    return Counted(
        torch.cat([head, in_rank.sum(0), to_node.t().reshape(-1), to_expert]),
        positions(in_rank, 0),
        positions(crossing, 0),
    )


def positions(marks: Tensor, dim: int) -> Tensor:
    """The number of each set mark among those along ``dim``, or -1: int32."""
    return torch.where(marks, marks.cumsum(dim, dtype=torch.int32) - 1, -1).to(torch.int32)


class Digest(NamedTuple):
    """What plans need of the counts of all ranks; int64 on the device."""

    counted: Tensor
    """``Plan.counted`` of this rank."""
    moved: Tensor
    """[R, 1 + L] how far the rows of each source rank move from the order of the node's plan to that of the protocol:
    among all rows, and within the rows of each local expert."""
    sent: Tensor
    """[N, SHARES] tokens of this rank for each rank of its rail, by share."""
    received: Tensor
    """[N, SHARES] tokens of each rank of the rail for this rank."""
    rail_tokens: Tensor
    """[N] tokens of each rank of the rail."""


class Counts:
    """The summaries of all ranks, on whatever device they are.

    Args:
        geometry: on the device of the table.
        table: ``[R, words]`` int64, row r as rank r's :func:`summarize` gave it.
        topk: K; without routes (0) there are no expert rows.
    """

    def __init__(self, geometry: Geometry, table: Tensor, num_experts: int, topk: int, alignment: int) -> None:
        ranks, nodes = geometry.num_ranks, geometry.num_nodes
        self.has_routes = topk > 0
        self.geometry, self.table, self.num_experts, self.alignment = geometry, table, num_experts, alignment
        head, self.to_rank, to_node, self.to_expert = table.split([_NUM_HEAD, ranks, nodes * SHARES, num_experts], 1)
        self.to_node = to_node.view(ranks, nodes, SHARES)
        """[R, N, SHARES] tokens of each rank for each node, by share of the rank's tokens."""
        self.tokens, self.lowest, self.highest, self.max_recv, self.max_rows = head.unbind(1)

    @cached_property
    def received(self) -> Tensor:
        """[R] rows that each rank receives."""
        return self.to_rank.sum(0)

    @cached_property
    def routes(self) -> Tensor:
        """[E] rows of each expert."""
        return self.to_expert.sum(0)

    @cached_property
    def padded(self) -> Tensor:
        """[R, L] the same with padding."""
        padded = torch.div(self.routes + (self.alignment - 1), self.alignment, rounding_mode="floor") * self.alignment
        return padded.view(self.geometry.num_ranks, -1)

    @cached_property
    def rows(self) -> Tensor:
        """[R] expert rows that each rank gets, padding included."""
        return self.padded.sum(1) if self.has_routes else torch.zeros_like(self.received)

    @cached_property
    def digest(self) -> Digest:
        """What plans need of the counts, on the device."""
        if self.geometry.kernels is None or not self.has_routes:
            return self._digest_by_operators()
        ranks, nodes, local = (
            self.geometry.num_ranks,
            self.geometry.num_nodes,
            self.num_experts // self.geometry.num_ranks,
        )

        def longs(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device=self.table.device)

        digest = Digest(
            counted=longs(ranks * ranks + 2 * local + 1),
            moved=longs(ranks, 1 + local),
            sent=longs(nodes, SHARES),
            received=longs(nodes, SHARES),
            rail_tokens=longs(nodes),
        )
        self.geometry.kernels.digest(
            table=self.table.data_ptr(),
            stride=self.table.stride(0),
            num_experts=self.num_experts,
            alignment=self.alignment,
            **{name: tensor.data_ptr() for name, tensor in digest._asdict().items()},
            stream=extension.current_stream(self.table.device),
        )
        return digest

    def _digest_by_operators(self) -> Digest:
        """The rows of one source rank are a run in the order of the node's plan and in that of the protocol, and so are
        those of a source rank and an expert: a run moves as a whole, and nothing needs to be sorted."""
        geometry, me, device = self.geometry, self.geometry.nodes.rank, self.table.device
        offsets = torch.zeros(self.padded.shape[1] + 1, dtype=torch.int64, device=device)
        runs = self.to_rank[:, me : me + 1]  # of rows, then of each local expert
        if self.has_routes:
            offsets[1:] = self.padded[me].cumsum(0)
            runs = torch.cat([runs, self.to_expert.view(geometry.num_ranks, geometry.num_ranks, -1)[:, me]], dim=1)
        in_order = runs[geometry.runs]
        moved = torch.empty_like(runs)
        moved[geometry.runs] = in_order - in_order.cumsum(0)
        sent, received = self.crossing()
        return Digest(
            counted=torch.cat([self.to_rank.cumsum(0).reshape(-1), self.routes.view_as(self.padded)[me], offsets]),
            moved=moved + runs.cumsum(0) - runs,
            sent=sent,
            received=received,
            rail_tokens=self.tokens[geometry.rail_members],
        )

    def crossing(self) -> tuple[Tensor, Tensor]:
        """[N, SHARES] tokens of this rank for each rank of its rail, and of each of them for this rank."""
        geometry = self.geometry
        sent = self.to_node[geometry.nodes.rank][geometry.rail_nodes]
        received = self.to_node[:, geometry.nodes.node][geometry.rail_members]
        sent[geometry.rail_rank].fill_(0)
        received[geometry.rail_rank].fill_(0)
        return sent, received

    def most_crossing(self) -> tuple[int, int, int]:
        """``most``, ``most_of_share`` and ``most_received`` of :class:`Crossing`, from counts on the host."""
        own = self.geometry.node_of.view(-1, 1, 1)
        nodes = torch.arange(self.geometry.num_nodes, dtype=torch.int64, device=self.table.device).view(1, -1, 1)
        crossing = torch.where(own == nodes, 0, self.to_node)
        shape = (self.geometry.node_size, *crossing.shape[1:])
        by_place = torch.zeros(shape, dtype=torch.int64, device=self.table.device)
        by_place.index_add_(0, self.geometry.place_of, crossing)
        return int(crossing.sum((1, 2)).amax()), int(crossing.amax()), int(by_place.amax())

    def sizes(self, most_tokens: int, exact: bool) -> Crossing:
        """What crosses, from counts on the host."""
        sent, received = (shares.tolist() if exact else None for shares in self.crossing())
        return Crossing(most_tokens, *self.most_crossing(), sent, received)

    def bad(self, most_tokens: int) -> Tensor:
        """[R] bool: ranks whose part in this plan is an error."""
        return (
            (self.tokens > most_tokens)
            | (self.lowest != 0)
            | (self.highest != 0)
            | (self.received > self.max_recv)
            | (self.rows > self.max_rows)
        )

    def raise_problems(self, config: DispatcherConfig, most_tokens: int) -> None:
        """Raise what :meth:`bad` marks: the error itself on the rank that it is about; on the others CapacityError
        where it is about a lack of room alone, else PeerError."""
        problems = {rank: self._problem(rank, config, most_tokens) for rank in self._bad_ranks(most_tokens)}
        if self.geometry.nodes.rank in problems:
            raise problems[self.geometry.nodes.rank]
        if problems:
            raise refused_by({rank: reason_of(error) for rank, error in problems.items()}, "plan")

    def _bad_ranks(self, most_tokens: int) -> list[int]:
        return [rank for rank, bad in enumerate(self.bad(most_tokens).tolist()) if bad]

    def _problem(self, rank: int, config: DispatcherConfig, most_tokens: int) -> DeepEPMoEError:
        for mark in (int(self.lowest[rank]), int(self.highest[rank])):
            if mark:
                allowed = f"an expert must be -1 (dropped) or 0 to {self.num_experts - 1}"
                return InputError("topk_idx", mark - 1, allowed)
        tokens = int(self.tokens[rank])
        if tokens > most_tokens:
            return CapacityError(too_many_tokens(rank, tokens, most_tokens))
        needed, limit, what, setting = self.received, self.max_recv, "received tokens", "max_recv"
        if int(needed[rank]) <= int(limit[rank]):
            needed, limit, what, setting = self.rows, self.max_rows, "expert rows", "max_rows"
        rows, room = int(needed[rank]), int(limit[rank])
        return CapacityError(overflow_text(config, rank, rows, what, setting, room), needed=rows, room=room)


def too_many_tokens(rank: int, tokens: int, most_tokens: int) -> str:
    """What a CapacityError says of a plan of fixed size."""
    return (
        f"rank {rank} has {tokens} tokens, but the first plan of fixed size was made for at most {most_tokens} of a "
        "rank: set max_tokens_per_rank"
    )
