"""Block-scaled e4m3: error bound, exactness where it must be exact, edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep_moe.errors import InputError
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e4]))
def test_relative_error_of_a_block_is_that_of_three_mantissa_bits(
    rows: int, blocks: int, seed: int, magnitude: float
) -> None:
    x = torch.randn(rows, 128 * blocks, generator=torch.Generator().manual_seed(seed)) * magnitude
    fp8, scales = quantize_e4m3(x)
    assert fp8.dtype == torch.float8_e4m3fn
    assert scales.shape == (rows, blocks)
    back = dequantize_e4m3(fp8, scales, torch.float32)
    # half a step of 3 mantissa bits, or half the smallest subnormal step for values far below the block's largest
    assert ((back - x).abs() <= x.abs() / 16 + scales.repeat_interleave(128, 1) * 2**-10 * 1.01).all()


def test_what_fits_is_exact_and_zero_stays_zero() -> None:
    x = torch.zeros(2, 256)
    x[0, :128] = torch.arange(128).float() % 8 * 64  # the largest is 448: scale 1
    fp8, scales = quantize_e4m3(x)
    assert scales[0, 0] == 1
    assert torch.equal(dequantize_e4m3(fp8, scales, torch.bfloat16), x.bfloat16())


def test_rows_may_be_strided() -> None:
    x = torch.randn(128, 6).t()
    for strided, dense in zip(quantize_e4m3(x), quantize_e4m3(x.contiguous()), strict=True):
        assert torch.equal(strided.float(), dense.float())


def test_hidden_size_must_be_whole_blocks() -> None:
    with pytest.raises(InputError, match="hidden size = 100: must be a multiple of 128"):
        quantize_e4m3(torch.zeros(1, 100))
