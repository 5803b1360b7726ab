"""Packed rows by PyTorch's operators; tests/gpu/test_collective.py runs the same through the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepep_moe.backends.base import Layout
from deepep_moe.backends.local import RowFormat, Segments, expand_rows, pack_rows, sum_packed_rows, sum_rows
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3


def places(*items: list[int]) -> Tensor:
    return torch.tensor(items, dtype=torch.int32)


def test_a_packed_row_starts_and_ends_at_sixteen_bytes() -> None:
    x, weights = torch.randn(2, 5), torch.rand(2, 3)
    format = RowFormat.of(x, torch.rand(2, 2), weights)
    assert (format.row_bytes, format.pitch) == (32, 64)  # 20 bytes of channels, 20 of scales and weights
    assert RowFormat.of(x.bfloat16(), None, None).pitch == 16
    quantized = RowFormat.of(torch.randn(2, 256).bfloat16(), None, weights, quantize=True)
    assert (quantized.dtype, quantized.num_scales, quantized.pitch) == (torch.float8_e4m3fn, 2, 288)


@pytest.mark.parametrize("hidden", [3, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_their_places_and_back(hidden: int, dtype: torch.dtype) -> None:
    x, scales, weights = torch.randn(3, hidden).to(dtype), torch.rand(2, 3).t(), torch.rand(3, 2)
    format = RowFormat.of(x, scales, weights)
    packed = torch.full((5, format.pitch), 255, dtype=torch.uint8)
    # Row 0 goes to the second destination, row 1 to both, row 2 to none. Destinations begin at rows 3 and 0.
    there, starts = places([-1, 0], [1, 1], [-1, -1]), places([3, 0])[0]
    pack_rows(x, there, packed, format, starts=starts, scales=scales, weights=weights)
    assert (packed[2:4] == 255).all()  # no row goes there
    order = [0, 1, 4]
    got = expand_rows(packed[order], format, 3, 3, layout=Layout.BY_SOURCE, places=places([0, 0], [0, -1], [-1, 0]))
    assert got.scales is not None and got.weights is not None
    source = [0, 1, 1]
    assert torch.equal(got.x, x[source]) and torch.equal(got.scales, scales[source])
    assert torch.equal(got.weights, weights[source] * torch.tensor([[1, 1], [1, 0], [0, 1]]))


def test_expert_rows_are_copies_with_a_weight_each_and_zeroed_padding() -> None:
    x, weights = torch.randn(3, 4), torch.rand(3, 2)
    format = RowFormat.of(x, None, weights)
    packed = torch.zeros((3, format.pitch), dtype=torch.uint8)
    pack_rows(x, places([0], [1], [2]), packed, format, weights=weights)
    # In source order the rows are 1, 2, 0: the rank's own one, read first, lies behind those of two lower ranks.
    routes = places([0, 4], [-1, 1], [-1, -1], [-1, -1])  # the last one has not arrived
    row_recv = torch.tensor([0, 1, -1, -1, 0], dtype=torch.int32)
    got = expand_rows(
        packed, format, 3, 5, layout=Layout.BY_EXPERT, places=routes, row_recv=row_recv, segments=Segments(2, 1)
    )
    assert got.weights is not None
    zero = torch.zeros(4)
    assert torch.equal(got.x, torch.stack([x[1], x[2], zero, zero, x[1]]))
    assert got.weights.tolist() == [float(weights[1, 0]), float(weights[2, 1]), 0, 0, float(weights[1, 1])]
    into = got._replace(x=torch.ones(5, 4), weights=torch.ones(5))
    expand_rows(packed, format, 3, 5, layout=Layout.BY_EXPERT, places=routes, segments=Segments(2, 1), into=into)
    assert torch.equal(into.x[2:4], torch.ones(2, 4)) and torch.equal(into.x[4], x[1])  # padding is left alone


@pytest.mark.parametrize("back", [False, True])
def test_rows_are_quantised_while_they_are_packed(back: bool) -> None:
    x = torch.randn(2, 256).bfloat16()
    format = RowFormat.of(x, None, None, quantize=True)
    packed = torch.zeros((2, format.pitch), dtype=torch.uint8)
    pack_rows(x, places([1], [0]), packed, format)
    got = expand_rows(packed, format, 2, 2, layout=Layout.BY_SOURCE, places=places([], []), dequantize=back)
    wanted, scales = quantize_e4m3(x.flip(0))
    if back:
        assert got.scales is None
        assert torch.equal(got.x, dequantize_e4m3(wanted, scales, torch.bfloat16))
    else:
        assert got.scales is not None
        assert torch.equal(got.x.view(torch.uint8), wanted.view(torch.uint8)) and torch.equal(got.scales, scales)


@pytest.mark.parametrize("apply_weights", [False, True])
def test_sums_are_fp32_in_the_order_of_places(apply_weights: bool) -> None:
    rows = torch.tensor([[2.0**10], [2.0**-2], [2.0**-2], [3.0]]).bfloat16().expand(4, 8)
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0])
    routes = places([0, 1, 2], [-1, 3, -1], [-1, -1, -1])
    format = RowFormat(rows.dtype, 8, num_weights=0 if apply_weights else 3)
    packed = torch.zeros((3, format.pitch), dtype=torch.uint8)
    sum_rows(rows, routes, packed, format, 3, segments=Segments(0, 1), row_weights=weights, apply_weights=apply_weights)
    # Own rows come last: item 0 is in row 2. Home adds its own row last as well.
    total, carried = sum_packed_rows(packed, places([2], [0], [1]), format, bias=(torch.ones(3, 8).bfloat16(),))
    first = 2.0**10 + 0.5 + 1 if apply_weights else 2.0**10 + 0.5  # rounded to bf16 between the ranks
    rounded = float(torch.tensor(first).bfloat16())
    wanted = torch.tensor([rounded + 1, 25.0 if apply_weights else 4.0, 1.0]).bfloat16()
    assert torch.equal(total, wanted.unsqueeze(1).expand(3, 8))
    if apply_weights:
        assert carried is None
    else:
        assert carried is not None
        assert carried.tolist() == [[1, 2, 4], [0, 8, 0], [0, 0, 0]]


def test_results_are_nan_where_headers_differ() -> None:
    x, weights = torch.ones(2, 4), torch.ones(2, 1)
    format = RowFormat.of(x, None, weights)
    packed = torch.zeros((2, format.pitch), dtype=torch.uint8)
    pack_rows(x, places([0], [1]), packed, format, weights=weights)
    for headers, agree in ((torch.tensor([[1, 2], [1, 2]]), True), (torch.tensor([[1, 2], [1, 3]]), False)):
        got = expand_rows(packed, format, 2, 2, layout=Layout.BY_SOURCE, places=places([0], [0]), headers=headers)
        total, carried = sum_packed_rows(packed, places([0], [1]), format, headers=headers)
        for result in (got.x, got.weights, total, carried):
            assert result is not None
            assert torch.equal(result, torch.ones_like(result)) if agree else result.isnan().all()
