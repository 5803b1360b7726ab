"""Grouped linear layers against one matrix product per row, in both ways of calling GEMMs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepep_moe import grouped
from deepep_moe.grouped import Groups, grouped_linear, stacked

IN, OUT = 16, 24
WAYS = [False] + [True] * (grouped._grouped_mm is not None)


@pytest.fixture(params=WAYS, ids=lambda one_call: "one call" if one_call else "one GEMM per expert")
def one_call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a CPU ``grouped_mm`` computes the same, slowly; by itself the library does not use it there."""
    if request.param:
        monkeypatch.setattr(grouped, "_takes", lambda rows, weight: rows.shape[0] > 0)
    return bool(request.param)


def reference(rows: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None = None) -> Tensor:
    """In the precision of what is given; zeros for rows that are nobody's."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    out = torch.einsum("moi,mi->mo", weight[owner], rows[: sum(counts)])
    if bias is not None:
        out = out + bias[owner]
    return torch.cat([out, out.new_zeros(len(rows) - sum(counts), OUT)])


def assert_near(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-2 if got.dtype == torch.bfloat16 else 1e-6
    assert got.shape == expected.shape
    assert (got.double() - expected).norm() <= tolerance * expected.norm() + 1e-12


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [8, 0, 0], [0, 0, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separate", [False, True], ids=["one weight", "a weight per expert"])
def test_values_and_gradients(counts: list[int], dtype: torch.dtype, separate: bool, one_call: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, OUT, IN, dtype=dtype)
    parameters = [nn.Parameter(one.clone()) for one in weight] if separate else [nn.Parameter(weight)]
    output = grouped_linear(rows, parameters if separate else parameters[0], Groups(torch.tensor(counts)))
    gradient = torch.randn_like(output)
    output.backward(gradient)

    exact = [tensor.detach().double().requires_grad_() for tensor in (rows, weight)]
    expected = reference(*exact, counts)
    expected.backward(gradient.double())
    assert_near(output, expected)
    assert_near(rows.grad, exact[0].grad)
    grads = [p.grad for p in parameters]
    assert_near(torch.stack(grads) if separate else grads[0], exact[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("separate", [False, True], ids=["one weight", "a weight per expert"])
def test_autocast(dtype: torch.dtype, given: torch.dtype, inside: bool, separate: bool) -> None:
    """As ``torch.nn.functional.linear`` of each expert: to the bit, where PyTorch multiplies one expert at a time."""
    torch.manual_seed(0)
    counts = [3, 0, 5]
    data = torch.randn(8, IN, dtype=given), torch.randn(3, OUT, IN), torch.randn(3, OUT)
    if given == torch.float64:  # which autocast leaves alone
        data = tuple(value.double() for value in data)
    results = []
    for together in (True, False):
        rows, weight, biases = (value.clone().requires_grad_() for value in data)
        with torch.autocast("cpu", dtype):
            if together:
                experts = list(weight.unbind(0)) if separate else weight
                output = grouped_linear(rows, experts, Groups(torch.tensor(counts)), list(biases.unbind(0)))
            else:
                output = torch.cat([F.linear(*one) for one in zip(rows.split(counts), weight, biases, strict=True)])
        with torch.autocast("cpu", dtype, enabled=inside and together):
            output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
        results.append((output, rows.grad, weight.grad, biases.grad))
    assert results[0][0].dtype == (given if given == torch.float64 else dtype)
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_and_rows_that_are_nobodys(dtype: torch.dtype, one_call: bool) -> None:
    torch.manual_seed(0)
    counts, total = [40, 0, 70], 130
    rows = torch.randn(total, IN, dtype=dtype)
    rows[sum(counts) :] = float("nan")
    rows.requires_grad_()
    weight = nn.Parameter(torch.randn(3, OUT, IN, dtype=dtype))
    biases = [nn.Parameter(torch.randn(OUT, dtype=dtype)) for _ in counts]
    output = grouped_linear(rows, weight, Groups(torch.tensor(counts)), biases)
    gradient = torch.randn_like(output)
    gradient[sum(counts) :] = float("nan")
    output.backward(gradient)

    exact = [tensor.detach().double().requires_grad_() for tensor in (rows, weight, torch.stack(biases))]
    expected = reference(exact[0], exact[1], counts, exact[2])[: sum(counts)]
    expected.backward(gradient[: sum(counts)].double())
    assert_near(output[: sum(counts)], expected)
    assert_near(rows.grad[: sum(counts)], exact[0].grad[: sum(counts)])
    assert_near(weight.grad, exact[1].grad)
    assert_near(torch.stack([bias.grad for bias in biases]), exact[2].grad)


def test_only_gradients_that_are_wanted(one_call: bool) -> None:
    rows, groups = torch.randn(5, IN), Groups(torch.tensor([2, 3]))
    frozen = torch.randn(2, OUT, IN)
    biases = [nn.Parameter(torch.zeros(OUT)) for _ in range(2)]
    grouped_linear(rows, frozen, groups, biases).sum().backward()
    assert [bias.grad.tolist() for bias in biases] == [[2.0] * OUT, [3.0] * OUT]
    rows.requires_grad_()
    (grad,) = torch.autograd.grad(grouped_linear(rows, frozen, groups).sum(), rows)
    torch.testing.assert_close(grad, frozen.sum(1)[torch.tensor([0, 0, 1, 1, 1])])


def test_gradients_of_parameters_are_not_copied(one_call: bool) -> None:
    """Autograd takes over a gradient that is laid out like its parameter and that nobody else holds."""
    weights = [nn.Parameter(torch.randn(OUT, IN)) for _ in range(2)]
    made: list[Tensor] = []
    for weight in weights:
        weight.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    grouped_linear(torch.randn(5, IN), weights, Groups(torch.tensor([2, 3]))).sum().backward()
    assert sorted(made) == sorted(weight.grad.data_ptr() for weight in weights)


def test_the_way_is_chosen_by_the_work_per_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_takes", lambda rows, weight: True)
    rows = torch.empty(8192, 1)
    known = Groups(torch.tensor([2048] * 4))
    large, small = torch.empty(4, 2048, 7168, device="meta"), torch.empty(4, 256, 128, device="meta")
    assert grouped._in_one_call(rows, (large,), known) is None
    assert grouped._in_one_call(rows, (small,), known) is grouped._grouped_mm
    unknown = Groups(torch.empty(4, dtype=torch.int64, device="meta"))  # the host would have to wait for the sizes
    assert not unknown.on_host
    assert grouped._in_one_call(rows, (large,), unknown) is grouped._grouped_mm


def test_stacked_is_a_view_at_equal_distances_and_a_copy_elsewhere() -> None:
    flat = torch.randn(4 * 40)
    spread = [nn.Parameter(flat[start : start + 32].view(4, 8)) for start in (0, 40, 80, 120)]
    together = stacked(spread)
    assert together.data_ptr() == flat.data_ptr()
    assert torch.equal(together, torch.stack(spread))
    for others in (spread[:3:2] + spread[1:2], [nn.Parameter(p.clone()) for p in spread]):  # not in order; apart
        copied = stacked(others)
        assert copied.data_ptr() != others[0].data_ptr()
        assert torch.equal(copied, torch.stack(list(others)))
