"""Routers: which experts each token goes to, and with which weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepep_moe.backends.checks import check_integer, describe
from deepep_moe.errors import InputError

Score = Literal["softmax", "sigmoid"]
BalanceLoss = Callable[[Tensor, Tensor], Tensor]


class Router(Protocol):
    """What :class:`~deepep_moe.nn.MoELayer` needs of a router: any callable of this signature."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From tokens to experts and weights.

        Args:
            x: [T, H] tokens of this rank; T may be 0.

        Returns:
            ``topk_idx`` [T, K], int32 or int64: the experts of each token, -1 for a dropped route; and ``topk_weights``
            [T, K], floating point, differentiable.
        """
        ...


class TopKRouter(nn.Module):
    """A linear layer, a score for each expert, and the K best experts of each token. Computes in fp32.

    The router is an ordinary module: it is replicated on all ranks, and DDP or FSDP2 treats it as any other.

    Args:
        hidden_size: H.
        num_experts: experts of the whole expert-parallel group (E).
        topk: K.
        score: ``"softmax"`` over all experts (Mixtral, Qwen3), or ``"sigmoid"`` of each (DeepSeek-V3).
        normalize: divide the K weights of a token by their sum.
        scale: multiplies the weights.
        balance_loss: a function of the scores [T, E] and ``topk_idx`` [T, K], such as ::

                lambda scores, topk_idx: 0.01 * load_balancing_loss(scores, topk_idx)

            In training its gradient is added to that of the training loss, as if the function's value had been added to
            the loss. If you scale the loss (a gradient scaler, gradient accumulation), scale this value too.
        device, dtype: of the parameter ``weight`` [E, H]; default: PyTorch's defaults.

    Raises:
        InputError: a size below 1, ``topk`` above ``num_experts``, or an unknown ``score``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        topk: int,
        *,
        score: Score = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        balance_loss: BalanceLoss | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("hidden_size", hidden_size, least=1)
        check_integer("num_experts", num_experts, least=1)
        check_integer("topk", topk, least=1, most=num_experts)
        if score not in get_args(Score):
            raise InputError("score", repr(score), f"must be one of {', '.join(get_args(Score))}")
        self.topk, self.score, self.normalize, self.scale = topk, score, normalize, scale
        self.balance_loss = balance_loss
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial values, as ``torch.nn.Linear`` does."""
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Router`; ``topk_idx`` is int64, ``topk_weights`` fp32."""
        if not torch.compiler.is_compiling() and x.shape[-1] != self.weight.shape[1]:
            raise InputError("x", f"hidden size {x.shape[-1]}", f"the router has hidden size {self.weight.shape[1]}")
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
            weights, topk_idx = scores.topk(self.topk, dim=-1)
            if self.normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = weights * self.scale
            if self.balance_loss is not None and self.training and torch.is_grad_enabled():
                weights = _AddLoss.apply(weights, _check_loss(self.balance_loss(scores, topk_idx)))
        return topk_idx, weights

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"hidden_size={hidden}, num_experts={experts}, topk={self.topk}, score={self.score}"


def load_balancing_loss(scores: Tensor, topk_idx: Tensor) -> Tensor:
    """The auxiliary loss of Switch Transformer for the tokens of this rank; 1 if all experts are equally loaded.

    Args:
        scores: [T, E] scores of each token; they are divided by their sum.
        topk_idx: [T, K] integers: the experts of each token.

    Returns:
        A scalar in the dtype of the scores: the sum over experts of (share of the routes) x (mean score) x E; 0 without
        tokens.
    """
    tokens, experts = scores.shape
    shares = scores.detach().new_zeros(experts)
    chosen = topk_idx.flatten().long()
    shares = shares.scatter_add(0, chosen.clamp(min=0), (chosen >= 0).to(scores.dtype))
    means = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).sum(0)
    return experts * (shares * means).sum() / max(topk_idx.numel() * tokens, 1)


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        shown = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else describe(loss)
        raise InputError("balance_loss(scores, topk_idx)", shown, "must be a scalar tensor")
    return loss


class _AddLoss(torch.autograd.Function):
    """Returns ``weights``, and gives ``loss`` a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)
