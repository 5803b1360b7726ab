"""Block-scaled e4m3 in kernels: to the last bit what deepep_moe/fp8.py computes on a CPU, for numbers of every size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.fp8 import AMAX_FLOOR, BLOCK, dequantize_e4m3, quantize_e4m3
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks


@pytest.fixture(scope="module")
def dispatcher(ranks: Ranks) -> Iterator[TokenDispatcher]:
    """One expert per rank; FP8 on the way of tokens and of gradients."""
    settings = DispatcherConfig(
        backend="nvlink",
        fp8_dispatch=True,
        fp8_dispatch_grad=True,
        num_sms=ranks.num_sms,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    made = TokenDispatcher(ranks.group, ranks.size, settings, device=ranks.device)
    yield made
    made.backend.close()


def numbers_of_every_size() -> Tensor:
    """[256, 16384] BF16: blocks with every number, subnormal, infinite and NaN too, as their largest."""
    largest = torch.arange(2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16).view(256, 128, 1).float()
    generator = torch.Generator("cpu").manual_seed(0)
    ratios = torch.rand((256, 128, BLOCK), generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
    ratios[..., ::2] /= 64  # e4m3 is subnormal from there on
    ratios[..., 0] = 1
    return (ratios * largest).bfloat16().view(256, 128 * BLOCK)


def through_fp8(x: Tensor) -> Tensor:
    return dequantize_e4m3(*quantize_e4m3(x), x.dtype)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("floor", [AMAX_FLOOR, 1e-4])
def test_pytorch_computes_the_same_on_both_devices(ranks: Ranks, floor: float) -> None:
    x = numbers_of_every_size()
    for got, wanted in zip(quantize_e4m3(x.to(ranks.device), floor), quantize_e4m3(x, floor), strict=True):
        assert_same(got.float(), wanted.float())


def test_tokens_and_gradients_of_every_size(ranks: Ranks, dispatcher: TokenDispatcher) -> None:
    x = numbers_of_every_size()
    everywhere = torch.arange(ranks.size, device=ranks.device).expand(len(x), -1).contiguous()
    weights = torch.ones(everywhere.shape, dtype=torch.float32, device=ranks.device)
    dispatched = dispatcher.dispatch(x.to(ranks.device), everywhere, weights)
    wanted = torch.cat([through_fp8(x)] * ranks.size)  # every rank brings the same
    assert_same(dispatched.rows, wanted)
    rows = dispatched.rows.detach().requires_grad_()
    dispatcher.combine(rows, dispatched).backward(x.to(ranks.device))
    assert rows.grad is not None
    assert_same(rows.grad, wanted)


def test_small_numbers_are_not_lost(ranks: Ranks, dispatcher: TokenDispatcher) -> None:
    """Against the numbers themselves, which a fault that both sides share would not survive."""
    smallest = torch.arange(1, 2**10, dtype=torch.int16, device="cpu").view(torch.bfloat16)  # to 2^-119
    x = smallest.unsqueeze(1).repeat(1, BLOCK)
    everywhere = torch.arange(ranks.size, device=ranks.device).expand(len(x), -1).contiguous()
    weights = torch.ones(everywhere.shape, dtype=torch.float32, device=ranks.device)
    rows = dispatcher.dispatch(x.to(ranks.device), everywhere, weights).rows.cpu()
    sent = torch.cat([x] * ranks.size).double()
    assert ((rows.double() - sent).abs() <= sent * (1 / 16 + 1 / 256) + 2.0**-134).all()
