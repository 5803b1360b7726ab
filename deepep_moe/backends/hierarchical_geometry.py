"""Nodes and rails as one rank sees them, the sizes of the messages between ranks, and what crosses a rail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepep_moe.backends.exchange import Transfer
from deepep_moe.backends.headers import HEADER_WORDS
from deepep_moe.extension import _C, why_not_on
from deepep_moe.topology import NodeGroups, Nodes

SHARES = 8
"""The tokens of a rank are counted in this many shares of consecutive tokens: a chunk is one or more of them."""
NUM_HEAD = 5
"""Words of a message about the whole batch."""


class Room(NamedTuple):
    """Room in messages; equal on all ranks.

    A message holds, in int64 words: the header of headers.py, the number of tokens, marks of expert indices that do
    not exist, the limits, tokens for each rank [R], tokens for each node and share [N, SHARES], routes to each expert.
    Between the ranks of a rail follow the experts of each token ([T, K] int32) or, in plans without routes, which ranks
    it goes to ([T, R] int32, node by node).
    """

    experts: int = 0
    route_words: int = 1024

    def serves(self, experts: int, most_tokens: int, columns: int) -> bool:
        """Whether it suffices for a batch with so many numbers about each token."""
        return experts == self.experts and most_tokens * columns <= 2 * self.route_words

    def grown(self, experts: int, most_tokens: int, columns: int) -> Room:
        """Numbers of tokens vary from batch to batch, hence the margin."""
        words = -(-most_tokens * columns // 2)
        return Room(experts, self.route_words if words <= self.route_words else words + words // 4)


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
        in_rail = [rank in self.rail_ranks for rank in range(self.num_ranks)]
        self.to_rail = tuple(map(int, in_rail))
        """[R] 1 for the ranks of the rail, else 0."""
        self.rail_before = self.tensor([sum(in_rail[:rank]) for rank in range(self.num_ranks)])
        """[R] ranks of the rail among the ranks before each."""
        self.runs = self.tensor([rank for rail in groups.rails for rank in rail])
        """[G * N] source ranks in the order in which the backend of this node delivers their rows."""
        self.run_crosses = self.node_of[self.runs] != nodes.node
        """[G * N] whether they are of other nodes."""
        self.rail_members = self.tensor(self.rail_ranks)
        """[N] ranks of the rail."""
        self._message_sizes: dict[Room, list[int]] = {}
        self.none_bad = torch.zeros(1, dtype=torch.int32, device=device)
        self.no_routes = torch.zeros((), dtype=torch.int64, device=device)
        """Placeholder for the routes of plans whose routes are not read."""
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
                    for name in ("node_of", "place_of", "rail_members", "rail_nodes", "rail_before", "runs")
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

    def message_words(self, room: Room) -> int:
        """Of a message, without the routes of its tokens."""
        return HEADER_WORDS + NUM_HEAD + self.num_ranks + self.num_nodes * SHARES + room.experts

    def message_sizes(self, room: Room) -> list[int]:
        """[R] words of the message for or from each rank."""
        sizes = self._message_sizes.get(room)
        if sizes is None:
            words = self.message_words(room)
            sizes = [words + in_rail * room.route_words for in_rail in self.to_rail]
            self._message_sizes[room] = sizes
        return sizes

    def swap(self, messages: Tensor, room: Room) -> Transfer:
        """The exchange of the messages for all ranks with those from all ranks, ``[words of all, 8]`` uint8."""
        sizes = self.message_sizes(room)
        return Transfer(messages, sizes, sizes, torch.empty_like(messages))


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
