"""Routing without capacity: what DeepSpeed's ``TopKGate`` decides with ``drop_tokens=False``, minus the capacity.

The stock gate sizes a buffer by the busiest expert of the whole group, which costs a MAX all-reduce and a wait for the
device in every layer. Experts, weights and auxiliary loss depend on neither, so here they are computed alone. And they
are computed when they are needed: the experts of each token first (:func:`dropless_routes`), since the dispatch waits
for them; loss and counts (:func:`load`) once the tokens are on their way.

Where a call of the gate would do more than that (:func:`serves`), it is called, without its all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate, gumbel_rsample, multiplicative_jitter
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

_MM_WIDENS = "dtype" in torch.ops.aten.mm.overloads()  # torch.mm(..., out_dtype=), from 2.8; on CUDA only

_GATING = {
    name: getattr(sharded_moe, name)
    for name in ("top1gating", "top2gating", "topkgating", "gumbel_rsample", "multiplicative_jitter")
}
_FORWARD = TopKGate.forward


class Routes(NamedTuple):
    """Where tokens go. T tokens, K routes of each, E experts of the group."""

    topk_idx: Tensor
    """[T, K] int64, -1 for no route."""
    weights: Tensor
    """[T, K] fp32."""
    probs: Tensor
    """[T, E] fp32: all experts' probabilities."""


class Load(NamedTuple):
    """How the routes are spread over the E experts of the group."""

    aux_loss: Tensor
    """Scalar fp32: the load-balancing loss."""
    expert_counts: Tensor
    """[E] int64: routes of this rank to each expert."""


def serves(gate: nn.Module, x: Tensor) -> bool:
    """Whether :func:`dropless_routes` and :func:`load` are all that a call of ``gate`` for tokens ``x`` would do."""
    hooks = gate._forward_hooks or gate._forward_pre_hooks or gate._backward_hooks or gate._backward_pre_hooks
    watched = hooks or _has_any_global_hook() or torch.is_autocast_enabled(x.device.type)
    return not watched and _is_stock(gate) and not gate.drop_tokens


def call_gate(gate: nn.Module, x: Tensor, used_token: Tensor | None, use_tutel: bool) -> tuple[Tensor, Tensor, Load]:
    """What ``gate`` decides, called as DeepSpeed's layer calls it: experts ``[T, K]``, weights ``[T, K]``, the load."""
    with _alone(gate):
        aux_loss, _, _, topk_idx, _, weights, counts = gate(x, used_token, True, use_tutel)
    if not len(x):
        aux_loss = aux_loss.nan_to_num()  # a mean over nothing
    return topk_idx.t().contiguous(), weights.t().contiguous(), Load(aux_loss, counts)


@contextmanager
def _alone(gate: nn.Module) -> Iterator[None]:
    """Without its group and ``min_capacity``, which concern a capacity that nothing here uses: so ranks may differ in
    what watches their gates, and may have no tokens. With ``drop_tokens``, and for other gates, nothing changes."""
    if not _is_stock(gate) or gate.drop_tokens:
        yield
        return
    group, least = gate.ep_group, gate.min_capacity
    gate.__dict__.update(ep_group=None, min_capacity=0)
    try:
        yield
    finally:
        gate.__dict__.update(ep_group=group, min_capacity=least)


def _is_stock(gate: nn.Module) -> bool:
    return (
        type(gate) is TopKGate
        and "forward" not in vars(gate)
        and TopKGate.forward is _FORWARD
        and all(getattr(sharded_moe, name) is function for name, function in _GATING.items())
    )


def dropless_routes(gate: TopKGate, x: Tensor, used_token: Tensor | None = None) -> Routes:
    """Routes of the tokens ``x [T, M]``, every one of them kept.

    Args:
        gate: its ``wg``, ``k``, ``noisy_gate_policy`` and ``top2_2nd_expert_sampling`` apply.
        used_token: [T], 0 for tokens to leave out. Only with ``k == 1``, as in DeepSpeed.
    """
    logits = _logits(gate, x)
    probs = F.softmax(logits, dim=1)
    topk_idx = _choose(gate, logits, probs)
    if gate.k > 1:
        # Probabilities of the chosen experts over their sum, which is a softmax of their logits.
        return Routes(topk_idx, F.softmax(logits.gather(1, topk_idx), dim=1), probs)
    weights = probs.gather(1, topk_idx)
    if used_token is not None:
        left_out = used_token.reshape(-1, 1) == 0
        topk_idx, weights = topk_idx.masked_fill(left_out, -1), weights.masked_fill(left_out, 0.0)
    return Routes(topk_idx, weights, probs)


def load(gate: TopKGate, routes: Routes) -> Load:
    """Loss and counts of ``routes``, which :func:`dropless_routes` made with ``gate``."""
    tokens, experts = routes.probs.shape
    balanced = 1 if gate.k == 2 else gate.k  # for k == 2 DeepSpeed balances first choices only
    chosen = _histogram(routes.topk_idx[:, :balanced], experts)
    scale = experts / (balanced * max(tokens, 1) ** 2)
    aux_loss = torch.dot(routes.probs.sum(0), chosen.float()) * scale
    return Load(aux_loss, chosen if balanced == gate.k else _histogram(routes.topk_idx, experts))


def _logits(gate: TopKGate, x: Tensor) -> Tensor:
    """[T, E] fp32."""
    weight = gate.wg.weight
    if gate.noisy_gate_policy == "Jitter" and gate.training:
        return F.linear(multiplicative_jitter(x.float(), device=x.device), weight.float())
    if x.dtype == weight.dtype == torch.bfloat16 and not torch.is_autocast_enabled(x.device.type):
        result: Tensor = _BF16Logits.apply(x, weight)
        return result
    return F.linear(x.float(), weight.float())


class _BF16Logits(torch.autograd.Function):
    """``x.float() @ weight.float().T`` of BF16 tensors, without fp32 copies of all tokens in memory.

    Products of BF16 numbers are exact in fp32, so BF16 GEMMs that sum and return fp32 lose nothing. For the backward
    pass the fp32 gradient is split into two BF16 numbers, which keep 16 of its 24 bits: the results are rounded to 8.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _mm(x, weight.t(), torch.float32)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        high = gradient.to(x.dtype)
        split = torch.cat([high, (gradient - high).to(x.dtype)], dim=1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _mm(split, torch.cat([weight, weight]), x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _mm(split.t(), x, torch.float32).view(2, *weight.shape).sum(0).to(weight.dtype)
        return grad_x, grad_weight


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of BF16 matrices, summed in fp32, rounded to ``dtype``."""
    if not a.is_cuda or not _MM_WIDENS:
        return (a.float() @ b.float()).to(dtype)
    return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)


def _choose(gate: TopKGate, logits: Tensor, probs: Tensor) -> Tensor:
    """[T, K] experts in DeepSpeed's order, with its noise where the gate asks for it."""
    if gate.k == 1:
        noisy = gate.noisy_gate_policy == "RSample" and gate.training
        scores = logits + gumbel_rsample(logits.shape, device=logits.device) if noisy else probs
        return scores.argmax(1, keepdim=True)
    if gate.k == 2:
        first = probs.argmax(1, keepdim=True)
        if gate.top2_2nd_expert_sampling:
            logits = logits + gumbel_rsample(logits.shape, device=logits.device)
        second = logits.scatter(1, first, float("-inf")).argmax(1, keepdim=True)
        return torch.cat([first, second], dim=1)
    return probs.topk(gate.k, dim=1).indices


def _histogram(topk_idx: Tensor, experts: int) -> Tensor:
    """[E] int64: how often each expert is there; -1 counts for nobody."""
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=topk_idx.device)
    bins = topk_idx.reshape(-1) % (experts + 1)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:experts]
