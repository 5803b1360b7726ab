"""The low-latency kernels against plain PyTorch: every value that they give.

    torchrun --nproc-per-node 2 -m pytest tests/gpu/test_low_latency.py
    LOW_LATENCY_REPLAYS=10000 LOW_LATENCY_SHAPES=200 torchrun --nproc-per-node 4 -m pytest tests/gpu/test_low_latency.py
    DEEPEP_MOE_RAIL=nvshmem DEEPEP_MOE_RANKS_PER_NODE=2 torchrun --nproc-per-node 4 -m pytest \\
        tests/gpu/test_low_latency.py

Replays that are checked on the device (300; 10,000 take about half a minute) and random shapes (80) are as many as
these variables say. Under compute-sanitizer (memcheck or racecheck) one test takes about 20 seconds:

    torchrun --nproc-per-node 2 --no-python compute-sanitizer --tool memcheck --report-api-errors no \\
        --kernel-name kns=deepep_moe python -m pytest tests/gpu/test_low_latency.py -k special_values
"""

from __future__ import annotations

import itertools
import os
import random
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import Buffer
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import HandleError
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.low_latency_util import (
    DeviceBatch,
    MakeBuffer,
    dispatch,
    normal_round_trip,
    round_trip,
    shape_of,
    wrong_in_combine,
    wrong_in_dispatch,
)
from tests.low_latency_util import FORMATS, Batch, Shape, check_combine, check_dispatch, combined, expert_outputs

REPLAYS = int(os.environ.get("LOW_LATENCY_REPLAYS", "300"))
HOST_CHECKED_REPLAYS = min(REPLAYS, 300)
SHAPES = int(os.environ.get("LOW_LATENCY_SHAPES", "80"))

# ------------------------------------------------------------------------------------------- values


@pytest.mark.timeout(120)
@pytest.mark.parametrize("format", FORMATS)
def test_every_combination(ranks: Ranks, make_buffer: MakeBuffer, format: str) -> None:
    buffer, rank = make_buffer(), ranks.rank
    modes = ("plain", "async", "hook")
    switches = itertools.product(modes, modes, (False, True), (False, True), (False, True))
    for seed, (mode, back, zero_copy, given_out, dropped) in enumerate(switches):
        batch = Batch(seed, shape_of(ranks), ranks.device)
        if seed % 2:
            batch.topk_idx = [t.int() for t in batch.topk_idx]
        topk_idx = batch.topk_idx[rank]
        where = f"{format} {mode} {back} zero_copy={zero_copy} out={given_out} dropped={dropped}, rank {rank}"
        options = {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}
        x = batch.x[rank].clone()
        result = dispatch(buffer, batch, x=x, **FORMATS[format], **options)
        event, hook = result[3:]
        if hook is not None:
            x.fill_(torch.nan)  # it has been sent
            hook()
        event.current_stream_wait()
        check_dispatch(batch, rank, format, result)
        into = buffer.get_next_low_latency_combine_buffer(result[2]) if zero_copy else None
        y = expert_outputs(batch, rank, format, result, into)
        if dropped:
            topk_idx = topk_idx.clone()
            topk_idx[:, 0] = -1
        out = torch.full_like(batch.x[rank], torch.nan) if given_out else None
        options = {"async_finish": back == "async", "return_recv_hook": back == "hook"}
        got, event, hook = buffer.low_latency_combine(
            torch.full_like(y, torch.nan) if zero_copy else y,
            topk_idx,
            batch.weights[rank],
            result[2],
            use_logfmt=bool(seed % 3),
            zero_copy=zero_copy,
            out=out,
            **options,
        )
        if hook is not None:
            hook()
        event.current_stream_wait()
        assert out is None or got is out, where
        check_combine(got, combined(batch, rank, format, topk_idx), where)
    buffer.low_latency_check()


@pytest.mark.timeout(120 + 2 * SHAPES)
def test_random_shapes(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """LOW_LATENCY_SHAPES of them, several for each allocation."""
    choose, buffer = random.Random(1), None
    rooms, hiddens = [1, 2, 7, 33, 64, 130], [8, 24, 128, 384, 640, 1000, 2048, 7168]
    for number in range(SHAPES):
        if number % 10 == 0:
            room, hidden = choose.choice(rooms), choose.choice(hiddens)
            if buffer is None or number % 40 == 0:
                buffer = make_buffer()
        local = choose.choice([1, 2, 3, 8, 24, max(1, 256 // ranks.size)])
        topk = min(choose.choice([1, 2, 5, 6, 8, 9, 32]), local * ranks.size)
        tokens = tuple(choose.choice([0, 1, room // 2, room]) for _ in range(ranks.size))
        shape = Shape(room, hidden, topk, local * ranks.size, tokens)
        format = choose.choice(list(FORMATS)) if hidden % 128 == 0 else "bf16"
        batch = Batch(number, shape, ranks.device, dropped=choose.choice([0.0, 0.1, 0.9]))
        round_trip(buffer, batch, format, f"shape {number}: {shape} {format}")
    assert buffer is not None
    buffer.low_latency_check()


@pytest.mark.timeout(120)
def test_the_first_call_of_each_shape(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """It is announced to the peers before its memory is made; nobody may take the announcement for the call."""
    buffer, skew = make_buffer(), random.Random(ranks.rank)
    for number in range(12):
        torch.cuda._sleep(skew.randrange(1, 500_000))
        shape = Shape(40 + number, 128, 4, 8 * ranks.size, (40 + number,) * ranks.size)
        round_trip(buffer, Batch(number, shape, ranks.device), "fp8", f"shape {number}")
    buffer.low_latency_check()


@pytest.mark.timeout(120)
def test_many_tokens(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """M = 4096: several passes over everything, several tiles of tables."""
    buffer = make_buffer()
    shape = Shape(4096, 256, 8, 8 * ranks.size, tuple(4096 - 5 * r for r in range(ranks.size)))
    for seed, format in enumerate(("bf16", "fp8")):
        round_trip(buffer, Batch(seed, shape, ranks.device), format, f"4096 tokens {format}")


@pytest.mark.timeout(60)
def test_no_tokens_and_special_values(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, rank = make_buffer(), ranks.rank
    shape = shape_of(ranks)
    round_trip(buffer, Batch(0, Shape(16, 512, 4, shape.experts, (0,) * ranks.size), ranks.device), "fp8", "no tokens")
    batch = Batch(1, shape, ranks.device, dropped=1.0)
    round_trip(buffer, batch, "bf16", "everything dropped")
    # bit patterns that packets must carry: all ones, all zeros, -0, infinities
    batch = Batch(2, shape, ranks.device)
    patterns = torch.tensor([-1, 0, -32768, 0x7F80, -128], dtype=torch.int16, device=ranks.device)
    for x in batch.x:
        x.view(torch.int16)[:, :500] = patterns.repeat(100)
    rows, counts = dispatch(buffer, batch, use_fp8=False)[:2]
    for local, count in enumerate(counts.tolist()):
        got = rows[local, :count].float()
        expected = batch.x[rank][0].float() if batch.x[rank].numel() else None
        if expected is not None and count:
            assert torch.equal(got[:, :500].isnan(), expected[:500].isnan().expand(count, 500))
            assert torch.equal(got[:, :500].nan_to_num(7), expected[:500].nan_to_num(7).expand(count, 500))


@pytest.mark.timeout(60)
def test_results_are_the_same_each_time(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, rank = make_buffer(), ranks.rank
    batch = Batch(3, shape_of(ranks, topk=6), ranks.device)
    first: list[Tensor] = []
    for _ in range(20):
        torch.cuda._sleep(random.randrange(200_000))
        result = dispatch(buffer, batch)
        y = expert_outputs(batch, rank, "fp8", result)
        out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
        first = first or [out]
        assert torch.equal(out, first[0])


# ------------------------------------------------------------------------------------------- graphs


class Captured:
    """Dispatch, hook, combine, hook in one graph, over inputs that can be replaced."""

    def __init__(self, buffer: Buffer, shape: Shape, format: str, device: torch.device, hooks: bool = True) -> None:
        self.rank, self.format = buffer.rank, format
        self.batch = Batch(0, shape, device)
        self.x, self.topk_idx = self.batch.x[self.rank].clone(), self.batch.topk_idx[self.rank].clone()
        self.weights = self.batch.weights[self.rank].clone()
        self._step(buffer, hooks)  # allocates
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(buffer, hooks)

    def _step(self, buffer: Buffer, hooks: bool) -> None:
        self.result = dispatch(
            buffer, self.batch, x=self.x, topk_idx=self.topk_idx, return_recv_hook=hooks, **FORMATS[self.format]
        )
        if hooks:
            self.result[4]()
        y = expert_outputs(self.batch, self.rank, self.format, self.result)
        self.out, _, hook = buffer.low_latency_combine(
            y, self.topk_idx, self.weights, self.result[2], return_recv_hook=hooks
        )
        if hook is not None:
            hook()

    def replay(self, seed: int) -> None:
        self.batch = Batch(seed, self.batch.shape, self.x.device)
        self.x.copy_(self.batch.x[self.rank])
        self.topk_idx.copy_(self.batch.topk_idx[self.rank])
        self.weights.copy_(self.batch.weights[self.rank])
        self.graph.replay()

    def check(self, where: str) -> None:
        check_dispatch(self.batch, self.rank, self.format, self.result)
        check_combine(self.out, combined(self.batch, self.rank, self.format), f"{where}, rank {self.rank}")


class SelfChecked:
    """A graph that draws a batch, moves it both ways, and adds up what is wrong: no replay waits for the host."""

    def __init__(self, buffer: Buffer, shape: Shape, format: str, device: torch.device, hooks: bool) -> None:
        self.format, self.hooks = format, hooks
        self.wrong = torch.zeros(2, dtype=torch.int64, device=device)
        self.rows = torch.zeros(1, dtype=torch.int64, device=device)
        self._step(buffer, shape)  # allocates
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(buffer, shape)

    def _step(self, buffer: Buffer, shape: Shape) -> None:
        batch, rank = DeviceBatch(shape, self.wrong.device), buffer.rank
        result = dispatch(buffer, batch, return_recv_hook=self.hooks, **FORMATS[self.format])
        if self.hooks:
            result[4]()
        y = expert_outputs(batch, rank, self.format, result)
        out, _, hook = buffer.low_latency_combine(
            y, batch.topk_idx[rank], batch.weights[rank], result[2], return_recv_hook=self.hooks
        )
        if hook is not None:
            hook()
        self.wrong[0] += wrong_in_dispatch(batch, rank, self.format, result)
        self.wrong[1] += wrong_in_combine(batch, rank, self.format, out)
        self.rows += result[1].sum()


@pytest.mark.timeout(120 + REPLAYS // 50)
def test_replays_checked_on_the_device(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """LOW_LATENCY_REPLAYS with new routing in each, ranks skewed at random; every value is checked."""
    torch.cuda.manual_seed(7)  # on all ranks: they draw the same batches
    buffer = make_buffer()
    graphs = [
        SelfChecked(buffer, shape_of(ranks), "fp8", ranks.device, hooks=True),
        SelfChecked(buffer, shape_of(ranks, topk=6), "bf16", ranks.device, hooks=False),
        SelfChecked(
            buffer, shape_of(ranks, room=24, hidden=896, experts=3, topk=3), "ue8m0", ranks.device, hooks=False
        ),
    ]
    skew = random.Random(ranks.rank)
    for number in range(REPLAYS):
        if skew.random() < 0.1:
            torch.cuda._sleep(skew.randrange(1_000_000))
        graphs[number % len(graphs)].graph.replay()
        if number % 500 == 499:
            torch.cuda.synchronize()
            buffer.low_latency_check()
    for graph in graphs:
        assert graph.wrong.tolist() == [0, 0], f"{graph.format}: wrong values in dispatch and combine"
        assert REPLAYS < 50 or graph.rows.item() > REPLAYS, "the graphs drew no routes"
    buffer.low_latency_check()


@pytest.mark.timeout(180 + HOST_CHECKED_REPLAYS)
def test_replays_of_several_graphs(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """New routing, ranks skewed at random, eager calls of both kinds between replays."""
    buffer, rank = make_buffer(), ranks.rank
    graphs = [
        Captured(buffer, shape_of(ranks), "fp8", ranks.device),
        Captured(buffer, shape_of(ranks, topk=6), "bf16", ranks.device, hooks=False),
        Captured(buffer, shape_of(ranks, room=24, hidden=896, experts=3, topk=3), "ue8m0", ranks.device),
    ]
    skew = random.Random(rank)
    for number in range(HOST_CHECKED_REPLAYS):
        if skew.random() < 0.3:
            torch.cuda._sleep(skew.randrange(1_000_000))
        graph = graphs[number % len(graphs)]
        graph.replay(number)
        if number % 4 == 0:  # two graphs before anything is looked at
            graphs[(number + 1) % len(graphs)].replay(number + 7)
            graphs[(number + 1) % len(graphs)].check(f"second replay {number}")
        if number % 10 == 0:
            round_trip(buffer, Batch(number, shape_of(ranks), ranks.device), "fp8", f"eager after {number}")
        if number % 10 == 5:
            normal_round_trip(buffer, graph.batch)
        graph.check(f"replay {number}")
    buffer.low_latency_check()


@pytest.mark.timeout(120)
def test_replays_at_full_size(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """The shape of the benchmark, every value."""
    if ranks.num_sms:
        pytest.skip("ranks share a GPU: the reference needs several GB of each")
    buffer = make_buffer()
    experts = 288 // ranks.size * ranks.size
    shape = Shape(128, 7168, 8, experts, (128,) * ranks.size)
    graph = Captured(buffer, shape, "fp8", ranks.device)
    for number in range(10):
        graph.replay(number)
        graph.check(f"replay {number}")


# ------------------------------------------------------------------------------------------- order


@pytest.mark.timeout(60)
def test_two_calls_in_flight(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """Dual batch: both sent, then both received, many times; ranks apart from each other."""
    buffer, rank = make_buffer(), ranks.rank
    skew = random.Random(100 + rank)
    for number in range(20):
        batches = [Batch(2 * number + i, shape_of(ranks), ranks.device) for i in range(2)]
        results = []
        for batch in batches:
            torch.cuda._sleep(skew.randrange(1, 500_000))
            results.append(dispatch(buffer, batch, use_fp8=False, return_recv_hook=True))
        order = list(zip(batches, results))
        if number % 2:
            order.reverse()
        sent = []
        for batch, result in order:
            result[4]()
            y = expert_outputs(batch, rank, "bf16", result)
            sent.append(
                buffer.low_latency_combine(
                    y, batch.topk_idx[rank], batch.weights[rank], result[2], return_recv_hook=True
                )
            )
        for (batch, result), (out, _, hook) in zip(order, sent):
            hook()
            check_dispatch(batch, rank, "bf16", result)
            check_combine(out, combined(batch, rank, "bf16"), f"pair {number}, rank {rank}")
    results = [dispatch(buffer, batches[0], return_recv_hook=True) for _ in range(2)]
    with pytest.raises(HandleError, match=r"return_recv_hook: the hook of dispatch 41 .* at most 2"):
        dispatch(buffer, batches[0])
    for result in results:
        result[4]()
    with pytest.raises(HandleError, match="hook of dispatch 41 was called twice"):
        results[0][4]()


@pytest.mark.timeout(60)
def test_a_rank_that_is_late_by_seconds(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer = make_buffer()
    for seed in range(2):
        if ranks.rank == ranks.size - 1:
            time.sleep(2)
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "fp8", "late")
    waits = torch.zeros(ranks.size, dtype=torch.int64, device=ranks.device)
    stats = torch.ones(6, dtype=torch.int32, device=ranks.device)
    if ranks.rank == ranks.size - 1:
        torch.cuda.synchronize()
        time.sleep(1)
    batch = Batch(5, shape_of(ranks), ranks.device)
    result = dispatch(buffer, batch, cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waits)
    assert torch.equal(stats, result[1] + 1)
    if ranks.size > 1 and ranks.rank == 0:
        assert 5e8 < waits[-1].item() < 5e9, f"nanoseconds waited: {waits.tolist()}"


@pytest.mark.timeout(60)
def test_a_dispatcher_decodes_in_a_graph(ranks: Ranks) -> None:
    """Generation in a captured graph, training steps of the same dispatcher between its replays."""
    rank, shape = ranks.rank, shape_of(ranks)
    config = replace(DispatcherConfig.load(), timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms)
    dispatcher = TokenDispatcher(ranks.group, shape.experts, config, device=ranks.device)
    decoder = dispatcher.decoder(shape.max_tokens)
    batch = Batch(0, shape, ranks.device)
    x, topk_idx, weights = batch.x[rank].clone(), batch.topk_idx[rank].clone(), batch.weights[rank].clone()

    def step() -> Tensor:
        sent = decoder.dispatch(x, topk_idx)
        return decoder.combine(expert_outputs(batch, rank, "bf16", (sent.rows, sent.counts)), sent, weights)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(5):
        batch = Batch(seed, shape, ranks.device)
        x.copy_(batch.x[rank])
        topk_idx.copy_(batch.topk_idx[rank])
        weights.copy_(batch.weights[rank])
        graph.replay()
        trained = dispatcher.dispatch(batch.x[rank], batch.topk_idx[rank], batch.weights[rank])
        dispatcher.combine(trained.rows, trained, weights=trained.weights)
        check_combine(out, combined(batch, rank, "bf16"), f"decode {seed}, rank {rank}")
    decoder.check()
    torch.cuda.synchronize()
    dist.barrier(ranks.group)


@pytest.mark.timeout(60)
def test_defaults_of_the_caller(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda")
    try:
        buffer = make_buffer()
        for format in FORMATS:
            round_trip(buffer, Batch(0, shape_of(ranks), ranks.device), format, format)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
