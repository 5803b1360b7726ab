"""What the GPU tests of the low-latency calls share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepep_moe import Buffer
from tests.gpu.conftest import Ranks
from tests.low_latency_util import FORMATS, Batch, Shape, check_combine, check_dispatch, combined, expert_outputs

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


def round_trip(buffer: Buffer, batch: Batch, format: str, where: str) -> None:
    """One dispatch and combine, every value checked."""
    rank = buffer.rank
    result = dispatch(buffer, batch, **FORMATS[format])
    check_dispatch(batch, rank, format, result)
    y = expert_outputs(batch, rank, format, result)
    out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
    check_combine(out, combined(batch, rank, format), f"{where}, rank {rank}")


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
