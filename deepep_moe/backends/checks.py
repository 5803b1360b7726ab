"""Entry checks that the backends share: shapes, dtypes, devices. No values: looking at them would stop the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe.backends.base import Plan
from deepep_moe.backends.collective import (
    SENT_DTYPES,
    SUMMED_DTYPES,
    _check_token_in_rank,
    check_rows,
    check_shape,
    check_topk_idx,
)
from deepep_moe.errors import HandleError, InputError
from deepep_moe.fp8 import BLOCK


def check_plan_inputs(
    topk_idx: Tensor | None,
    num_experts: int,
    alignment: int,
    is_token_in_rank: Tensor | None,
    num_tokens_per_expert: Tensor | None,
    world_size: int,
    device: torch.device,
) -> None:
    """The arguments of :meth:`Backend.plan`."""
    if topk_idx is not None:
        check_topk_idx(topk_idx, num_experts, world_size, device)
        if is_token_in_rank is not None:
            check_shape("is_token_in_rank", is_token_in_rank, (topk_idx.shape[0], world_size), device, torch.bool)
    else:
        _check_token_in_rank(is_token_in_rank, num_tokens_per_expert, num_experts, world_size, device)
    if alignment < 1:
        raise InputError("alignment", alignment, "must be at least 1")


def check_plan(plan: Plan, grouped: bool, world_size: int, device: torch.device) -> None:
    """That ``plan`` can be executed by a group of ``world_size`` on ``device`` in the layout asked for."""
    if plan.send_slot.dim() != 2 or plan.send_slot.shape[1] != world_size:
        raise HandleError(f"the plan was made for {plan.send_slot.shape[-1]} ranks, this group has {world_size}")
    if plan.send_slot.device != device:
        raise HandleError(f"the plan was made on {plan.send_slot.device}, this group's backend is on {device}")
    if grouped and plan.num_topk == 0:
        raise HandleError("the plan was made without expert indices: it has no expert layout")


def check_dispatch(
    plan: Plan,
    x: Tensor,
    scales: Tensor | None,
    weights: Tensor | None,
    quantize: bool,
    grouped: bool,
    world_size: int,
    device: torch.device,
) -> None:
    """The arguments of :meth:`Backend.dispatch`."""
    check_plan(plan, grouped, world_size, device)
    tokens = plan.num_tokens
    check_rows("x", x, tokens, "the plan's tokens", SENT_DTYPES, device)
    if scales is not None:
        check_shape("scales", scales, (tokens, None), device)
        if scales.element_size() != 4:
            raise InputError("scales", scales.dtype, "must be a 4-byte type (float32, or int32 holding packed UE8M0)")
    if weights is not None:
        check_shape("topk_weights", weights, (tokens, plan.num_topk), device, torch.float32)
    if quantize and (x.dtype != torch.bfloat16 or scales is not None):
        raise InputError("quantize", True, f"needs bfloat16 tokens without scales, x is {x.dtype}")
    if quantize and x.shape[1] % BLOCK:
        raise InputError("hidden size", x.shape[1], f"must be a multiple of {BLOCK} to be sent as FP8")


def check_combine(
    plan: Plan,
    x: Tensor,
    weights: Tensor | None,
    apply_weights: bool,
    bias: tuple[Tensor, ...],
    grouped: bool,
    world_size: int,
    device: torch.device,
) -> None:
    """The arguments of :meth:`Backend.combine`."""
    check_plan(plan, grouped, world_size, device)
    expected, what = (plan.num_rows, "expert rows") if grouped else (plan.num_recv, "received rows")
    check_rows("x", x, expected, f"the plan's {what}", SUMMED_DTYPES, device)
    if weights is not None:
        check_shape("weights", weights, (expected,) if grouped else (expected, plan.num_topk), device, torch.float32)
    if apply_weights and (weights is None or not grouped):
        raise InputError("apply_weights", True, "needs weights and the expert layout")
    if len(bias) > 2:
        raise InputError("bias", f"{len(bias)} tensors", "at most two can be added")
    for added in bias:
        check_shape("bias", added, (plan.num_tokens, x.shape[1]), device, x.dtype)
