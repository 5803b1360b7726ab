"""The plan of several nodes: which rows cross which rail, and where each lands inside its node.

A token goes over the rail to one rank of each other node that has one of its experts, and from there to the ranks of
that node. So each rank has a *batch* of N * C tokens: C of each rank of its rail (its own included), without those that
have no expert in this node. The backend of the node plans the batch like any other. It orders received rows by the rank
of the node that forwards them, the protocol by their source rank. :func:`place` changes the places in the plan, so no
row has to be moved again.

Nothing here waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.backends.base import Plan
from deepep_moe.backends.exchange import to_device
from deepep_moe.backends.hierarchical_counts import Arrived
from deepep_moe.backends.hierarchical_geometry import SHARES, Crossing, Geometry, share_of
from deepep_moe.backends.tables import Tables
from deepep_moe.backends.tensor_plan import PlanBase, TensorPlan

# Columns of what is known about each row that reached this rank, before those of its routes' expert rows.
RUN, SHARE, POSITION, BATCH_INDEX, FIRST_ROUTE = range(5)


@dataclass(eq=False)
class Way:
    """The way of a batch through the nodes: what a plan of this backend has beside the tensors of every plan."""

    geometry: Geometry
    crossing: Crossing
    tables: Tables
    """On the device, beside ``send_slot``, ``counted``, ``received`` and ``row_recv`` of :class:`Plan`:

    * ``send_shares`` [N, SHARES] int64: tokens of this rank for each rank of the rail, by share.
    * ``recv_shares`` [N, SHARES] int64: tokens of each rank of the rail for this rank, by share.
    * ``rail_tokens`` [N] int64: tokens of each rank of the rail.
    * ``send_position`` [T, N] int32: the number of each token among those for a rank of the rail, or -1.
    * ``recv_position`` [N, C] int32: the number of each token of a rank of the rail among those for this rank, or -1.
    * ``moved`` [R, 1 + L] int64, while the plan is made: how far the rows of each source rank move from the order of
      the node's plan to that of the protocol, among all rows and within the rows of each local expert.
    * ``arrived`` [N, 4 + K] int32 about each row that reached this rank, in the order of the node's plan: its place and
      rail rank in one number (``Geometry.runs``), its share, its position in rank layout, its index in the batch of the
      rank that forwarded it, and its expert rows. The first is -1 in unused rows.
    * ``bad`` [1] int32: not 0 where ranks disagree, or the part of a rank in the plan is an error.
    """
    node_plan: Plan
    """The plan of the node, for the batch."""
    checked: bool
    """Whether the host knows that ``bad`` is 0."""

    def pack(self) -> Tensor:
        """All of it in one int32 tensor, so that it can go through operators with the tensors of the plan."""
        crossing, node = self.crossing, self.node_plan
        numbers = (crossing.tokens, crossing.most, crossing.most_of_share, crossing.most_received)
        header = [int(crossing.exact), int(self.checked), *numbers]
        parts = [to_device(torch.tensor(header, dtype=torch.int32, device="cpu"), self.geometry.device)]
        parts += [self.tables.tensor(name) for name in _PACKED]
        parts += [node.send_slot, node.received, node.counted]
        return torch.cat([part.reshape(-1).to(torch.int32) for part in parts])

    @classmethod
    def unpack(cls, geometry: Geometry, packed: Tensor, plan: TensorPlan) -> Way:
        """Inverse of :meth:`pack`, for the ``plan`` that came with it. On a GPU it waits for the host."""
        exact, checked, tokens, most, most_of_share, most_received = packed[:6].tolist()
        nodes, topk, rows = geometry.num_nodes, plan.num_topk, plan.num_recv
        shapes = {
            "send_shares": (nodes, SHARES),
            "recv_shares": (nodes, SHARES),
            "rail_tokens": (nodes,),
            "bad": (1,),
            "send_position": (plan.num_tokens, nodes),
            "recv_position": (nodes, tokens),
            "arrived": (rows, FIRST_ROUTE + topk),
            "node_send_slot": (nodes * tokens, geometry.node_size),
            "node_received": (rows, 1 + 2 * topk),
        }
        rest, tensors = packed[6:], {}
        for name, shape in shapes.items():
            part, rest = rest.tensor_split([torch.Size(shape).numel()])
            tensors[name] = part.view(shape).to(_PACKED.get(name, torch.int32))
        node_plan = TensorPlan(
            num_experts=plan.num_experts // nodes,
            alignment=plan.alignment,
            identity=(0, 0),
            topk_idx=geometry.no_routes.expand(nodes * tokens, topk),
            send_slot=tensors.pop("node_send_slot"),
            counted=rest.long(),
            received=tensors.pop("node_received"),
            row_recv=plan.row_recv,
            expert_counts_host=None,
        )
        tables = Tables(geometry.device, made_here=False)
        tables.put(send_slot=plan.send_slot, counted=plan.counted, received=plan.received, row_recv=plan.row_recv)
        tables.put(**tensors)
        sent, received = (tensors[name].tolist() if exact else None for name in ("send_shares", "recv_shares"))
        crossing = Crossing(tokens, most, most_of_share, most_received, sent, received)
        return cls(geometry, crossing, tables, node_plan, bool(checked))

    def use_on_current_stream(self) -> None:
        """The plan may have been made on another stream."""
        if (stream := self.tables.on_new_stream()) is not None:
            for tensor in self.node_plan.memory():
                tensor.record_stream(stream)


_PACKED = {
    "send_shares": torch.int64,
    "recv_shares": torch.int64,
    "rail_tokens": torch.int64,
    "bad": torch.int32,
    "send_position": torch.int32,
    "recv_position": torch.int32,
    "arrived": torch.int32,
}


class HierarchicalPlan(PlanBase):
    """A :class:`Plan` that knows the :class:`Way` of its rows.

    Args:
        identity: as of every plan.
        topk_idx: [T, K] int64.
        sizes: N and M.
        mover: number of the node's backend that moves the rows.
        expert_counts_host: as of every plan.
    """

    def __init__(
        self,
        way: Way,
        num_experts: int,
        alignment: int,
        identity: tuple[int, int] | Tensor,
        topk_idx: Tensor,
        sizes: tuple[int, int],
        mover: int,
        expert_counts_host: Tensor | None,
    ) -> None:
        self.way, self.num_experts, self.alignment, self.identity = way, num_experts, alignment, identity
        self.topk_idx, self.mover, self.expert_counts_host = topk_idx, mover, expert_counts_host
        self.num_tokens, self.num_topk = topk_idx.shape
        self.num_recv, self.num_rows = sizes
        self.num_ranks = way.geometry.num_ranks
        self.kept_parts: dict[object, object] = {}

    def known_sizes(self) -> tuple[int, int]:
        return self.num_recv, self.num_rows

    def memory(self) -> list[Tensor]:
        return [self.topk_idx, *self.way.tables.memory]

    @property
    def send_slot(self) -> Tensor:
        return self.way.tables.tensor("send_slot")

    @property
    def counted(self) -> Tensor:
        return self.way.tables.tensor("counted")

    @property
    def received(self) -> Tensor:
        return self.way.tables.tensor("received")

    @property
    def row_recv(self) -> Tensor:
        return self.way.tables.tensor("row_recv")

    @property
    def extra(self) -> Tensor:
        return self.way.pack()


def place(
    geometry: Geometry, messages: Arrived, tables: Tables, node_plan: Plan, tokens: int, sizes: tuple[int, int]
) -> None:
    """The final places of the rows that reach this rank: ``received``, ``row_recv`` and ``arrived`` in ``tables``.

    Args:
        node_plan: of as many rows as the plan has.
        tokens: C.
        sizes: N and M.
    """
    topk, (num_recv, num_rows) = node_plan.num_topk, sizes
    if geometry.kernels is None or not topk:
        tables.put(**_place_by_operators(geometry, messages, tables.tensor("moved"), node_plan, tokens))
        return
    _, node_counted, node_received, _ = node_plan.addresses()
    geometry.kernels.place(
        messages=messages.words.data_ptr(),
        experts=messages.room.experts,
        message_room=messages.room.route_words,
        node_received=node_received,
        node_counted=node_counted,
        num_recv=num_recv,
        num_rows=num_rows,
        room=tokens,
        num_topk=topk,
        **tables.addresses("moved", "received", "row_recv", "arrived"),
        stream=extension.current_stream(geometry.device),
    )


def _place_by_operators(
    geometry: Geometry, messages: Arrived, moved: Tensor, node_plan: Plan, tokens: int
) -> dict[str, Tensor]:
    device = geometry.device
    num_recv, num_rows, topk = node_plan.num_recv, node_plan.num_rows, node_plan.num_topk
    batch_index = node_plan.recv_src_idx.long()
    used, number = batch_index >= 0, torch.arange(num_recv, dtype=torch.int64, device=device)
    forwarded = node_plan.rank_prefix[:, geometry.nodes.place].contiguous()
    place_of = torch.searchsorted(forwarded, number, right=True)
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
    return {"received": received[:-1], "row_recv": row_recv[:-1], "arrived": arrived}
