"""Checks of the arguments of low-latency calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe.backends.checks import check_integer, check_shape, check_topk_idx
from deepep_moe.errors import InputError
from deepep_moe.fp8 import BLOCK
from deepep_moe.low_latency_engine import DispatchCall, Format

MAX_TOKENS = 1 << 15
"""Maximum tokens per rank: a position among the rows of one source and expert has 16 bits."""
MAX_TOPK = 32
MAX_EXPERTS = 1024
_ROW_BYTES = 16  # rows are moved in units of this


def check_dispatch(
    ranks: int,
    device: torch.device,
    x: Tensor,
    topk_idx: Tensor,
    max_tokens: int,
    num_experts: int,
    stats: Tensor | None,
    wait_stats: Tensor | None,
    format: Format,
) -> None:
    check_integer("num_max_dispatch_tokens_per_rank", max_tokens, least=1, most=MAX_TOKENS)
    check_integer("num_experts", num_experts, least=1, most=MAX_EXPERTS)
    check_topk_idx(topk_idx, num_experts, ranks, device)
    tokens, topk = topk_idx.shape
    if topk > MAX_TOPK:
        raise InputError("topk_idx", f"top-k {topk}", f"must be at most {MAX_TOPK}")
    if tokens > max_tokens:
        raise InputError(
            "x",
            f"{tokens} tokens",
            f"num_max_dispatch_tokens_per_rank is {max_tokens} (max_tokens_per_rank of a decoder)",
        )
    check_shape("x", x, (tokens, None), device, torch.bfloat16)
    check_aligned("x", x)
    check_contiguous("topk_idx", topk_idx)
    unit = BLOCK if format != Format.BF16 else _ROW_BYTES // 2
    if x.shape[1] < 1 or x.shape[1] % unit:
        raise InputError("x", f"hidden size {x.shape[1]}", f"must be a multiple of {unit} in {format.name}")
    if device.type == "cpu":  # on a GPU the kernel looks
        check_distinct(topk_idx)
    if stats is not None:
        name = "cumulative_local_expert_recv_stats"
        check_shape(name, stats, (num_experts // ranks,), device, torch.int32)
        check_contiguous(name, stats)
    check_wait_stats("dispatch_wait_recv_cost_stats", wait_stats, ranks, device)


def check_combine(
    ranks: int,
    device: torch.device,
    dispatched: DispatchCall,
    rows: str,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    out: Tensor | None,
    wait_stats: Tensor | None,
) -> None:
    """Check the arguments of a combine, of which ``x`` is known to the user as ``rows``."""
    check_shape(rows, x, tuple(dispatched.rows.shape), device, torch.bfloat16)
    check_aligned(rows, x)
    shape = (dispatched.shape.tokens, dispatched.shape.topk)
    check_shape("topk_idx", topk_idx, shape, device)
    check_topk_idx(topk_idx, dispatched.shape.num_experts, ranks, device)
    check_contiguous("topk_idx", topk_idx)
    check_shape("topk_weights", topk_weights, shape, device, torch.float32)
    check_contiguous("topk_weights", topk_weights)
    if out is not None:
        check_shape("out", out, (shape[0], dispatched.shape.hidden), device, torch.bfloat16)
        check_aligned("out", out)
    check_wait_stats("combine_wait_recv_cost_stats", wait_stats, ranks, device)


def check_switches(**switches: Any) -> None:
    """Raise InputError for a value that is not True, False or None: a tensor, say, may have no truth value."""
    for name, value in switches.items():
        try:
            known = value in (True, False, None)  # those of numpy too
        except (RuntimeError, ValueError):
            known = False
        if not known:
            raise InputError(name, repr(value), "must be True or False")


def check_modes(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InputError("async_finish", True, "not together with return_recv_hook")


def check_contiguous(argument: str, tensor: Tensor) -> None:
    """Raise InputError unless ``tensor``, which passed check_shape(), is contiguous and has memory of its own."""
    try:
        has_memory = tensor.untyped_storage().device == tensor.device
    except (RuntimeError, NotImplementedError):
        has_memory = False
    if not has_memory:
        rule = "must be a plain tensor: not of torch.func.vmap or grad, no FakeTensor"
        raise InputError(argument, "a tensor without memory", rule)
    if not tensor.is_contiguous():
        raise InputError(argument, f"strides {tensor.stride()} of shape {tuple(tensor.shape)}", "must be contiguous")


def check_aligned(argument: str, rows: Tensor) -> None:
    """As :func:`check_contiguous`; also, kernels read and write rows in units of 16 bytes."""
    check_contiguous(argument, rows)
    if rows.numel() and rows.data_ptr() % _ROW_BYTES:
        offset = f"a view that begins {rows.storage_offset()} elements into its storage"
        raise InputError(argument, offset, f"must begin at a multiple of {_ROW_BYTES} bytes; clone it")


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
