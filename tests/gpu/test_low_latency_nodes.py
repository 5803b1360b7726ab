"""Low-latency calls over several nodes beside those of one NVLink domain: equal results, memory, errors.

    torchrun --nproc-per-node 4 -m pytest tests/gpu/test_low_latency_nodes.py

All values are checked by the tests of one domain, which run over nodes as well:

    DEEPEP_MOE_RAIL=nvshmem DEEPEP_MOE_RANKS_PER_NODE=2 torchrun --nproc-per-node 4 -m pytest \\
        tests/gpu/test_low_latency.py

Puts between GPUs of one host are stores over NVLink: this proves order, signals, places and failures, not RDMA.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from deepep_moe import Buffer, nvshmem
from deepep_moe.errors import CapacityError
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks, destroy
from tests.gpu.low_latency_util import DeviceBatch, dispatch, round_trip, shape_of, wrong_in_combine, wrong_in_dispatch
from tests.low_latency_util import FORMATS, Batch, Shape, expert_outputs

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
CUTS = [cut for cut in (1, 2, 4) if cut < WORLD_SIZE and WORLD_SIZE % cut == 0]
REPLAYS = int(os.environ.get("LOW_LATENCY_REPLAYS", "1000"))
NVSHMEM_BYTES = 512 << 20

pytestmark = [
    pytest.mark.skipif(WORLD_SIZE < 2, reason="needs two ranks or more"),
    pytest.mark.skipif(nvshmem.why_missing() is not None, reason=str(nvshmem.why_missing())),
]
MakeBuffer = Callable[..., Buffer]


@pytest.fixture
def make_buffer(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeBuffer]:
    """Makes Buffers on nodes of ``cut`` ranks; 0: on one node."""
    made: list[Buffer] = []

    def make(cut: int, timeout_seconds: float = TIMEOUT_SECONDS, rail: str = "nvshmem", rdma_bytes: int = 0) -> Buffer:
        monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
        monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(timeout_seconds))
        monkeypatch.setenv("DEEPEP_MOE_RANKS_PER_NODE", str(cut))
        monkeypatch.setenv("DEEPEP_MOE_RAIL", rail if cut else "nccl")
        monkeypatch.setenv("DEEPEP_MOE_NVSHMEM_BYTES", str(NVSHMEM_BYTES))
        made.append(Buffer(ranks.group, low_latency_mode=True, num_rdma_bytes=rdma_bytes))
        return made[-1]

    yield make
    destroy(ranks, made)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cut", CUTS)
def test_equal_to_one_node_bit_for_bit(ranks: Ranks, make_buffer: MakeBuffer, cut: int) -> None:
    buffers, rank, choose = [make_buffer(0), make_buffer(cut)], ranks.rank, random.Random(cut)
    assert [buffer._opened().engine for buffer in buffers] == ["cuda", "nodes"]
    for number in range(24):
        room, hidden = choose.choice([1, 16, 130]), choose.choice([128, 896, 7168])
        topk = choose.choice([1, 4, 6])
        tokens = tuple(choose.choice([0, room // 2, room]) for _ in range(ranks.size))
        batch = Batch(number, Shape(room, hidden, topk, 6 * ranks.size, tokens), ranks.device)
        format, hooks = list(FORMATS)[number % 4], number % 3 == 0
        results = []
        for buffer in buffers:
            result = dispatch(buffer, batch, return_recv_hook=hooks, **FORMATS[format])
            if hooks:
                result[4]()
            y = expert_outputs(batch, rank, format, result)
            out, _, hook = buffer.low_latency_combine(
                y, batch.topk_idx[rank], batch.weights[rank], result[2], return_recv_hook=hooks
            )
            if hook is not None:
                hook()
            rows, scales = result[0] if isinstance(result[0], tuple) else (result[0], None)
            used = [slice(0, count) for count in result[1].tolist()]
            kept = [rows.view(torch.uint8)[expert, part] for expert, part in enumerate(used)]
            if scales is not None:
                kept += [scales[expert, part] for expert, part in enumerate(used)]
            kept += [result[2][0][expert, part] for expert, part in enumerate(used)]
            results.append([*kept, result[1], result[2][1], out.view(torch.int16)])
        for one, other in zip(*results):
            assert torch.equal(one, other), f"batch {number} {format} {batch.shape}, rank {rank}"


@pytest.mark.timeout(120 + REPLAYS // 20)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("hooks", [False, True])
def test_a_captured_step_is_replayed(ranks: Ranks, make_buffer: MakeBuffer, cut: int, hooks: bool) -> None:
    """LOW_LATENCY_REPLAYS with new routing, ranks skewed at random; every value is checked on the device."""
    torch.cuda.manual_seed(11)  # on all ranks: they draw the same batches
    buffer, rank, shape = make_buffer(cut), ranks.rank, shape_of(ranks, room=24, hidden=896, topk=5)
    wrong = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    rows = torch.zeros(1, dtype=torch.int64, device=ranks.device)

    def step() -> None:
        batch = DeviceBatch(shape, ranks.device)
        result = dispatch(buffer, batch, return_recv_hook=hooks)
        if hooks:
            result[4]()
        y = expert_outputs(batch, rank, "fp8", result)
        out, _, hook = buffer.low_latency_combine(
            y, batch.topk_idx[rank], batch.weights[rank], result[2], return_recv_hook=hooks
        )
        if hook is not None:
            hook()
        wrong[0] += wrong_in_dispatch(batch, rank, "fp8", result)
        wrong[1] += wrong_in_combine(batch, rank, "fp8", out)
        rows.add_(result[1].sum())

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    skew = random.Random(rank)
    for number in range(REPLAYS):
        if skew.random() < 0.1:
            torch.cuda._sleep(skew.randrange(1_000_000))
        graph.replay()
        if number % 200 == 199:
            torch.cuda.synchronize()
            buffer.low_latency_check()
    assert wrong.tolist() == [0, 0], "wrong values in dispatch and combine"
    assert rows.item() > REPLAYS, "the graph drew no routes"


@pytest.mark.timeout(60)
def test_rdma_bytes_choose_the_engine(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """As DeepEP's programs ask for it. Without either the calls run on the reference."""
    shape = shape_of(ranks)
    hint = Buffer.get_low_latency_rdma_size_hint(shape.max_tokens, shape.hidden, ranks.size, shape.experts)
    buffer = make_buffer(CUTS[0], rail="nccl", rdma_bytes=hint)
    assert buffer._opened().engine == "nodes"
    before = free_bytes()
    round_trip(buffer, Batch(0, shape, ranks.device), "fp8", "rdma bytes")
    assert 0 < before - free_bytes() <= hint
    assert make_buffer(CUTS[0], rail="nccl")._opened().engine == "reference"


@pytest.mark.timeout(60)
def test_too_little_memory_is_an_error_on_all_ranks(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, batch = make_buffer(CUTS[0]), Batch(0, shape_of(ranks, hidden=7168), ranks.device)
    for _ in range(2):
        with pytest.raises(CapacityError, match=r"bytes of symmetric memory are needed, and of \d+ at most"):
            dispatch(buffer, batch, num_max_dispatch_tokens_per_rank=1 << 14)
        round_trip(buffer, batch, "fp8", "after")
    buffer.low_latency_check()


@pytest.mark.timeout(60)
def test_a_destroyed_buffer_gives_its_memory_back(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    batch, free = Batch(0, shape_of(ranks), ranks.device), []
    for number in range(3):
        buffer = make_buffer(CUTS[-1])
        round_trip(buffer, batch, "fp8", f"buffer {number}")
        torch.cuda.synchronize()
        dist.barrier(ranks.group)
        buffer.destroy()
        free.append(free_bytes())
    assert free[0] - free[2] < 2 * (1 << 20)  # control blocks and signals are kept


def free_bytes() -> int:
    assert nvshmem._world is not None
    return sum(size for _, size in nvshmem._world.free)
