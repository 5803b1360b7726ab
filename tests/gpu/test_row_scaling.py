"""Rows times weights in one kernel, against the same expressions in fp64 on the CPU. One rank is enough; all run it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepep_moe import extension, scale_rows
from deepep_moe.row_scaling import scale_rows_gradients
from tests.gpu.conftest import Ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VECTOR = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}  # channels of 16 bytes


def make(ranks: Ranks, rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [M, H] and weights [M] that want gradients, and a gradient of their product."""
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    x, grad = (torch.randn((rows, hidden), generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(rows, generator=generator)
    return x.to(ranks.device).requires_grad_(), weights.to(ranks.device).requires_grad_(), grad.to(ranks.device)


def expect_sums(grad: Tensor, rows: Tensor, got: Tensor) -> None:
    """``got`` is the sum over H of ``grad * rows`` up to fp32 rounding of terms of this size."""
    products = grad.double() * rows.double()
    bound = 1e-6 * products.abs().sum(1) + 1e-30
    assert got.dtype == torch.float32
    assert ((got.double() - products.sum(1)).abs() <= bound).all()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each launch of the kernel: a test that means to test it can tell that it did."""
    assert extension.why_missing is None, "the CUDA extension is not built"
    kernel, seen = extension._C.scale_rows, []

    def counted(*args: int) -> None:
        seen.append(len(seen))
        kernel(*args)

    monkeypatch.setattr(extension._C, "scale_rows", counted)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vectors"), [(0, 4), (1, 1), (3, 5), (9, 31), (257, 33), (40, 129), (17, 896)])
def test_values_and_gradients(ranks: Ranks, launches: list[int], rows: int, vectors: int, dtype: torch.dtype) -> None:
    x, weights, grad = make(ranks, rows, vectors * VECTOR[dtype], dtype)
    out = scale_rows(x, weights)
    assert torch.equal(out, (x.float() * weights[:, None]).to(dtype))
    grad_x, grad_weights = torch.autograd.grad(out, (x, weights), grad)
    assert len(launches) == 2
    assert torch.equal(grad_x, (grad.float() * weights[:, None]).to(dtype))
    expect_sums(grad, x, grad_weights)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_what_is_wanted(ranks: Ranks, launches: list[int], wanted: int) -> None:
    x, weights, grad = make(ranks, 21, 264, torch.bfloat16)
    leaves = [x.detach(), weights.detach()]
    leaves[wanted].requires_grad_()
    scale_rows(*leaves).backward(grad)
    assert len(launches) == 2
    assert leaves[1 - wanted].grad is None
    got = leaves[wanted].grad
    assert got is not None
    if wanted == 0:
        assert torch.equal(got, (grad.float() * weights[:, None]).to(x.dtype))
    else:
        expect_sums(grad, x, got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_has_no_gradient_whatever_lies_there(ranks: Ranks, launches: list[int], dtype: torch.dtype) -> None:
    x, weights, grad = (leaf.detach() for leaf in make(ranks, 50, 40, dtype))
    row_recv = torch.arange(50, dtype=torch.int32, device=ranks.device)
    row_recv[::3] = -1
    real = row_recv >= 0
    expected = scale_rows_gradients(grad, x, weights)
    x[~real], weights[~real], grad[~real] = torch.nan, torch.inf, torch.nan
    for got, wanted in zip(scale_rows_gradients(grad, x, weights, row_recv), expected, strict=True):
        assert got is not None and wanted is not None
        assert torch.equal(got[real], wanted[real])
        assert not got[~real].any()
    assert len(launches) == 2


def test_in_place_and_twice_the_same(ranks: Ranks, launches: list[int]) -> None:
    x, weights, grad = (leaf.detach() for leaf in make(ranks, 300, 7168, torch.bfloat16))
    first_rows, first_weights = scale_rows_gradients(grad, x, weights)
    reused = grad.clone()
    rows, sums = scale_rows_gradients(reused, x, weights, reuse=True)
    assert rows is reused
    assert first_rows is not None and torch.equal(rows, first_rows)
    assert first_weights is not None and sums is not None and torch.equal(sums, first_weights)
    assert len(launches) == 2


def test_views_that_are_strided_or_start_off_a_vector(ranks: Ranks, launches: list[int]) -> None:
    x, weights, grad = (leaf.detach() for leaf in make(ranks, 12, 48, torch.bfloat16))
    strided = torch.cat((x, x), dim=1)[:, :48]
    shifted = torch.cat((x.new_zeros(3), x.flatten()))[3:].view(12, 48)
    for view in (strided, shifted):
        assert torch.equal(scale_rows(view, weights), scale_rows(x, weights))
        off = torch.cat((grad.new_zeros(3), grad.flatten()))[3:].view(12, 48)
        got, wanted = scale_rows_gradients(off, view, weights), scale_rows_gradients(grad, x, weights)
        assert got[0] is not None and wanted[0] is not None and torch.equal(got[0], wanted[0])
        assert got[1] is not None and wanted[1] is not None and torch.equal(got[1], wanted[1])
        assert torch.equal(off, grad)
    assert len(launches) == 8


def test_rows_that_are_no_multiple_of_a_vector(ranks: Ranks, launches: list[int]) -> None:
    x, weights, grad = make(ranks, 6, 7, torch.bfloat16)
    out = scale_rows(x, weights)
    assert torch.equal(out, (x.float() * weights[:, None]).bfloat16())
    _, grad_weights = torch.autograd.grad(out, (x, weights), grad)
    expect_sums(grad, x, grad_weights)
    assert not launches


def test_second_derivatives(ranks: Ranks) -> None:
    x, weights, _ = make(ranks, 5, 16, torch.float32)
    (first,) = torch.autograd.grad(scale_rows(x, weights).square().sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weights)
    torch.testing.assert_close(second, 2 * x.detach().square().sum(1))


def test_in_a_cuda_graph(ranks: Ranks, launches: list[int]) -> None:
    x, weights, grad = make(ranks, 64, 256, torch.bfloat16)
    stream = torch.cuda.Stream(ranks.device)
    with torch.cuda.stream(stream):
        torch.autograd.grad(scale_rows(x, weights), (x, weights), grad)
    torch.cuda.synchronize(ranks.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = scale_rows(x, weights)
        grads = torch.autograd.grad(out, (x, weights), grad)
    with torch.no_grad():
        x.mul_(0.5).add_(1)
        weights.mul_(2)
    graph.replay()
    torch.cuda.synchronize(ranks.device)
    assert torch.equal(out, (x.float() * weights[:, None]).bfloat16())
    assert torch.equal(grads[0], (grad.float() * weights[:, None]).bfloat16())
    expect_sums(grad, x, grads[1])
