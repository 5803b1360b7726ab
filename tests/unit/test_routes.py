"""Indices and weights from a routing map, against the map itself."""

from __future__ import annotations

import pytest
import torch

from deepep_moe.integrations.megatron.routes import routes


@pytest.mark.parametrize("topk", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_route_is_listed_with_its_probability(topk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(topk)
    experts = 4
    wanted = [torch.randperm(experts, generator=generator)[: i % (min(topk, experts) + 1)].tolist() for i in range(9)]
    routing_map = torch.tensor([[e in row for e in range(experts)] for row in wanted])
    probs = torch.rand(9, experts, generator=generator).to(dtype).requires_grad_()
    index, weights = routes(routing_map, probs, topk)
    for token, row in enumerate(wanted):
        listed = sorted(row) + [-1] * (topk - len(row))
        assert index[token].tolist() == listed
        assert weights[token].tolist() == [float(probs.detach()[token, e]) if e >= 0 else 0.0 for e in listed]

    weights.mul(torch.arange(weights.numel()).view_as(weights)).sum().backward()
    grad = torch.zeros(9, experts)
    for token, row in enumerate(index.tolist()):
        for k, expert in enumerate(row):
            if expert >= 0:
                grad[token, expert] = token * topk + k
    assert probs.grad is not None
    assert torch.equal(probs.grad, grad.to(dtype))


def test_a_row_with_too_many_routes_gets_an_index_that_no_plan_takes() -> None:
    routing_map = torch.ones(1, 5, dtype=torch.bool)
    index, _ = routes(routing_map, torch.rand(1, 5), 2)
    assert index[0, 0] == 5 + 5
