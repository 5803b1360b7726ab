"""Checks of the arguments of low-latency calls, and what of an argument they depend on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe.backends.checks import check_shape
from deepep_moe.errors import InputError

NOT_USABLE = object()
"""Signature of an argument that is checked in every call, because it is wrong or no plain tensor."""


def check_modes(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InputError("async_finish", True, "not together with return_recv_hook")


def check_contiguous(argument: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InputError(argument, f"strides {tensor.stride()} of shape {tuple(tensor.shape)}", "must be contiguous")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.nbytes and second < first + a.nbytes


def check_out(out: Tensor, x: Tensor) -> None:
    """Rows of ``x`` are read while others of the result are written."""
    if overlap(out, x):
        raise InputError("out", "a tensor in the memory of x", "must not overlap x")


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


def signature_of(tensor: Any, device: torch.device) -> object:
    """What the checks examine of a tensor or None, except values. NOT_USABLE: no plain tensor on ``device``."""
    if tensor is None:
        return None
    try:
        if (
            tensor.__class__ is Tensor
            and tensor.is_contiguous()  # False, or an error, where the layout is not strided
            and tensor.device == device
            and not tensor.is_neg()
        ):
            return tensor.shape, tensor.dtype
    except RuntimeError:  # a nested or sparse tensor
        pass
    return NOT_USABLE
