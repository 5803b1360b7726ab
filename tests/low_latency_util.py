"""What the low-latency calls must give, in plain PyTorch from the batches of all ranks: for CPU and GPU tests alike."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORMATS: dict[str, dict[str, bool]] = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "rounded": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@dataclass(frozen=True)
class Shape:
    """What ranks share; ``tokens[r]`` is what rank r has."""

    max_tokens: int
    hidden: int
    topk: int
    experts: int
    tokens: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks


class Batch:
    """Tokens and routing of all ranks, the same on every rank; some routes are dropped."""

    def __init__(self, seed: int, shape: Shape, device: torch.device | str = "cpu", dropped: float = 0.1) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        options: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        self.shape = shape
        self.x: list[Tensor] = []
        self.topk_idx: list[Tensor] = []
        self.weights: list[Tensor] = []
        for tokens in shape.tokens:
            x = torch.randn(tokens, shape.hidden, **options)
            chosen = torch.rand(tokens, shape.experts, **options).topk(shape.topk, dim=1)
            topk_idx = chosen.indices
            lost = torch.rand(tokens, shape.topk, **options) < dropped
            weights = torch.rand(tokens, shape.topk, **options)
            self.x.append(x.to(device, torch.bfloat16))
            self.topk_idx.append(topk_idx.masked_fill(lost, -1).to(device))
            self.weights.append(weights.to(device))

    def rows_of_expert(self, expert: int, masked: Set[int]) -> list[list[int]]:
        """Tokens that each source sends to ``expert``, in order."""
        return [
            [] if source in masked else (topk_idx == expert).any(1).nonzero().squeeze(1).tolist()
            for source, topk_idx in enumerate(self.topk_idx)
        ]


def quantized(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """e4m3 rows and fp32 scales [N, H / 128]: amax, at least 1e-4, over 448."""
    blocks = x.float().view(x.shape[0], x.shape[1] // 128, 128)
    amax = blocks.abs().amax(2).clamp(min=1e-4)
    limit = torch.full_like(amax, 448.0)
    if format == "fp8":
        scales, inverse = (amax.double() / 448).float(), limit / amax
    else:
        scales = torch.exp2(torch.ceil(torch.log2((amax.double() / 448).float().double()))).float()
        inverse = 1 / scales
    return (blocks * inverse.unsqueeze(2)).to(torch.float8_e4m3fn).view(x.shape), scales


def packed_exponents(scales: Tensor) -> Tensor:
    """UE8M0: the exponents of fp32 scales [N, S], four in an int32."""
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
    return torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % 4)).contiguous().view(torch.int32)


def check_dispatch(batch: Batch, rank: int, format: str, result: Any, masked: Set[int] = frozenset()) -> None:
    """Every value that ``low_latency_dispatch`` returned on ``rank``."""
    received, counts, handle = result[:3]
    shape = batch.shape
    rows, scales = (received, None) if format == "bf16" else received
    room = shape.ranks * shape.max_tokens
    assert rows.shape == (shape.local_experts, room, shape.hidden)
    assert counts.dtype == torch.int32 and tuple(counts.shape) == (shape.local_experts,)
    src_info, layout_range = handle[:2]
    assert tuple(handle[2:]) == (shape.max_tokens, shape.hidden, shape.experts)
    assert src_info.dtype == torch.int32 and tuple(src_info.shape) == (shape.local_experts, room)
    assert layout_range.dtype == torch.int64 and tuple(layout_range.shape) == (shape.local_experts, shape.ranks)
    if scales is not None:
        blocks = shape.hidden // 128
        columns = -(-blocks // 4) if format == "ue8m0" else blocks
        assert tuple(scales.shape) == (shape.local_experts, room, columns)
        assert scales.stride() == (columns * room, 1, room)
        assert scales.dtype == (torch.int32 if format == "ue8m0" else torch.float32)

    bases = torch.tensor([0, *shape.tokens], dtype=torch.int64, device="cpu").cumsum(0).tolist()
    all_x = torch.cat(batch.x)
    got_counts, got_ranges = counts.tolist(), layout_range.tolist()
    for local in range(shape.local_experts):
        by_source = batch.rows_of_expert(rank * shape.local_experts + local, masked)
        where = f"rank {rank}, local expert {local}"
        lengths = [len(tokens) for tokens in by_source]
        assert got_counts[local] == sum(lengths), f"{where}: count {got_counts[local]}, expected {sum(lengths)}"
        ranges = [sum(lengths[:source]) << 32 | n for source, n in enumerate(lengths)]
        assert got_ranges[local] == ranges, f"{where}: layout_range {got_ranges[local]}, expected {ranges}"
        tokens = [token for of_source in by_source for token in of_source]
        found = src_info[local, : len(tokens)].tolist()
        assert found == tokens, f"{where}: src_info {found}, expected {tokens}"
        index = [bases[source] + token for source, of_source in enumerate(by_source) for token in of_source]
        expected = all_x[torch.tensor(index, dtype=torch.int64, device=all_x.device)]
        got = rows[local, : len(tokens)]
        if scales is None:
            _same(got, expected, f"{where}: rows")
            continue
        expected_rows, expected_scales = quantized(expected, format)
        _same(got.view(torch.uint8), expected_rows.view(torch.uint8), f"{where}: e4m3 rows")
        if format == "ue8m0":
            expected_scales = packed_exponents(expected_scales)
        _same(scales[local, : len(tokens)], expected_scales, f"{where}: scales")


def expert_outputs(batch: Batch, rank: int, format: str, result: Any, into: Tensor | None = None) -> Tensor:
    """What the experts of ``rank`` make of the rows they got: expert e multiplies by (e % 5 + 1) / 2. NaN elsewhere.

    Nothing here waits for the device, so it can be captured.
    """
    received, counts = result[:2]
    shape = batch.shape
    if format == "bf16":
        rows = received.float()
    else:
        e4m3, scales = received
        blocks = shape.hidden // 128
        if format == "ue8m0":
            exponents = torch.stack([scales >> shift & 0xFF for shift in (0, 8, 16, 24)], 3).flatten(2)
            scales = torch.exp2(exponents[..., :blocks].float() - 127)
        rows = (e4m3.float().view(*e4m3.shape[:2], blocks, 128) * scales.unsqueeze(3)).view(e4m3.shape)
    device, first = rows.device, rank * shape.local_experts
    experts = torch.arange(first, first + shape.local_experts, dtype=torch.int64, device=device)
    used = torch.arange(rows.shape[1], dtype=torch.int64, device=device) < counts.unsqueeze(1)
    y = torch.where(used.unsqueeze(2), rows * factor(experts)[:, None, None], torch.nan).bfloat16()
    return y if into is None else into.copy_(y)


def factor(expert: int | Tensor) -> Any:
    return (expert % 5 + 1) / 2


def combined(
    batch: Batch,
    rank: int,
    format: str,
    topk_idx: Tensor | None = None,
    masked: Set[int] = frozenset(),
) -> Tensor:
    """What ``low_latency_combine`` of :func:`expert_outputs` must give: BF16 sums per rank, added in rank order."""
    shape, x, weights = batch.shape, batch.x[rank], batch.weights[rank]
    chosen = batch.topk_idx[rank] if topk_idx is None else topk_idx
    if format == "bf16":
        row = x.float()
    else:
        e4m3, scales = quantized(x, format)
        row = (e4m3.float().view(*scales.shape, 128) * scales.unsqueeze(2)).view(x.shape)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for owner in range(shape.ranks):
        if owner in masked:
            continue
        partial = torch.zeros_like(total)
        for k in range(shape.topk):
            expert = chosen[:, k : k + 1]
            here = (expert >= 0) & (expert // shape.local_experts == owner)
            y = (row * factor(expert)).bfloat16().float()
            partial = torch.where(here, partial + weights[:, k : k + 1] * y, partial)
        total += partial.bfloat16().float()
    return total.bfloat16()


def differs(got: Tensor, expected: Tensor) -> Tensor:
    """Which values of a combine are wrong: NaN, or off by more than two units in the last place of BF16.

    Kernels multiply and add with one rounding, :func:`combined` with two. That can round a rank's sum to its other
    neighbour in BF16 (about one sum in 400,000). Where the total of the ranks is halfway between two values of BF16,
    it then moves by two units (about once in 300 million values), never by more.
    """
    return ~((got.float() - expected.float()).abs() <= expected.float().abs() * 2**-6 + 2**-6)


def check_combine(got: Tensor, expected: Tensor, where: str) -> None:
    """Every value, within the bound of :func:`differs`."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    wrong = differs(got, expected)
    if wrong.any():
        token, channel = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} values are wrong, tokens "
            f"{wrong.any(1).nonzero().squeeze(1).tolist()[:16]}; token {token} channel {channel}: "
            f"{got[token, channel].item()}, expected {expected[token, channel].item()}"
        )
    if got.numel():
        a, b = got.double(), expected.double()
        difference = 1 - 2 * (a * b).sum() / (a * a + b * b).sum().clamp(min=1e-30)
        assert b.abs().sum() == 0 or difference < 1e-5, f"{where}: difference {difference.item()}"


def _same(got: Tensor, expected: Tensor, where: str) -> None:
    if torch.equal(got, expected):
        return
    wrong = got != expected
    row, column = wrong.nonzero()[0].tolist()
    raise AssertionError(
        f"{where}: {int(wrong.sum())} of {wrong.numel()} values are wrong, rows "
        f"{wrong.any(1).nonzero().squeeze(1).tolist()[:16]}; row {row} column {column}: {got[row, column].item()}, "
        f"expected {expected[row, column].item()}"
    )
