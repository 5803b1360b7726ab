"""The messages that the ranks of several nodes exchange about a batch before they plan it, and what follows from them.

Every rank sends one message to each rank (:class:`Room` of hierarchical_geometry.py says what it holds), in one
all-to-all. :func:`digest` computes on the device what follows from the messages. Where the host waits, it reads a part
of that, the :class:`Findings`, and knows all sizes of the plan.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.checks import overflow_text
from deepep_moe.backends.exchange import to_device
from deepep_moe.backends.headers import HEADER_WORDS, reason_of, refused_by
from deepep_moe.backends.hierarchical_geometry import NUM_HEAD, SHARES, Crossing, Geometry, Room, share_of
from deepep_moe.backends.tables import Tables
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, DeepEPMoEError, InputError

# Words of a message after the header. An index below -1 or beyond the experts is marked by 1 more than it, no such
# index by 0.
_TOKENS, _LOWEST, _HIGHEST, _MAX_RECV, _MAX_ROWS = range(NUM_HEAD)
# First words of a digest.
_DIFFER, _NUM_BAD, _MOST_TOKENS, _NUM_RECV, _NUM_ROWS, _MOST, _MOST_OF_SHARE, _MOST_RECEIVED, _NUM_FOUND = range(9)
_RECEIVED = NUM_HEAD  # rows that a rank receives, and its expert rows: what a digest adds to the head of each rank
_ROWS, _NUM_ABOUT = _RECEIVED + 1, _RECEIVED + 2
NO_LIMIT = 2**31 - 1


class Batch(NamedTuple):
    """What a plan is made of; without routes (K = 0), ``in_rank`` and ``num_tokens_per_expert`` are given."""

    topk_idx: Tensor
    """[T, K] int64."""
    num_experts: int
    in_rank: Tensor | None
    """[T, R] bool."""
    num_tokens_per_expert: Tensor | None
    """[E] int32."""
    max_recv: int | None
    max_rows: int | None


def count(geometry: Geometry, batch: Batch, header: list[int], room: Room, tables: Tables) -> Tensor:
    """Count a batch on this rank alone, without a host wait.

    Args:
        room: what there is no room for is left out of the messages.
        tables: gets ``send_slot`` and ``send_position`` (see :class:`Way`), and memory for :func:`digest`.

    Returns:
        [words of all messages, 8] uint8: the messages of this rank to each rank, in rank order.
    """
    limits = [NO_LIMIT if limit is None else limit for limit in (batch.max_recv, batch.max_rows)]
    (tokens, topk), device = batch.topk_idx.shape, geometry.device
    if geometry.kernels is None or not topk:
        return _count_by_operators(geometry, batch, header, room, limits, tables)
    ranks, nodes, local = geometry.num_ranks, geometry.num_nodes, room.experts // geometry.num_ranks
    tables.allocate(
        int64={
            "found": (_NUM_FOUND + 2 * nodes * SHARES + local + ranks * (HEADER_WORDS + _NUM_ABOUT),),
            "counted": (ranks * ranks + 2 * local + 1,),
            "moved": (ranks, 1 + local),
            "rail_tokens": (nodes,),
        },
        int32={"send_slot": (tokens, ranks), "send_position": (tokens, nodes), "bad": (1,)},
    )
    messages = torch.empty((sum(geometry.message_sizes(room)), 8), dtype=torch.uint8, device=device)
    geometry.kernels.summarize(
        topk_idx=batch.topk_idx.data_ptr(),
        num_tokens=tokens,
        num_topk=topk,
        num_experts=batch.num_experts,
        max_recv=limits[0],
        max_rows=limits[1],
        header=header,
        messages=messages.data_ptr(),
        experts=room.experts,
        room=room.route_words,
        **tables.addresses("send_slot", "send_position"),
        stream=extension.current_stream(device),
    )
    return messages


def no_batch(geometry: Geometry, header: list[int], room: Room) -> Tensor:
    """Messages of a rank that has nothing to plan: headers alone."""
    device = geometry.device
    words = torch.zeros(geometry.message_words(room), dtype=torch.int64, device=device)
    words[:HEADER_WORDS] = to_device(torch.tensor(header, dtype=torch.int64, device="cpu"), device)
    return _messages(geometry, words, torch.zeros(room.route_words, dtype=torch.int64, device=device))


def _messages(geometry: Geometry, words: Tensor, routes: Tensor) -> Tensor:
    """``words`` to all ranks, and ``routes`` to those of the rail."""
    parts = [torch.cat([words, routes]) if in_rail else words for in_rail in geometry.to_rail]
    return torch.cat(parts).view(torch.uint8).view(-1, 8)


def _count_by_operators(
    geometry: Geometry, batch: Batch, header: list[int], room: Room, limits: list[int], tables: Tables
) -> Tensor:
    topk_idx, num_experts, in_rank, device = batch.topk_idx, batch.num_experts, batch.in_rank, geometry.device
    tokens = topk_idx.shape[0]
    if in_rank is None:
        in_rank = geometry.in_ranks(topk_idx, num_experts)
    in_node = geometry.in_nodes(in_rank)
    share = share_of(torch.arange(tokens, dtype=torch.int64, device=device), tokens)
    to_node = torch.zeros((SHARES, geometry.num_nodes), dtype=torch.int64, device=device)
    to_node.index_add_(0, share, in_node.long())
    head = torch.zeros(NUM_HEAD, dtype=torch.int64, device=device)
    for word, value in zip((_TOKENS, _MAX_RECV, _MAX_ROWS), (tokens, *limits)):
        head[word].fill_(value)  # (an assignment would copy from the host, which waits)
    if topk_idx.shape[1]:
        flat = topk_idx.reshape(-1)
        good = (flat >= 0) & (flat < num_experts)
        to_expert = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        to_expert = to_expert.index_add_(0, torch.where(good, flat, num_experts), torch.ones_like(flat))[:-1]
        if tokens:
            head[_LOWEST] = (flat.amin() + 1).clamp(max=0)
            head[_HIGHEST] = torch.where(flat.amax() >= num_experts, flat.amax().clamp(max=2**63 - 2) + 1, 0)
        told = torch.where(good, flat, -1)
    else:
        assert batch.num_tokens_per_expert is not None
        to_expert = batch.num_tokens_per_expert.long()
        told = in_rank[:, geometry.by_node].reshape(-1)
    if num_experts != room.experts:
        to_expert = to_expert.new_zeros(room.experts)
    routes = torch.zeros(2 * room.route_words, dtype=torch.int32, device=device)
    if told.shape[0] <= routes.shape[0]:
        routes[: told.shape[0]] = told
    crossing = in_node[:, geometry.rail_nodes]
    crossing[:, geometry.rail_rank].fill_(False)
    words = [
        to_device(torch.tensor(header, dtype=torch.int64, device="cpu"), device),
        head,
        in_rank.sum(0),
        to_node.t().reshape(-1),
        to_expert,
    ]
    tables.put(send_slot=positions(in_rank, 0), send_position=positions(crossing, 0))
    return _messages(geometry, torch.cat(words), routes.view(torch.int64))


def positions(marks: Tensor, dim: int) -> Tensor:
    """The number of each set mark among those along ``dim``, or -1: int32."""
    return torch.where(marks, marks.cumsum(dim, dtype=torch.int32) - 1, -1).to(torch.int32)


class Arrived(NamedTuple):
    """The messages of all ranks to this one."""

    words: Tensor
    """[words of all messages, 8] uint8."""
    room: Room

    def summaries(self, geometry: Geometry) -> Tensor:
        """``[R, words]`` int64 without routes, by operators."""
        size = geometry.message_words(self.room)
        parts = self.words.view(torch.int64)[:, 0].split(geometry.message_sizes(self.room))
        return torch.stack([part[:size] for part in parts])

    def tokens(self, geometry: Geometry) -> Tensor:
        """``[R]`` tokens of each rank, by operators."""
        return self.summaries(geometry)[:, HEADER_WORDS + _TOKENS]

    def told(self, geometry: Geometry, columns: int) -> Tensor:
        """``[N, C', columns]`` int32 of the ranks of the rail, in its order, by operators. C' tokens are as many as
        there is room for."""
        size = geometry.message_words(self.room)
        parts = self.words.view(torch.int64)[:, 0].split(geometry.message_sizes(self.room))
        tokens = 2 * self.room.route_words // columns
        numbers = torch.stack([parts[rank][size:].view(torch.int32) for rank in geometry.rail_ranks])
        return numbers[:, : tokens * columns].view(geometry.num_nodes, tokens, columns)


def digest(
    geometry: Geometry, arrived: Arrived, tables: Tables, *, has_routes: bool, alignment: int, most_tokens: int
) -> None:
    """What follows from the messages of all ranks: ``found`` (see :class:`Findings`), ``counted`` (as in
    :class:`Plan`), and ``moved``, ``rail_tokens``, ``send_shares``, ``recv_shares`` and ``bad`` (see :class:`Way`).

    Args:
        tables: of :func:`count`; gets the results.
        most_tokens: the part of a rank with more tokens is an error.
    """
    room = arrived.room
    if geometry.kernels is None or not has_routes:
        counts = Counts(geometry, arrived.summaries(geometry), room.experts, has_routes, alignment)
        tables.put(**counts.digest(most_tokens))
        return
    shares = (geometry.num_nodes, SHARES)
    tables.name_part("send_shares", "found", _NUM_FOUND, shares)
    tables.name_part("recv_shares", "found", _NUM_FOUND + geometry.num_nodes * SHARES, shares)
    geometry.kernels.digest(
        messages=arrived.words.data_ptr(),
        experts=room.experts,
        room=room.route_words,
        alignment=alignment,
        most_tokens=most_tokens,
        **tables.addresses("found", "counted", "moved", "rail_tokens", "bad"),
        stream=extension.current_stream(geometry.device),
    )


class Counts:
    """A digest by PyTorch's operators.

    Args:
        geometry: on the device of the table.
        table: ``[R, words]`` int64, the message of each rank without routes.
        has_routes: without them there are no expert rows.
    """

    def __init__(self, geometry: Geometry, table: Tensor, num_experts: int, has_routes: bool, alignment: int) -> None:
        ranks, nodes = geometry.num_ranks, geometry.num_nodes
        self.geometry, self.has_routes, self.alignment = geometry, has_routes, alignment
        sizes = [HEADER_WORDS, NUM_HEAD, ranks, nodes * SHARES, num_experts]
        self.headers, self.head, self.to_rank, to_node, self.to_expert = table.split(sizes, 1)
        self.to_node = to_node.view(ranks, nodes, SHARES)
        """[R, N, SHARES] tokens of each rank for each node, by share of the rank's tokens."""

    @cached_property
    def routes(self) -> Tensor:
        """[R, L] rows of each expert."""
        return self.to_expert.sum(0).view(self.geometry.num_ranks, -1)

    @cached_property
    def padded(self) -> Tensor:
        """[R, L] the same with padding."""
        return torch.div(self.routes + (self.alignment - 1), self.alignment, rounding_mode="floor") * self.alignment

    @cached_property
    def about(self) -> Tensor:
        """[R, _NUM_ABOUT] about each rank: the head of its message, the rows that it receives, its expert rows."""
        received = self.to_rank.sum(0)
        rows = self.padded.sum(1) if self.has_routes else torch.zeros_like(received)
        return torch.cat([self.head, received.unsqueeze(1), rows.unsqueeze(1)], dim=1)

    def digest(self, most_tokens: int) -> dict[str, Tensor]:
        """The rows of one source rank are a run in the order of the node's plan and in that of the protocol, and so are
        those of a source rank and an expert: a run moves as a whole, and nothing needs to be sorted."""
        geometry, me, device = self.geometry, self.geometry.nodes.rank, self.to_rank.device
        offsets = torch.zeros(self.padded.shape[1] + 1, dtype=torch.int64, device=device)
        runs = self.to_rank[:, me : me + 1]  # of rows, then of each local expert
        if self.has_routes:
            offsets[1:] = self.padded[me].cumsum(0)
            runs = torch.cat([runs, self.to_expert.view(geometry.num_ranks, geometry.num_ranks, -1)[:, me]], dim=1)
        in_order = runs[geometry.runs]
        moved = torch.empty_like(runs)
        moved[geometry.runs] = in_order - in_order.cumsum(0)
        sent = self.to_node[me][geometry.rail_nodes]
        received = self.to_node[:, geometry.nodes.node][geometry.rail_members]
        sent[geometry.rail_rank].fill_(0)
        received[geometry.rail_rank].fill_(0)
        differ = (self.headers != self.headers[0]).any() | (self.headers[:, 0] != 0).any()
        num_bad = self._bad(most_tokens).sum()
        tokens = self.head[:, _TOKENS]
        mine = self.about[me, _RECEIVED:]
        found = [
            torch.stack([differ.long(), num_bad, tokens.amax(), *mine.unbind(0), *self._most_crossing()]),
            sent.reshape(-1),
            received.reshape(-1),
            self.routes[me],
            torch.cat([self.headers, self.about], dim=1).reshape(-1),
        ]
        return {
            "found": torch.cat(found),
            "counted": torch.cat([self.to_rank.cumsum(0).reshape(-1), self.routes[me], offsets]),
            "moved": moved + runs.cumsum(0) - runs,
            "rail_tokens": tokens[geometry.rail_members],
            "send_shares": sent,
            "recv_shares": received,
            "bad": (differ | (num_bad > 0)).to(torch.int32).view(1),
        }

    def _bad(self, most_tokens: int) -> Tensor:
        """[R] bool: ranks whose part in the plan is an error."""
        tokens, lowest, highest, max_recv, max_rows, received, rows = self.about.unbind(1)
        return (tokens > most_tokens) | (lowest != 0) | (highest != 0) | (received > max_recv) | (rows > max_rows)

    def _most_crossing(self) -> tuple[Tensor, Tensor, Tensor]:
        """``most``, ``most_of_share`` and ``most_received`` of :class:`Crossing`."""
        geometry, device = self.geometry, self.to_node.device
        own = geometry.node_of.view(-1, 1, 1)
        nodes = torch.arange(geometry.num_nodes, dtype=torch.int64, device=device).view(1, -1, 1)
        crossing = torch.where(own == nodes, 0, self.to_node)
        shape = (geometry.node_size, *crossing.shape[1:])
        by_place = torch.zeros(shape, dtype=torch.int64, device=device).index_add_(0, geometry.place_of, crossing)
        return crossing.sum((1, 2)).amax(), crossing.amax(), by_place.amax()


class Findings:
    """What the host reads of a digest.

    Args:
        found: ``found`` of :func:`digest`, on the CPU.
    """

    def __init__(self, geometry: Geometry, found: Tensor) -> None:
        ranks, shares = geometry.num_ranks, geometry.num_nodes * SHARES
        self._geometry = geometry
        self._found, self._about_first = found, found.shape[0] - ranks * (HEADER_WORDS + _NUM_ABOUT)
        numbers = found[: _NUM_FOUND + 2 * shares].tolist()
        self.num_bad, self.most_tokens, self.num_recv, self.num_rows = numbers[_NUM_BAD:_MOST]
        self.differ = bool(numbers[_DIFFER])
        """Whether ranks disagree or one of them refuses the plan."""
        self._most = numbers[_MOST:_NUM_FOUND]
        self._sent, self._received = numbers[_NUM_FOUND:][:shares], numbers[_NUM_FOUND + shares :]

    @property
    def expert_rows(self) -> Tensor:
        """[L] int64."""
        return self._found[_NUM_FOUND + len(self._sent) + len(self._received) : self._about_first]

    @property
    def _about(self) -> Tensor:
        return self._found[self._about_first :].view(self._geometry.num_ranks, -1)

    @property
    def headers(self) -> Tensor:
        """[R, HEADER_WORDS] int64."""
        return self._about[:, :HEADER_WORDS]

    def crossing(self, room: int, exact: bool) -> Crossing:
        """``room``: :attr:`Crossing.tokens`."""
        sent, received = (
            [shares[i : i + SHARES] for i in range(0, len(shares), SHARES)] if exact else None
            for shares in (self._sent, self._received)
        )
        most, most_of_share, most_received = self._most
        return Crossing(room, most, most_of_share, most_received, sent, received)

    def raise_problems(self, config: DispatcherConfig, most_tokens: int, num_experts: int) -> None:
        """Raise what is wrong with the batch of a rank: the error itself on the rank that it is about; on the others
        CapacityError where it is about a lack of room alone, else PeerError."""
        if not self.num_bad:
            return
        problems = {}
        for rank, about in enumerate(self._about[:, HEADER_WORDS:].tolist()):
            problem = _problem(rank, about, config, most_tokens, num_experts)
            if problem is not None:
                problems[rank] = problem
        if self._geometry.nodes.rank in problems:
            raise problems[self._geometry.nodes.rank]
        raise refused_by({rank: reason_of(error) for rank, error in problems.items()}, "plan")


def _problem(
    rank: int, about: list[int], config: DispatcherConfig, most_tokens: int, num_experts: int
) -> DeepEPMoEError | None:
    tokens, lowest, highest, max_recv, max_rows, received, rows = about
    for mark in (lowest, highest):
        if mark:
            return InputError("topk_idx", mark - 1, f"an expert must be -1 (dropped) or 0 to {num_experts - 1}")
    if tokens > most_tokens:
        return CapacityError(too_many_tokens(rank, tokens, most_tokens))
    for needed, limit, what, setting in (
        (received, max_recv, "received tokens", "max_recv"),
        (rows, max_rows, "expert rows", "max_rows"),
    ):
        if needed > limit:
            text = overflow_text(config, rank, needed, what, setting, limit)
            return CapacityError(text, needed=needed, room=limit)
    return None


def too_many_tokens(rank: int, tokens: int, most_tokens: int) -> str:
    """What a CapacityError says of a plan of fixed size."""
    return (
        f"rank {rank} has {tokens} tokens, but the first plan of fixed size was made for at most {most_tokens} of a "
        "rank: set max_tokens_per_rank"
    )
