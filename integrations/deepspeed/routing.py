"""Routing without capacity: what DeepSpeed's ``TopKGate`` decides with ``drop_tokens=False``, minus the capacity.

The stock gate sizes a buffer by the busiest expert of the whole group, which costs a MAX all-reduce and a wait for the
device in every layer. Experts, weights and auxiliary loss depend on neither, so here they are computed alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate, gumbel_rsample, multiplicative_jitter
from torch import Tensor


class Routes(NamedTuple):
    """Where tokens go. T tokens, K routes of each, E experts of the group."""

    topk_idx: Tensor
    """[T, K] integers, -1 for no route."""
    weights: Tensor
    """[T, K] fp32."""
    aux_loss: Tensor
    """Scalar fp32: the load-balancing loss."""
    expert_counts: Tensor
    """[E] int64: routes of this rank to each expert."""


def dropless_routes(gate: TopKGate, x: Tensor, used_token: Tensor | None = None) -> Routes:
    """Routes of the tokens ``x [T, M]``, every one of them kept.

    Args:
        gate: its ``wg``, ``k``, ``noisy_gate_policy`` and ``top2_2nd_expert_sampling`` apply.
        used_token: [T], 0 for tokens to leave out. Only with ``k == 1``, as in DeepSpeed.
    """
    tokens = x.float()
    if gate.noisy_gate_policy == "Jitter" and gate.training:
        tokens = multiplicative_jitter(tokens, device=x.device)
    logits = F.linear(tokens, gate.wg.weight.float())
    probs = F.softmax(logits, dim=1)
    count, experts = probs.shape

    topk_idx = _choose(gate, logits, probs)
    weights = probs.gather(1, topk_idx)
    kept = torch.ones_like(topk_idx)
    if gate.k == 1 and used_token is not None:
        kept = (used_token.reshape(-1, 1) != 0).to(topk_idx.dtype)
        weights = weights * kept
    elif gate.k > 1:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)

    # For k == 2 DeepSpeed balances first choices only.
    balanced = 1 if gate.k == 2 else gate.k
    chosen = _histogram(topk_idx[:, :balanced], kept[:, :balanced], experts)
    mean_probs = probs.sum(0) / max(count, 1)
    share = chosen.float() / max(count, 1)
    aux_loss = (mean_probs * share).sum() * (experts / balanced)
    counts = chosen if balanced == gate.k else _histogram(topk_idx, kept, experts)
    return Routes(topk_idx.masked_fill(kept == 0, -1), weights, aux_loss, counts)


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


def _histogram(experts: Tensor, kept: Tensor, size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int64, device=experts.device)
    return counts.scatter_add_(0, experts.reshape(-1), kept.reshape(-1))
