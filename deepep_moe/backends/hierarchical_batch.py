"""The batch of a rank among several nodes, its own tokens and those from its rail, and the engine's plan of it."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe.backends.base import Backend, Layout, Plan
from deepep_moe.backends.exchange import Exchange
from deepep_moe.backends.hierarchical_plan import Crossing, Geometry, number_in_blocks, positions
from deepep_moe.backends.rail import Blocks, Rail
from deepep_moe.errors import InputError

TO_NODE = 32  # in what all ranks are told, counts for nodes are above counts for ranks in one number


class Batches:
    """Makes batches.

    Args:
        exchange: of the whole group.
        engine: the backend of this rank's node.
    """

    def __init__(self, geometry: Geometry, exchange: Exchange, rail: Rail, engine: Backend) -> None:
        self._geometry, self._exchange, self._rail, self._engine = geometry, exchange, rail, engine

    def private(self, topk_idx: Tensor, num_experts: int, in_rank: Tensor, in_node: Tensor) -> list[int]:
        """Tokens for each rank, and above them tokens for each node by rail rank; what all ranks are to know.

        The host has to wait for it, so it looks at the routes as well.
        """
        numbers = [in_rank.sum(0), in_node.sum(0)]
        if topk_idx.numel():
            numbers += [topk_idx.amin().view(1), topk_idx.amax().view(1)]
        host = self._exchange.to_host("plan", torch.cat(numbers)).tolist()
        ranks, nodes = self._geometry.num_ranks, self._geometry.nodes.count
        to_rank, to_node, experts = host[:ranks], host[ranks : ranks + nodes], host[ranks + nodes :]
        for expert in experts:
            if not -1 <= expert < num_experts:
                raise InputError("topk_idx", expert, f"an expert must be -1 (dropped) or 0 to {num_experts - 1}")
        for node, tokens in enumerate(to_node):
            to_rank[node] += tokens << TO_NODE
        return to_rank

    def crossing(self, to_node: Tensor, in_node: Tensor) -> Crossing:
        """``to_node [R, R]``: tokens of each rank for each node, by rail rank; the rest is zero."""
        geometry, me = self._geometry, self._geometry.rail_rank
        sent = to_node[geometry.nodes.rank, : geometry.nodes.count].tolist()
        received = to_node[list(geometry.rail_ranks), me].tolist()
        sent[me] = received[me] = 0
        to_own = to_node.gather(1, torch.tensor(geometry.own_rail_rank, dtype=torch.int64, device="cpu").unsqueeze(1))
        most = int((to_node.sum(1) - to_own.squeeze(1)).max())
        in_node = in_node.clone()
        in_node[:, me] = False
        return Crossing(sent, received, most, positions(in_node, sum(sent)))

    def plan(
        self,
        crossing: Crossing,
        topk_idx: Tensor,
        num_experts: int,
        alignment: int,
        in_rank: Tensor,
        num_tokens_per_expert: Tensor | None,
    ) -> tuple[Plan, Tensor]:
        """The engine's plan of this rank's batch, and ``[N, 4]`` int32 about the rows that reach this rank, in the
        engine's order: source rank, token, number among the rows that crossed with it, and how many these were."""
        geometry, topk = self._geometry, topk_idx.shape[1]

        # Over the rail: the token, and its routes or (without them) the ranks of the node that want it.
        num_tokens, size = topk_idx.shape[0], geometry.node_size
        routes = topk_idx if topk else in_rank[:, geometry.by_node].long()
        meta = torch.cat([crossing.tokens.unsqueeze(1), routes[crossing.tokens]], dim=1).to(torch.int32)
        meta = self._rail.start("plan", meta, Blocks(tuple(crossing.sent)), Blocks(tuple(crossing.received)), 0, 1)()
        came = meta[:, 1:].long()
        experts_in_node = num_experts // self._geometry.num_ranks * size
        if topk:
            batch = torch.cat([topk_idx, came])
            node_plan = self._engine.plan(
                geometry.expert_in_node(batch, num_experts), experts_in_node, alignment=alignment
            )
        else:
            assert num_tokens_per_expert is not None
            mine = slice(self._geometry.nodes.node * size, (self._geometry.nodes.node + 1) * size)
            node_plan = self._engine.plan(
                None,
                experts_in_node,
                alignment=alignment,
                is_token_in_rank=torch.cat([routes, came])[:, mine] > 0,
                num_tokens_per_expert=self._experts_of_node(num_tokens_per_expert),
            )

        # To the ranks inside the node: where each row comes from.
        number, block = number_in_blocks(crossing.received, self._geometry.device)
        own = torch.arange(num_tokens, dtype=torch.int64, device=self._geometry.device)
        zeros = torch.zeros_like(own)
        sizes = geometry.tensor(crossing.received)
        facts = torch.cat(
            [
                torch.stack([zeros + self._geometry.nodes.rank, own, zeros, zeros], dim=1),
                torch.stack([geometry.rail_rank_of[block], meta[:, 0].long(), number, sizes[block]], dim=1),
            ]
        ).to(torch.int32)
        facts = self._engine.dispatch(node_plan, facts.view(torch.float32), layout=Layout.BY_SOURCE).x
        return node_plan, facts.view(torch.int32)

    def _experts_of_node(self, num_tokens_per_expert: Tensor) -> Tensor:
        """What this rank's batch has for each expert of its node, of what the rail's ranks count for their own."""
        geometry = self._geometry
        local = num_tokens_per_expert.shape[0] // self._geometry.num_ranks
        by_node = num_tokens_per_expert.view(self._geometry.num_ranks, local)[geometry.by_node]
        by_node = by_node.view(self._geometry.nodes.count, -1)[list(geometry.rail_nodes)].contiguous()
        ones = Blocks((1,) * geometry.nodes.count)
        return self._rail.start("plan", by_node, ones, ones, 0, 1)().sum(0, dtype=torch.int32)
