"""Low-latency calls of more than 32 ranks, which share GPUs under CUDA MPS: in one domain and over two nodes.

torchrun --nproc-per-node 40 --local-ranks-filter 0 --no-python python -m pytest tests/gpu/test_low_latency_ranks.py
DEEPEP_MOE_RAIL=nvshmem DEEPEP_MOE_RANKS_PER_NODE=20 torchrun ... (the same over several nodes)
"""

from __future__ import annotations

import random

import pytest
import torch

from deepep_moe.errors import InputError
from tests.gpu.conftest import Ranks
from tests.gpu.low_latency_util import MakeBuffer, dispatch, end_masks, round_trip
from tests.gpu.test_low_latency import SelfChecked
from tests.gpu.test_low_latency_failures import hear
from tests.low_latency_util import FORMATS, Batch, Shape, check_combine, check_dispatch, combined, expert_outputs

SHORT_SECONDS = 5.0  # longest wait for a rank that does not come
REPLAYS = 200


@pytest.fixture(autouse=True)
def more_than_32(ranks: Ranks) -> None:
    if ranks.size <= 32:
        pytest.skip("needs more than 32 ranks")


def shape_of(ranks: Ranks) -> Shape:
    tokens = tuple((5 * rank + 3) % 9 for rank in range(ranks.size))  # 0 to 8
    return Shape(8, 256, 8, 3 * ranks.size, tokens)


@pytest.mark.timeout(90)
def test_values(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, rank = make_buffer(), ranks.rank
    for seed, format in enumerate(FORMATS):
        batch = Batch(seed, shape_of(ranks), ranks.device)
        round_trip(buffer, batch, format, format)
        result = dispatch(buffer, batch, return_recv_hook=True, **FORMATS[format])
        result[4]()
        check_dispatch(batch, rank, format, result)
        y = expert_outputs(batch, rank, format, result)
        out, _, hook = buffer.low_latency_combine(
            y, batch.topk_idx[rank], batch.weights[rank], result[2], return_recv_hook=True
        )
        hook()
        check_combine(out, combined(batch, rank, format), f"{format} with hooks, rank {rank}")
    buffer.low_latency_check()


@pytest.mark.timeout(120)
def test_replays(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """New routing in each, ranks skewed at random."""
    torch.cuda.manual_seed(7)  # on all ranks: they draw the same batches
    buffer, skew = make_buffer(), random.Random(ranks.rank)
    graphs = [SelfChecked(buffer, shape_of(ranks), "fp8", ranks.device, hooks) for hooks in (True, False)]
    for number in range(REPLAYS):
        if skew.random() < 0.1:
            torch.cuda._sleep(skew.randrange(1_000_000))
        graphs[number % 2].graph.replay()
    for graph in graphs:
        assert graph.wrong.tolist() == [0, 0], "wrong values in dispatch and combine"
        assert graph.rows.item() > REPLAYS, "the graphs drew no routes"
    buffer.low_latency_check()


@pytest.mark.timeout(90)
def test_masks(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """Of ranks in different words of a set: by hand, then because they do not come."""
    buffer, rank = make_buffer(SHORT_SECONDS, enable_shrink=True), ranks.rank
    lost = {1, 33, ranks.size - 1}
    status = torch.full((ranks.size,), 7, dtype=torch.int32, device=ranks.device)
    round_trip(buffer, Batch(0, shape_of(ranks), ranks.device), "fp8", "before")

    def masked_call(seed: int) -> None:
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "bf16", f"masked {lost}", lost)
        buffer.low_latency_query_mask_buffer(status)
        assert [r for r in range(ranks.size) if status[r]] == sorted(lost), f"rank {rank}: {status.tolist()}"

    for by_hand in (True, False):
        if rank not in lost:
            if by_hand:
                for r in lost:
                    buffer.low_latency_update_mask_buffer(r, True)
            for seed in range(2):
                masked_call(seed)
        end_masks(ranks, buffer)
        round_trip(buffer, Batch(3, shape_of(ranks), ranks.device), "fp8", f"after masks, by hand: {by_hand}")
    buffer.low_latency_check()


@pytest.mark.timeout(90)
def test_a_refusal(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """By a rank that is not among the first 32."""
    buffer, refuser = make_buffer(), 35
    batch = Batch(0, shape_of(ranks), ranks.device)
    round_trip(buffer, batch, "fp8", "before")
    if ranks.rank == refuser:
        with pytest.raises(InputError, match=r"x = torch\.float32"):
            dispatch(buffer, batch, x=batch.x[refuser].float())
    else:
        result = dispatch(buffer, batch)
        without = Batch(0, shape_of(ranks), ranks.device)
        without.topk_idx[refuser] = torch.full_like(without.topk_idx[refuser], -1)
        check_dispatch(without, ranks.rank, "fp8", result)
    hear(ranks, buffer, refuser)
    round_trip(buffer, batch, "fp8", "after")
    buffer.low_latency_check()
