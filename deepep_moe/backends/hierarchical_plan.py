"""The plan of several nodes: which rows cross which rail, and where each lands inside its node.

A token goes over the rail to one rank of every other node that wants it, and from there to the ranks of that node. So
each rank has a *batch* of N * C tokens: C of each rank of its rail (its own among them), of which those without an
expert in this node are left out. The backend of the node plans the batch like any other, but it orders received rows by
the rank that hands them on. The protocol orders them by the rank they come from. A plan is what places rows, so the
order costs no pass over rows: :func:`place` changes the places.

Nothing here waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Plan
from deepep_moe.backends.exchange import to_device
from deepep_moe.backends.hierarchical_counts import Arrived, Digest
from deepep_moe.backends.hierarchical_geometry import SHARES, Crossing, Geometry, share_of
from deepep_moe.backends.tensor_plan import TensorPlan

# Columns of what is known about each row that reached this rank, before those of its routes' expert rows.
RUN, SHARE, POSITION, BATCH_INDEX, FIRST_ROUTE = range(5)


class Streams:
    """The streams that use the tensors of one object, which the current stream makes."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index if device.type == "cuda" else None
        self._known = {self._current()}

    def _current(self) -> int:
        address: int = 0 if self._index is None else torch._C._cuda_getCurrentRawStream(self._index)
        return address

    def made_elsewhere(self) -> None:
        """The tensors are those of any stream."""
        self._known.clear()

    def use_on_current(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """When ``tensors()`` are freed, their memory is kept until the current stream has done what it has then."""
        current = self._current()
        if self._index is None or current in self._known:
            return
        self._known.add(current)
        stream = torch.cuda.current_stream(self._index)
        for tensor in tensors():
            tensor.record_stream(stream)


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

    def __post_init__(self) -> None:
        self._streams = Streams(self.geometry.device)

    def use_on_current_stream(self) -> None:
        """The plan may have been made on another stream."""
        self._streams.use_on_current(lambda: [getattr(self, name) for name in _WAY_TENSORS])

    def pack(self) -> Tensor:
        """All of it in one int32 tensor, so that it can go through operators with the tensors of the plan."""
        crossing = self.crossing
        numbers = (crossing.tokens, crossing.most, crossing.most_of_share, crossing.most_received)
        header = [int(crossing.exact), *numbers, *self.arrived.shape]
        parts = [to_device(torch.tensor(header, dtype=torch.int32, device="cpu"), self.geometry.device)]
        parts += [getattr(self, name) for name in _WAY_TENSORS]
        return torch.cat([part.reshape(-1).to(torch.int32) for part in parts])

    @classmethod
    def unpack(cls, geometry: Geometry, packed: Tensor, num_tokens: int) -> Way:
        """Inverse of :meth:`pack`. On a GPU it waits for the host."""
        exact, tokens, most, most_of_share, most_received, rows, columns = packed[:7].tolist()
        nodes, topk = geometry.num_nodes, columns - FIRST_ROUTE
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
        rest, tensors = packed[7:], {}
        for name, shape in shapes.items():
            size = rest.shape[0] if shape == (-1,) else torch.Size(shape).numel()
            tensors[name], rest = rest[:size].view(shape), rest[size:]
        sent, received = (tensors[name].tolist() if exact else None for name in ("sent", "received"))
        way = cls(geometry, Crossing(tokens, most, most_of_share, most_received, sent, received), **tensors)
        way._streams.made_elsewhere()
        return way


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
        engine: number of the node's backend that moves the rows.
    """

    def __init__(self, plan: TensorPlan, way: Way, engine: int) -> None:
        self.__dict__.update(plan.__dict__)
        self.way, self.engine = way, engine
        self.kept_parts: dict[object, object] = {}

    def tensors(self) -> list[Tensor | None]:
        return [*super().tensors()[:-1], self.way.pack()]


@dataclass(eq=False)
class Placed:
    """What a :class:`HierarchicalPlan` takes from :func:`place`; see there and in :class:`Plan`."""

    received: Tensor
    row_recv: Tensor
    arrived: Tensor


def place(geometry: Geometry, messages: Arrived, made: Digest, node_plan: Plan, tokens: int) -> Placed:
    """The final places of the rows that reach this rank.

    Args:
        node_plan: of as many rows as the plan has.
        tokens: C.
    """
    if geometry.kernels is None or not node_plan.num_topk:
        return _place_by_operators(geometry, messages, made, node_plan, tokens)
    topk, (num_recv, num_rows) = node_plan.num_topk, node_plan.known_sizes()
    placed = Placed(
        torch.empty((num_recv, 1 + 2 * topk), dtype=torch.int32, device=geometry.device),
        torch.empty(num_rows, dtype=torch.int32, device=geometry.device),
        torch.empty((num_recv, FIRST_ROUTE + topk), dtype=torch.int32, device=geometry.device),
    )
    geometry.kernels.place(
        messages=messages.words.data_ptr(),
        experts=messages.room.experts,
        message_room=messages.room.route_words,
        node_received=node_plan.received.data_ptr(),
        node_counted=node_plan.counted.data_ptr(),
        moved=made.moved.data_ptr(),
        num_recv=num_recv,
        num_rows=num_rows,
        room=tokens,
        num_topk=topk,
        received=placed.received.data_ptr(),
        row_recv=placed.row_recv.data_ptr(),
        arrived=placed.arrived.data_ptr(),
        stream=extension.current_stream(geometry.device),
    )
    return placed


def _place_by_operators(geometry: Geometry, messages: Arrived, made: Digest, node_plan: Plan, tokens: int) -> Placed:
    device, moved = geometry.device, made.moved
    num_recv, num_rows, topk = node_plan.num_recv, node_plan.num_rows, node_plan.num_topk
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
    received[num_recv].fill_(-1)
    row_recv = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    row_recv[torch.where(rows >= 0, rows, num_rows)] = position.to(torch.int32).unsqueeze(1).expand(-1, topk)
    share = torch.where(used, share_of(token, messages.tokens(geometry)[source]), 0)
    about = [torch.where(used, run, -1), share, torch.where(used, position, -1), batch_index]
    arrived = torch.cat([torch.stack(about, dim=1), rows], dim=1).to(torch.int32)
    return Placed(received[:-1], row_recv[:-1], arrived)
