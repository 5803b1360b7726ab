"""Rows times weights in PyTorch: tests/gpu/test_row_scaling.py compares the kernel with the same expressions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import DispatcherConfig, TokenDispatcher, scale_rows
from deepep_moe.errors import InputError
from deepep_moe.row_scaling import scale_rows_gradients


def make(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights that want gradients, and a gradient of their product."""
    generator = torch.Generator().manual_seed(rows * 1000 + hidden)
    x, grad = (torch.randn((rows, hidden), generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), torch.rand(rows, generator=generator).requires_grad_(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "hidden"), [(0, 8), (1, 1), (5, 7), (33, 64)])
def test_values_and_gradients_are_those_of_the_fp32_product(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, weights, grad = make(rows, hidden, dtype)
    out = scale_rows(x, weights)
    expected = (x.float() * weights[:, None]).to(dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    got = torch.autograd.grad(out, (x, weights), grad)
    wanted = torch.autograd.grad(expected, (x, weights), grad)
    assert torch.equal(got[0], wanted[0])
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)


def test_gradient_of_the_weights_has_their_dtype() -> None:
    x, _, grad = make(4, 16, torch.bfloat16)
    weights = torch.rand(4).bfloat16().requires_grad_()
    scale_rows(x, weights).backward(grad)
    assert weights.grad is not None
    assert weights.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_what_is_wanted_gets_a_gradient(wanted: int) -> None:
    leaves = [leaf.detach() for leaf in make(4, 16)[:2]]
    leaves[wanted].requires_grad_()
    scale_rows(*leaves).sum().backward()
    assert leaves[wanted].grad is not None
    assert leaves[1 - wanted].grad is None


def test_second_derivatives() -> None:
    x, weights, _ = make(3, 4)
    (first,) = torch.autograd.grad(scale_rows(x, weights).square().sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weights)
    torch.testing.assert_close(second, 2 * x.detach().square().sum(1))


def test_compiles_without_a_graph_break() -> None:
    x, weights, grad = make(6, 16)
    compiled = torch.compile(scale_rows, backend="aot_eager", fullgraph=True)(x, weights)
    assert torch.equal(compiled, scale_rows(x, weights))
    got = torch.autograd.grad(compiled, (x, weights), grad)
    wanted = torch.autograd.grad(scale_rows(x, weights), (x, weights), grad)
    torch.testing.assert_close(got, wanted)


def test_padding_has_no_gradient_whatever_lies_there() -> None:
    x, weights, grad = (leaf.detach() for leaf in make(4, 16, torch.bfloat16))
    row_recv = torch.tensor([3, -1, 0, -1], dtype=torch.int32)
    real = row_recv >= 0
    expected = scale_rows_gradients(grad, x, weights)
    for garbage in (torch.nan, torch.inf):
        rows, factors = x.clone(), weights.clone()
        rows[~real], factors[~real] = garbage, garbage
        grad_rows, grad_weights = scale_rows_gradients(grad * real[:, None], rows, factors, row_recv)
        for got, wanted in zip((grad_rows, grad_weights), expected, strict=True):
            assert got is not None and wanted is not None
            assert torch.equal(got[real], wanted[real])
            assert not got[~real].any()


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup | None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_combine_ignores_what_experts_leave_in_padding(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2, DispatcherConfig(expert_alignment=4))
    x, weights, grad = make(3, 8)
    sent = dispatcher.dispatch(x, torch.tensor([[0], [1], [0]]), weights[:, None])
    assert sent.weights is not None
    padding = sent.weights == 0
    assert padding.sum() == 5
    rows = sent.rows.detach().masked_fill(padding[:, None], torch.nan).requires_grad_()
    row_weights = sent.weights.detach().requires_grad_()
    out = dispatcher.combine(rows, sent, weights=row_weights)
    torch.testing.assert_close(out, x * weights[:, None])
    grad_rows, grad_weights = torch.autograd.grad(out, (rows, row_weights), grad)
    assert not grad_rows[padding].any() and not grad_weights[padding].any()
    torch.testing.assert_close(grad_weights[~padding], (grad * x).sum(1)[[0, 2, 1]].detach())


def test_bad_input_is_named() -> None:
    rows, weights = torch.ones(3, 4), torch.ones(3)
    with pytest.raises(
        InputError, match=r"rows = torch.float64 of shape \(3, 4\): must be \[M, H\] bf16, fp16 or fp32"
    ):
        scale_rows(rows.double(), weights)
    with pytest.raises(InputError, match=r"rows = torch.float32 of shape \(12,\)"):
        scale_rows(rows.flatten(), weights)
    with pytest.raises(InputError, match=r"weights = torch.float32 of shape \(3, 1\): must be .* of shape \(3,\)"):
        scale_rows(rows, weights[:, None])
    with pytest.raises(InputError, match=r"weights = torch.int64 of shape \(3,\): must be floating point"):
        scale_rows(rows, weights.long())
    with pytest.raises(InputError, match="weights = meta: must be on cpu, the device of rows"):
        scale_rows(rows, weights.to("meta"))
