"""Block-scaled e4m3: error bound, exactness where it must be exact, edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep_moe.errors import InputError
from deepep_moe.fp8 import AMAX_FLOOR, dequantize_e4m3, quantize_e4m3


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(0, 2**31), st.sampled_from([1e-36, 1e-20, 1e-9, 1e-3, 1.0, 1e4])
)
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
    assert torch.equal(scales[1], torch.full((2,), 2.0**-126))
    assert torch.equal(dequantize_e4m3(fp8, scales, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("floor", [AMAX_FLOOR, 1e-4])
def test_scales_are_quotients_rounded_once(floor: float) -> None:
    """For every BF16 number as a block's largest, so that any device can compute the same."""
    largest = (torch.arange(0x7F80, dtype=torch.int32) << 16).view(torch.float32)
    x = largest.unsqueeze(1).repeat(1, 128)
    floored = largest.clamp(min=floor).double()
    fp8, scales = quantize_e4m3(x, floor)
    assert torch.equal(scales[:, 0], (floored / 448).float())  # 53 bits are enough to round a quotient twice
    inverse = (448 / floored).float()
    assert torch.equal(fp8[:, 0].float(), (x[:, 0] * inverse).to(torch.float8_e4m3fn).float())
    # neither is subnormal, which other hardware and libraries may take for zero, nor infinite
    least = torch.finfo(torch.float32).tiny
    assert scales.min() >= least and inverse.min() >= least and inverse.isfinite().all()


@pytest.mark.parametrize("negative", [False, True])
def test_every_bf16_number_survives_a_block_of_its_size(negative: bool) -> None:
    """Gradients may be as small as they like, down to the smallest subnormal number; ratios to 64 in a block."""
    sign = -1 if negative else 1
    largest = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = (sign * largest.double().unsqueeze(1) * torch.linspace(1, 1 / 64, 128, dtype=torch.float64)).bfloat16()
    fp8, scales = quantize_e4m3(x)
    back, x = dequantize_e4m3(fp8, scales, torch.bfloat16).double(), x.double()
    # half a step of e4m3, then half a step of BF16, which is 2^-134 for subnormal numbers
    assert ((back - x).abs() <= x.abs() * (1 / 16 + 1 / 256) + 2.0**-134).all()
    assert (back[:, 0] != 0).all()


def test_a_floor_makes_small_blocks_share_its_scale() -> None:
    x = torch.full((1, 128), 1e-6)
    fp8, scales = quantize_e4m3(x, 1e-4)
    assert scales.item() == pytest.approx(1e-4 / 448, rel=1e-6)
    assert torch.equal(fp8.float(), torch.full((1, 128), 4.5))  # 1e-6 / scale = 4.48


def test_one_nan_or_infinity_makes_its_block_nan() -> None:
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[0, 5], x[1, 200] = torch.nan, -torch.inf
    back = dequantize_e4m3(*quantize_e4m3(x), torch.bfloat16)
    assert back[0, :128].isnan().all() and back[1, 128:].isnan().all()
    assert torch.equal(back[0, 128:], x[0, 128:]) and torch.equal(back[1, :128], x[1, :128])


def test_rows_may_be_strided() -> None:
    x = torch.randn(128, 6).t()
    for strided, dense in zip(quantize_e4m3(x), quantize_e4m3(x.contiguous()), strict=True):
        assert torch.equal(strided.float(), dense.float())


def test_hidden_size_must_be_whole_blocks() -> None:
    with pytest.raises(InputError, match="hidden size = 100: must be a multiple of 128"):
        quantize_e4m3(torch.zeros(1, 100))
