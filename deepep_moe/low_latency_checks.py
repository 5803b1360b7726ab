"""Checks of the arguments of low-latency calls, and what of an argument they depend on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe.backends.checks import check_shape
from deepep_moe.errors import InputError


def check_modes(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InputError("async_finish", True, "not together with return_recv_hook")


def check_contiguous(argument: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InputError(argument, f"strides {tensor.stride()} of shape {tuple(tensor.shape)}", "must be contiguous")


def check_wait_stats(argument: str, wait_stats: Tensor | None, ranks: int, device: torch.device) -> None:
    if wait_stats is not None:
        check_shape(argument, wait_stats, (ranks,), device, torch.int64)
        check_contiguous(argument, wait_stats)


def check_distinct(topk_idx: Tensor) -> None:
    """A token may choose an expert only once: there is room for M rows per source and expert."""
    ordered = topk_idx.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
    if len(twice):
        token, place = twice[0].tolist()
        chosen = int(ordered[token, place + 1])
        raise InputError("topk_idx", f"expert {chosen} twice for token {token}", "experts of a token must differ")


def signature_of(a: Any, b: Any) -> tuple[object, ...] | None:
    """What the checks examine of a tensor and of a tensor or None, except values. None if one is not a plain tensor."""
    try:
        if a.__class__ is not Tensor:
            return None
        if b is None:
            return a.shape, a.dtype, a.device, a.is_contiguous(), a.is_neg()
        if b.__class__ is not Tensor:
            return None
        return (
            a.shape,
            a.dtype,
            a.device,
            a.is_contiguous(),  # False, or an error, where the layout is not strided
            a.is_neg(),
            b.shape,
            b.dtype,
            b.device,
            b.is_contiguous(),
            b.is_neg(),
        )
    except RuntimeError:  # a nested or sparse tensor
        return None
