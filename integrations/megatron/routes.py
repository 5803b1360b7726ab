"""From a routing map, as Megatron-Core's routers give it, to the expert indices and weights that a dispatch takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.extension import DTYPE_CODES
from deepep_moe.tracing import is_traced


def routes(routing_map: Tensor, probs: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices and weights of every token's routes; differentiable in ``probs``. Never waits for the device.

    Args:
        routing_map: [T, E] bool.
        probs: [T, E], any float type.
        topk: K, most routes of a token. A row with n > K routes gets the index E + n, which a plan refuses by name.

    Returns:
        [T, K] int64 experts in ascending order, -1 where a row has fewer; [T, K] fp32 probabilities, 0 there.
    """
    if is_traced(probs) or probs.dtype not in DTYPE_CODES or extension.why_not_on(routing_map.device):
        return _by_sorting(routing_map, probs, topk)
    return _Routes.apply(probs, routing_map, topk)  # type: ignore[no-any-return]


class _Routes(torch.autograd.Function):
    """One kernel each way: in front of every dispatch a chain of small operators would be most of the time."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, routing_map: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        tokens, _ = routing_map.shape
        index = torch.empty((tokens, topk), dtype=torch.int64, device=probs.device)
        weights = torch.empty((tokens, topk), dtype=torch.float32, device=probs.device)
        _launch(routing_map.contiguous(), probs.contiguous(), index, weights, backward=False)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        ctx.index, ctx.like = index, (probs.shape, probs.dtype)
        return index, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_weights = grads[1]
        if grad_weights is None:
            return None, None, None
        shape, dtype = ctx.like
        grad_probs = torch.empty(shape, dtype=dtype, device=grad_weights.device)
        _launch(None, grad_probs, ctx.index, grad_weights.contiguous(), backward=True)
        return grad_probs, None, None


def _launch(routing_map: Tensor | None, probs: Tensor, index: Tensor, weights: Tensor, *, backward: bool) -> None:
    tokens, experts = probs.shape
    with torch.cuda.device(probs.device):
        extension._C.routes(
            extension.address(routing_map),
            probs.data_ptr(),
            DTYPE_CODES[probs.dtype],
            tokens,
            experts,
            index.shape[1],
            index.data_ptr(),
            weights.data_ptr(),
            backward,
            torch._C._cuda_getCurrentRawStream(probs.device.index),
        )


def _by_sorting(routing_map: Tensor, probs: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    experts = routing_map.shape[1]
    # Number the routes so that topk lists them in expert order: its result has a fixed shape, and no ties matter.
    number = torch.arange(experts, 0, -1, dtype=torch.int32, device=routing_map.device)
    width = min(topk, experts)
    found = (routing_map * number).topk(width, dim=1).values
    index = torch.where(found > 0, experts - found, -1).long()
    count = routing_map.sum(dim=1, keepdim=True)
    index = torch.where(count > topk, experts + count, index)
    if width < topk:
        index = torch.nn.functional.pad(index, (0, topk - width), value=-1)
    weights = probs.gather(1, index.clamp(0, experts - 1)).float()
    return index, torch.where(index >= 0, weights, 0.0)
