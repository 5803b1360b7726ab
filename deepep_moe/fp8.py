"""Block-scaled e4m3: one fp32 scale per 128 channels of a row, the format expert-parallel FP8 training sends."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe.errors import InputError

BLOCK = 128
E4M3_MAX = 448.0
# The least scale is the smallest normal fp32 number. A scale and its inverse are normal then, and since e4m3 reaches
# down to 2^-9, blocks of smaller numbers lose nothing: every BF16 number stays within a sixteenth of itself.
AMAX_FLOOR = E4M3_MAX * 2.0**-126


def quantize_e4m3(x: Tensor, amax_floor: float = AMAX_FLOOR) -> tuple[Tensor, Tensor]:
    """``x [T, H]`` -> (``[T, H]`` float8_e4m3fn, ``[T, H / 128]`` float32 scales); ``value = fp8 * scale``.

    A NaN or an infinity makes its whole block NaN.

    Args:
        amax_floor: a block whose largest absolute value is smaller is scaled as if it were this. Some formats prescribe
            a larger one than ``AMAX_FLOOR``, the default and the least that works.

    Raises:
        InputError: H is no multiple of 128.
    """
    if x.shape[1] % BLOCK:
        raise InputError("hidden size", x.shape[1], f"must be a multiple of {BLOCK} to be sent as FP8")
    blocks = x.float().reshape(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(2).clamp(min=amax_floor)
    # Divided by a tensor: by a number PyTorch multiplies with a rounded reciprocal, on some devices and not on others.
    limit = torch.full_like(largest, E4M3_MAX)
    quantized = (blocks * (limit / largest).unsqueeze(2)).to(torch.float8_e4m3fn)
    return quantized.view(x.shape), largest / limit


def dequantize_e4m3(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_e4m3`, up to rounding: ``[M, H]`` in ``dtype``."""
    rows = x.to(dtype)  # exact; multiplied in fp32 and rounded once, without a copy of all rows in fp32
    rows.view(x.shape[0], x.shape[1] // BLOCK, BLOCK).mul_(scales.unsqueeze(2))
    return rows
