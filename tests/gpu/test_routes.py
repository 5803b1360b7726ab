"""The kernel that reads routing maps, against PyTorch's operators on the CPU."""

from __future__ import annotations

import pytest
import torch

from deepep_moe.integrations.megatron.routes import routes
from tests.gpu.conftest import Ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 4, 1), (33, 7, 9), (300, 256, 8), (0, 16, 2)])
def test_indices_weights_and_gradients(ranks: Ranks, tokens: int, experts: int, topk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(1) < torch.randint(
        0, min(topk, experts) + 1, (tokens, 1), generator=generator
    )
    probs = torch.rand(tokens, experts, generator=generator).to(dtype).requires_grad_()
    grad = torch.rand(tokens, topk, generator=generator)
    on_gpu = probs.detach().to(ranks.device).requires_grad_()

    wanted_index, wanted_weights = routes(chosen, probs, topk)
    index, weights = routes(chosen.to(ranks.device), on_gpu, topk)
    assert torch.equal(index.cpu(), wanted_index)
    assert torch.equal(weights.cpu(), wanted_weights)

    # Where there is no route the weight is a constant: its gradient must reach no probability.
    wanted_weights.backward(grad)
    weights.backward(grad.to(ranks.device))
    assert probs.grad is not None
    assert on_gpu.grad is not None
    assert torch.equal(on_gpu.grad.cpu(), probs.grad)


def test_a_row_with_too_many_routes(ranks: Ranks) -> None:
    index, _ = routes(torch.ones(3, 40, dtype=torch.bool, device=ranks.device), torch.rand(3, 40).to(ranks.device), 8)
    assert index[:, 0].tolist() == [80] * 3
