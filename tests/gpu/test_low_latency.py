"""The low-latency kernels against plain PyTorch: every value that they give.

    torchrun --nproc-per-node 2 -m pytest tests/gpu/test_low_latency.py
    LOW_LATENCY_REPLAYS=10000 LOW_LATENCY_SHAPES=200 torchrun --nproc-per-node 4 -m pytest tests/gpu/test_low_latency.py

Replays of a captured graph (300) and random shapes (80) are as many as these variables say.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import Buffer
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import DeepEPMoEError, HandleError, InputError, PeerError, PeerTimeoutError, RankMismatchError
from tests.gpu import lost_decoder
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.test_robustness import END_SECONDS, mps_is_running, on_first_rank, run_ranks
from tests.low_latency_util import FORMATS, Batch, Shape, check_combine, check_dispatch, combined, expert_outputs

REPLAYS = int(os.environ.get("LOW_LATENCY_REPLAYS", "300"))
SHAPES = int(os.environ.get("LOW_LATENCY_SHAPES", "80"))
SHORT_SECONDS = 2.0  # longest wait in tests of ranks that do not come

MakeBuffer = Callable[..., Buffer]


@pytest.fixture
def make_buffer(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeBuffer]:
    made: list[Buffer] = []

    def make(
        timeout_seconds: float = TIMEOUT_SECONDS, group: dist.ProcessGroup | None = None, **options: Any
    ) -> Buffer:
        monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
        monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(timeout_seconds))
        made.append(Buffer(group or ranks.group, low_latency_mode=True, **options))
        assert made[-1]._opened().engine == "cuda"
        return made[-1]

    yield make
    torch.cuda.synchronize()
    dist.barrier(ranks.group)  # a peer may still write into what is freed here
    for buffer in made:
        buffer.destroy()


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


@pytest.mark.timeout(180 + REPLAYS)
def test_replays_of_several_graphs(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """LOW_LATENCY_REPLAYS with new routing, ranks skewed at random, eager calls of both kinds between them."""
    buffer, rank = make_buffer(), ranks.rank
    graphs = [
        Captured(buffer, shape_of(ranks), "fp8", ranks.device),
        Captured(buffer, shape_of(ranks, topk=6), "bf16", ranks.device, hooks=False),
        Captured(buffer, shape_of(ranks, room=24, hidden=896, experts=3, topk=3), "ue8m0", ranks.device),
    ]
    skew = random.Random(rank)
    for number in range(REPLAYS):
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


def normal_round_trip(buffer: Buffer, batch: Batch) -> None:
    rank = buffer.rank
    topk_idx = batch.topk_idx[rank]
    *_, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, batch.shape.experts)
    rows, *_, handle, _ = buffer.dispatch(
        batch.x[rank], is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx
    )
    back, _, _ = buffer.combine(rows, handle)
    assert torch.equal(back, (in_rank.sum(1, keepdim=True) * batch.x[rank].float()).bfloat16())


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
    config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms)
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


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.timeout(90)
def test_masks_by_hand_and_by_timeout(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    buffer, rank, last = make_buffer(SHORT_SECONDS, enable_shrink=True), ranks.rank, ranks.size - 1
    status = torch.full((ranks.size,), 7, dtype=torch.int32, device=ranks.device)
    round_trip(buffer, Batch(0, shape_of(ranks), ranks.device), "fp8", "before")

    def masked_call(seed: int, masked: set[int]) -> None:
        batch = Batch(seed, shape_of(ranks), ranks.device)
        result = dispatch(buffer, batch, use_fp8=False)
        y = expert_outputs(batch, rank, "bf16", result)
        out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
        check_dispatch(batch, rank, "bf16", result, masked)
        check_combine(out, combined(batch, rank, "bf16", masked=masked), f"masked {masked}, rank {rank}")

    def meet() -> None:
        torch.cuda.synchronize()
        dist.barrier(ranks.group)
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert not status.any(), f"rank {rank}: still masked: {status.tolist()}"

    # by hand: the others and the last rank ignore each other
    others = set(range(last))
    masked = {last} if rank != last else others
    for r in masked:
        buffer.low_latency_update_mask_buffer(r, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(r in masked) for r in range(ranks.size)]
    for seed in range(3):
        masked_call(seed, masked)
    meet()
    for seed in range(3):
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "fp8", "after masks by hand")

    # by timeout: the last rank makes fewer calls than the others, and comes back
    if rank != last:
        torch.cuda.synchronize()
        began = time.monotonic()
        for seed in range(3):
            masked_call(seed, {last})
        waited = time.monotonic() - began
        assert SHORT_SECONDS * 0.9 < waited < SHORT_SECONDS + 3, f"rank {rank}: masked after {waited:.1f} s"
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(r == last) for r in range(ranks.size)]
    meet()
    for seed in range(4):
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "fp8", "after a timeout")
    buffer.low_latency_check()


@pytest.mark.timeout(END_SECONDS + 40)
def test_a_killed_rank_is_masked_and_the_others_go_on(ranks: Ranks) -> None:
    gpus = torch.cuda.device_count()
    if gpus < 2 or mps_is_running():
        pytest.skip("needs two GPUs, and no MPS: a killed client can take the server's other clients with it")
    count = min(3, gpus)
    *survivors, lost = on_first_rank(ranks, lambda: run_ranks(str(count), "tests.gpu.lost_decoder", count))
    assert lost.status == -signal.SIGKILL, lost.output
    for survivor in survivors:
        assert survivor.status == 0, survivor.output
        told = json.loads(next(line for line in survivor.output.splitlines() if line.startswith("{")))
        assert told["masked"] == [0] * (count - 1) + [1], told
        assert told["slowest"] < lost_decoder.TIMEOUT_SECONDS + 5, told


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.timeout(90)
def test_wrong_arguments_are_named_and_the_ranks_go_on(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, rank = make_buffer(), ranks.rank
    first = rank == 0
    shape = shape_of(ranks)
    batch = Batch(0, shape, ranks.device)
    round_trip(buffer, batch, "fp8", "before")
    x, topk_idx, weights = batch.x[rank], batch.topk_idx[rank], batch.weights[rank]

    def others_hear_of_it() -> None:
        torch.cuda.synchronize()
        dist.barrier(ranks.group)
        if not first:
            with pytest.raises(PeerError, match="rank 0 refused its input in low-latency"):
                buffer.low_latency_check()

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_max_dispatch_tokens_per_rank": 2}, "x = 16 tokens: num_max_dispatch_tokens_per_rank is 2"),
        ({"x": x.t().contiguous().t()}, "x = strides .* must be contiguous"),
        ({"x": x.float()}, "x = torch.float32"),
        ({"async_finish": True, "return_recv_hook": True}, "async_finish"),
    ]
    for options, message in wrong:
        if first:
            with pytest.raises(InputError, match=message):
                dispatch(buffer, batch, **options)
        else:
            result = dispatch(buffer, batch)
            # rank 0 counts as a rank without tokens
            alone = Batch(0, shape, ranks.device)
            alone.topk_idx[0] = torch.full_like(alone.topk_idx[0], -1)
            check_dispatch(alone, rank, "fp8", result)
        others_hear_of_it()
    result = dispatch(buffer, batch, use_fp8=False)
    y = expert_outputs(batch, rank, "bf16", result)
    for changed, message in (
        ({"x": y.transpose(1, 2).contiguous().transpose(1, 2)}, "x = strides .* must be contiguous"),
        ({"topk_weights": weights.double()}, "topk_weights = torch.float64"),
        ({"handle": tuple(result[2])}, "handle is a tuple"),
    ):
        arguments = {"x": y, "topk_idx": topk_idx, "topk_weights": weights, "handle": result[2]}
        if first:
            with pytest.raises(DeepEPMoEError, match=message):
                buffer.low_latency_combine(**{**arguments, **changed})
        else:
            out, _, _ = buffer.low_latency_combine(**arguments)
            check_combine(out, combined(batch, rank, "bf16", masked={0}), f"without rank 0: {message}")
        others_hear_of_it()
    round_trip(buffer, batch, "fp8", "after")
    buffer.low_latency_check()


@pytest.mark.timeout(60)
def test_indices_that_no_expert_has(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, rank = make_buffer(), ranks.rank
    batch = Batch(0, shape_of(ranks), ranks.device, dropped=0)
    bad = batch.topk_idx[0].clone()
    bad[3, 1] = batch.shape.experts + 5
    batch.topk_idx[0] = torch.where(bad == batch.shape.experts + 5, -1, bad)  # it counts as dropped
    result = dispatch(buffer, batch, **({"topk_idx": bad} if rank == 0 else {}), use_fp8=False)
    check_dispatch(batch, rank, "bf16", result)
    torch.cuda.synchronize()
    if rank == 0:
        with pytest.raises(InputError, match=f"topk_idx = {batch.shape.experts + 5}: an expert must be"):
            buffer.low_latency_check()
    twice = batch.topk_idx[0].clone()
    twice[2, 1] = twice[2, 0]
    batch.topk_idx[0] = twice.clone()
    batch.topk_idx[0][2, 1] = -1
    result = dispatch(buffer, batch, **({"topk_idx": twice} if rank == 0 else {}), use_fp8=False)
    check_dispatch(batch, rank, "bf16", result)
    torch.cuda.synchronize()
    if rank == 0:
        with pytest.raises(InputError, match=r"topk_idx = expert \d+ twice for token 2"):
            buffer.low_latency_check()
    # a combine whose indices are not those of the dispatch
    y = expert_outputs(batch, rank, "bf16", result)
    changed = batch.topk_idx[rank]
    if rank == 0:
        changed = changed.clone()
        changed[1, 0] = next(e for e in range(batch.shape.experts) if e not in changed[1].tolist())
    buffer.low_latency_combine(y, changed, batch.weights[rank], result[2])
    torch.cuda.synchronize()
    dist.barrier(ranks.group)
    told = None
    try:
        buffer.low_latency_check()
    except InputError as error:
        told = str(error)
    everybody: list[str | None] = [None] * ranks.size
    dist.all_gather_object(everybody, told, group=ranks.group)
    assert [t for t in everybody if t] == ["topk_idx = route 0: of token 1 of rank 0 went elsewhere before"]
    round_trip(buffer, batch, "bf16", "after")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_fp8": True, "round_scale": True}, "use_fp8"),
        ({"num_max_dispatch_tokens_per_rank": 17}, "num_max_dispatch_tokens_per_rank"),
        ({}, "waited"),  # rank 1 makes no call at all
    ],
)
def test_ranks_that_differ(ranks: Ranks, make_buffer: MakeBuffer, options: dict[str, Any], message: str) -> None:
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    # of its own: a group whose members were in different calls is of no use afterwards
    group = dist.new_group(backend="cpu:gloo,cuda:nccl", timeout=timedelta(seconds=5))
    buffer = make_buffer(SHORT_SECONDS, group)
    batch = Batch(0, shape_of(ranks), ranks.device)
    round_trip(buffer, batch, "fp8", "before")
    torch.cuda.synchronize()
    began = time.monotonic()
    told: str | None = None
    try:
        if options or ranks.rank != 1:
            dispatch(buffer, batch, **(options if ranks.rank == 1 else {}))
            torch.cuda.synchronize()
        else:
            time.sleep(SHORT_SECONDS + 1)
        buffer.low_latency_check()
    except (RankMismatchError, PeerTimeoutError, PeerError) as error:
        told = f"{type(error).__name__}: {error}"
    assert told is not None, f"rank {ranks.rank} was told nothing"
    assert time.monotonic() - began < 20
    everybody: list[str | None] = [None] * ranks.size
    dist.all_gather_object(everybody, told, group=ranks.group)
    assert any(message in str(t) for t in everybody), everybody
