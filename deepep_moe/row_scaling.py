"""Rows times weights, with gradients for both, in one pass over memory each way on a GPU.

PyTorch takes several passes, most of them over fp32 copies of the rows. Without the CUDA extension, and where
torch.compile or a dispatch mode watches, the same numbers come from PyTorch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe import extension
from deepep_moe.errors import InputError
from deepep_moe.extension import DTYPE_CODES, VECTOR_BYTES
from deepep_moe.tracing import is_traced


def scale_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """``rows[m] * weights[m]`` in fp32, rounded once to the rows' dtype. Differentiable in both.

    For experts that scale their own output, as in frameworks that apply the routing weights inside the experts. Where a
    combine follows directly, ``TokenDispatcher.combine(weights=...)`` does it on the way.

    Args:
        rows: [M, H] bf16, fp16 or fp32.
        weights: [M], any float type, on the rows' device.

    Raises:
        InputError: another shape, dtype or device.
    """
    if rows.dim() != 2 or rows.dtype not in DTYPE_CODES:
        raise InputError("rows", f"{rows.dtype} of shape {tuple(rows.shape)}", "must be [M, H] bf16, fp16 or fp32")
    if weights.shape != rows.shape[:1] or not weights.is_floating_point():
        raise InputError(
            "weights",
            f"{weights.dtype} of shape {tuple(weights.shape)}",
            f"must be floating point of shape ({rows.shape[0]},), one for each row",
        )
    if weights.device != rows.device:
        raise InputError("weights", weights.device, f"must be on {rows.device}, the device of rows")
    weights = weights.float()
    if is_traced(rows) or is_traced(weights):
        return _times(rows, weights)
    return _ScaleRows.apply(rows, weights)  # type: ignore[no-any-return]


def scale_rows_gradients(
    grad: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    row_recv: Tensor | None = None,
    *,
    wants_rows: bool = True,
    reuse: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``scale_rows(rows, weights)``: of the rows, and of the weights in fp32.

    Args:
        grad: [M, H], the gradient of the result.
        rows: [M, H] of the same dtype; None where the weights want no gradient.
        weights: [M] fp32.
        row_recv: [M] int32, negative where a row is padding (``Plan.row_recv``): both gradients are 0 there, whatever
            rows and weights hold. None: no row is.
        wants_rows: whether the rows want a gradient.
        reuse: ``grad`` is the caller's own and may be overwritten.

    Returns:
        [M, H] and [M]; None for what is not wanted.
    """
    if rows is None and not wants_rows:
        return None, None
    if _on_kernel(grad, weights):
        x = extension.aligned(grad)
        own = reuse or x is not grad
        out = None if not wants_rows else x if own else torch.empty_like(x)
        return out, _launch(x, rows, weights, row_recv, out)
    if row_recv is not None:
        padding = row_recv < 0
        weights = weights.masked_fill(padding, 0.0)
        rows = None if rows is None else rows.masked_fill(padding.unsqueeze(1), 0.0)
    return (
        _times(grad, weights) if wants_rows else None,
        None if rows is None else (grad.float() * rows.float()).sum(1),
    )


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        if not _on_kernel(rows, weights):
            return _times(rows, weights)
        x = extension.aligned(rows)
        out = torch.empty_like(x)
        _launch(x, None, weights, None, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weights = ctx.saved_tensors
        return scale_rows_gradients(grads[0], rows, weights, wants_rows=ctx.needs_input_grad[0])


def _times(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows.float() * weights.unsqueeze(1)).to(rows.dtype)


def _on_kernel(rows: Tensor, weights: Tensor) -> bool:
    """Whether the kernel can be used: it supports the rows, and no second derivative is needed."""
    return (
        not is_traced(rows)
        and rows.dtype in DTYPE_CODES
        and rows.shape[1] * rows.element_size() % VECTOR_BYTES == 0
        and not (torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad))
        and extension.why_not_on(rows.device) is None
    )


def _launch(
    x: Tensor, rows: Tensor | None, weights: Tensor, row_recv: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """``out = x * weights``; returns the sums over H of ``x * rows``, [M] fp32. ``x`` and ``out`` are aligned."""
    rows = None if rows is None else extension.aligned(rows)
    weights = weights.contiguous()
    sums = None if rows is None else torch.empty_like(weights)
    with torch.cuda.device(x.device):
        extension._C.scale_rows(
            x.data_ptr(),
            extension.address(rows),
            weights.data_ptr(),
            extension.address(row_recv),
            extension.address(out),
            extension.address(sums),
            DTYPE_CODES[x.dtype],
            x.shape[0],
            x.shape[1] * x.element_size(),
            extension.current_stream(x.device),
        )
    return sums
