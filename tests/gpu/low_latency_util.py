"""What the GPU tests of the low-latency calls share."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import Buffer
from tests.gpu.conftest import Ranks
from tests.low_latency_util import (
    FORMATS,
    Batch,
    Shape,
    check_combine,
    check_dispatch,
    combined,
    differs,
    expert_outputs,
    packed_exponents,
    quantized,
)

MakeBuffer = Callable[..., Buffer]


def shape_of(ranks: Ranks, room: int = 16, hidden: int = 512, topk: int = 4, experts: int = 6) -> Shape:
    tokens = tuple(max(0, room - 3 * r) for r in range(ranks.size))
    return Shape(room, hidden, topk, experts * ranks.size, tokens)


def dispatch(buffer: Buffer, batch: Batch, **options: Any) -> Any:
    rank = buffer.rank
    arguments: dict[str, Any] = {
        "x": batch.x[rank],
        "topk_idx": batch.topk_idx[rank],
        "num_max_dispatch_tokens_per_rank": batch.shape.max_tokens,
        "num_experts": batch.shape.experts,
    }
    return buffer.low_latency_dispatch(**{**arguments, **options})


def round_trip(buffer: Buffer, batch: Batch, format: str, where: str, masked: Set[int] = frozenset()) -> None:
    """One dispatch and combine, every value checked. ``masked``: ranks that this one has masked."""
    rank = buffer.rank
    result = dispatch(buffer, batch, **FORMATS[format])
    check_dispatch(batch, rank, format, result, masked)
    y = expert_outputs(batch, rank, format, result)
    out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
    check_combine(out, combined(batch, rank, format, masked=masked), f"{where}, rank {rank}")


def end_masks(ranks: Ranks, buffer: Buffer) -> None:
    """Collective, with the ranks that were masked."""
    torch.cuda.synchronize()
    dist.barrier(ranks.group)
    buffer.low_latency_clean_mask_buffer()
    status = torch.full((ranks.size,), 7, dtype=torch.int32, device=ranks.device)
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any(), f"rank {ranks.rank}: still masked: {status.tolist()}"
    torch.cuda.synchronize()
    dist.barrier(ranks.group)


def normal_round_trip(buffer: Buffer, batch: Batch) -> None:
    """The same in normal mode, so that both engines have calls on the stream."""
    rank = buffer.rank
    topk_idx = batch.topk_idx[rank]
    *_, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, batch.shape.experts)
    rows, *_, handle, _ = buffer.dispatch(
        batch.x[rank], is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx
    )
    back, _, _ = buffer.combine(rows, handle)
    assert torch.equal(back, (in_rank.sum(1, keepdim=True) * batch.x[rank].float()).bfloat16())


class DeviceBatch(Batch):
    """A batch from the GPU's generator: drawn again by each replay of a graph that captured this.

    Ranks with equally seeded generators draw the same numbers.
    """

    def __init__(self, shape: Shape, device: torch.device, dropped: float = 0.1) -> None:
        self.shape = shape
        ranks, room = shape.ranks, shape.max_tokens
        options: Any = {"dtype": torch.float32, "device": device}
        self.all_x = torch.randn(ranks, room, shape.hidden, **options).bfloat16()
        chosen = torch.rand(ranks, room, shape.experts, **options).topk(shape.topk, dim=2).indices
        lost = torch.rand(ranks, room, shape.topk, **options) < dropped
        weights = torch.rand(ranks, room, shape.topk, **options)
        for rank, tokens in enumerate(shape.tokens):
            lost[rank, tokens:] = True
        self.all_topk_idx = chosen.masked_fill(lost, -1)
        self.x = [self.all_x[rank, :tokens] for rank, tokens in enumerate(shape.tokens)]
        self.topk_idx = [self.all_topk_idx[rank, :tokens] for rank, tokens in enumerate(shape.tokens)]
        self.weights = [weights[rank, :tokens] for rank, tokens in enumerate(shape.tokens)]


def wrong_in_dispatch(batch: DeviceBatch, rank: int, format: str, result: Any) -> Tensor:
    """How many values of ``result`` are wrong, without a wait for the device: what check_dispatch checks."""
    received, counts, (src_info, layout_range, *_) = result[:3]
    shape, device = batch.shape, counts.device
    slots, first = shape.ranks * shape.max_tokens, rank * shape.local_experts
    experts = torch.arange(first, first + shape.local_experts, dtype=torch.int64, device=device)
    chosen = (batch.all_topk_idx.view(slots, 1, shape.topk) == experts[:, None]).any(2).t()  # [L, R * M]: source order
    place = torch.where(chosen, chosen.cumsum(1) - 1, slots)
    source = torch.arange(slots, dtype=torch.int64, device=device).expand(shape.local_experts, slots)
    index = torch.full((shape.local_experts, slots + 1), slots, dtype=torch.int64, device=device)
    index = index.scatter_(1, place, source)[:, :slots]
    used = index < slots
    index = torch.where(used, index, 0)
    by_source = chosen.view(shape.local_experts, shape.ranks, shape.max_tokens).sum(2)
    wrong = (counts != chosen.sum(1)).sum() + (
        layout_range != ((by_source.cumsum(1) - by_source) << 32 | by_source)
    ).sum()
    wrong += ((src_info != index % shape.max_tokens) & used).sum()
    x = batch.all_x.view(slots, shape.hidden)
    if format == "bf16":
        return wrong + ((received != x[index]) & used.unsqueeze(2)).sum()
    rows, scales = received
    expected_rows, expected_scales = quantized(x, format)
    if format == "ue8m0":
        expected_scales = packed_exponents(expected_scales)
    different = rows.view(torch.uint8) != expected_rows.view(torch.uint8)[index]
    return (
        wrong + (different & used.unsqueeze(2)).sum() + ((scales != expected_scales[index]) & used.unsqueeze(2)).sum()
    )


def wrong_in_combine(batch: Batch, rank: int, format: str, got: Tensor) -> Tensor:
    """How many values of a combine are wrong, without a wait for the device."""
    return differs(got, combined(batch, rank, format)).sum()
