"""Low-latency calls when a rank is wrong, late or gone: masks, errors that name it, and that the others go on.

torchrun --nproc-per-node 2 -m pytest tests/gpu/test_low_latency_failures.py
DEEPEP_MOE_RAIL=nvshmem DEEPEP_MOE_RANKS_PER_NODE=1 torchrun ... (the same over several nodes)
"""

from __future__ import annotations

import json
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep_moe import Buffer
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import DeepEPMoEError, HandleError, InputError, PeerError, PeerTimeoutError, RankMismatchError
from tests.gpu import lost_decoder
from tests.gpu.conftest import Ranks, over_nodes
from tests.gpu.low_latency_util import MakeBuffer, dispatch, end_masks, normal_round_trip, round_trip, shape_of
from tests.gpu.test_robustness import END_SECONDS, mps_is_running, on_first_rank, run_ranks
from tests.low_latency_util import FORMATS, Batch, check_combine, check_dispatch, combined, expert_outputs

SHORT_SECONDS = 2.0  # longest wait for a rank that does not come


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.timeout(90)
def test_masks_by_hand_and_by_timeout(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    buffer, rank, last = make_buffer(SHORT_SECONDS, enable_shrink=True), ranks.rank, ranks.size - 1
    status = torch.full((ranks.size,), 7, dtype=torch.int32, device=ranks.device)
    round_trip(buffer, Batch(0, shape_of(ranks), ranks.device), "fp8", "before")

    def masked_call(seed: int, masked: set[int]) -> None:
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "bf16", f"masked {masked}", masked)

    # by hand: the others and the last rank ignore each other
    others = set(range(last))
    masked = {last} if rank != last else others
    for r in masked:
        buffer.low_latency_update_mask_buffer(r, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [int(r in masked) for r in range(ranks.size)]
    for seed in range(3):
        masked_call(seed, masked)
    end_masks(ranks, buffer)
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
    end_masks(ranks, buffer)
    for seed in range(4):
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "fp8", "after a timeout")
    buffer.low_latency_check()


@pytest.mark.timeout(90)
def test_a_rank_that_answers_at_the_timeout(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """Each of the others treats it as late or as in time in all of a call, though its blocks time out one by one."""
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    timeout = 0.5
    buffer, rank, last = make_buffer(timeout, enable_shrink=True), ranks.rank, ranks.size - 1
    status = torch.zeros(ranks.size, dtype=torch.int32, device=ranks.device)
    batch = Batch(0, shape_of(ranks, room=64), ranks.device)
    round_trip(buffer, batch, "fp8", "before")
    for step in range(16):
        # before the timeout, about at it, or after it; in a dispatch or in its combine
        delay, late_in_combine = timeout + (step // 2 - 4) * 5e-5, step % 2
        torch.cuda.synchronize()
        dist.barrier(ranks.group)
        if rank == last and not late_in_combine:
            time.sleep(delay)
        result = dispatch(buffer, batch, use_fp8=False)
        if rank != last:
            buffer.low_latency_query_mask_buffer(status)
            lost = {last} if status[last] else set()
            check_dispatch(batch, rank, "bf16", result, lost)
        if late_in_combine:
            y = expert_outputs(batch, rank, "bf16", result)
            torch.cuda.synchronize()
            dist.barrier(ranks.group)
            if rank == last:
                time.sleep(delay)
            out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
            if rank != last:
                buffer.low_latency_query_mask_buffer(status)
                lost = {last} if status[last] else set()
                check_combine(out, combined(batch, rank, "bf16", masked=lost), f"step {step}")
        torch.cuda.synchronize()
        dist.barrier(ranks.group)
        buffer.low_latency_clean_mask_buffer()
    round_trip(buffer, batch, "fp8", "after")
    buffer.low_latency_check()


@pytest.mark.timeout(END_SECONDS + 40)
def test_a_killed_rank_is_masked_and_the_others_go_on(ranks: Ranks) -> None:
    gpus = torch.cuda.device_count()
    if gpus < 2 or mps_is_running():
        pytest.skip("needs two GPUs, and no MPS: a killed client can take the server's other clients with it")
    count = min(3, gpus)
    cut = str(DispatcherConfig.load().ranks_per_node)
    *survivors, lost = on_first_rank(ranks, lambda: run_ranks(str(count), "tests.gpu.lost_decoder", count, cut))
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

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_max_dispatch_tokens_per_rank": 2}, "x = 16 tokens: num_max_dispatch_tokens_per_rank is 2"),
        ({"x": x.t().contiguous().t()}, "x = strides .* must be contiguous"),
        ({"x": x.float()}, "x = torch.float32"),
        ({"x": x.new_zeros(x.numel() + 1)[1:].view(x.shape)}, "x = a view .* multiple of 16 bytes"),
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
        hear(ranks, buffer)
    result = dispatch(buffer, batch, use_fp8=False)
    y = expert_outputs(batch, rank, "bf16", result)
    for changed, message in (
        ({"x": y.transpose(1, 2).contiguous().transpose(1, 2)}, "x = strides .* must be contiguous"),
        ({"topk_weights": weights.double()}, "topk_weights = torch.float64"),
        ({"out": x.new_zeros(x.numel() + 1)[1:].view(x.shape)}, "out = a view .* multiple of 16 bytes"),
        ({"handle": tuple(result[2])}, "handle is a tuple"),
    ):
        arguments = {"x": y, "topk_idx": topk_idx, "topk_weights": weights, "handle": result[2]}
        if first:
            with pytest.raises(DeepEPMoEError, match=message):
                buffer.low_latency_combine(**{**arguments, **changed})
        else:
            out, _, _ = buffer.low_latency_combine(**arguments)
            check_combine(out, combined(batch, rank, "bf16", masked={0}), f"without rank 0: {message}")
        hear(ranks, buffer)
    round_trip(buffer, batch, "fp8", "after")
    buffer.low_latency_check()


def hear(ranks: Ranks, buffer: Buffer, refuser: int = 0) -> None:
    """All ranks but ``refuser`` are told, once, that it refused its input."""
    torch.cuda.synchronize()
    dist.barrier(ranks.group)
    if ranks.rank != refuser:
        with pytest.raises(PeerError, match=f"rank {refuser} refused its input in low-latency"):
            buffer.low_latency_check()
    buffer.low_latency_check()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_refused_in_a_call_of_another_shape(ranks: Ranks, make_buffer: MakeBuffer, format: str) -> None:
    """Rank 0 refuses a call whose shape its arguments do not tell: not that of its last call, and perhaps a new one."""
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    buffer, rank = make_buffer(), ranks.rank
    small = Batch(0, shape_of(ranks), ranks.device)
    large = Batch(1, shape_of(ranks, room=40, hidden=1408, topk=7, experts=9), ranks.device, dropped=0)
    for batch in (large, small):
        round_trip(buffer, batch, format, "before")

    def bad(batch: Batch) -> tuple[dict[str, Any], ...]:
        return (
            {"x": batch.x[rank].float()},
            {"num_max_dispatch_tokens_per_rank": 40.0},
            {"x": None},
            {"num_max_dispatch_tokens_per_rank": 16},  # that of the other shape
        )

    for seed, options in enumerate(bad(large)):
        if rank == 0:
            with pytest.raises(InputError, match=r"float|None|tokens"):
                dispatch(buffer, large, **FORMATS[format], **options)
        else:
            result = dispatch(buffer, large, **FORMATS[format])
            check_dispatch(large, rank, format, result, {0})
        hear(ranks, buffer)
        for batch in (small, large) if seed % 2 else (small,):
            round_trip(buffer, batch, format, f"after {list(options)}")
    # the others allocate
    for seed in range(len(bad(large))):
        new = Batch(2, shape_of(ranks, room=50 + seed, hidden=1408), ranks.device)
        options = bad(new)[seed] if rank == 0 else {}
        with pytest.raises(InputError if rank == 0 else PeerError, match=r"float|None|tokens"):
            dispatch(buffer, new, **FORMATS[format], **options)
        round_trip(buffer, small, format, "after a refused allocation")
    round_trip(buffer, new, format, "allocated after all")
    # all refuse
    for _ in range(3):
        with pytest.raises(InputError, match="float"):
            dispatch(buffer, large, x=large.x[rank].float())
    round_trip(buffer, large, format, "after all refused")
    buffer.low_latency_check()


@pytest.mark.timeout(60)
def test_a_third_call_in_flight_on_one_rank(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    buffer, rank, first = make_buffer(), ranks.rank, ranks.rank == 0
    batch = Batch(0, shape_of(ranks), ranks.device)
    round_trip(buffer, batch, "bf16", "before")
    torch.cuda.synchronize()
    began = time.monotonic()
    for again in range(2):
        results = [dispatch(buffer, batch, use_fp8=False, return_recv_hook=True) for _ in range(2)]
        if not first:
            results[0][4]()
            result = dispatch(buffer, batch, use_fp8=False, return_recv_hook=True)
            results[1][4]()
            result[4]()
            check_dispatch(batch, rank, "bf16", result, {0})
        else:
            with pytest.raises(HandleError, match=r"hook of dispatch \d+ was not called, .* at most 2"):
                dispatch(buffer, batch)
            for *_, hook in results:
                hook()
        for result in results:
            check_dispatch(batch, rank, "bf16", result)
        hear(ranks, buffer)
        y = expert_outputs(batch, rank, "bf16", results[0])
        arguments = y, batch.topk_idx[rank], batch.weights[rank], results[0][2]
        sums = [buffer.low_latency_combine(*arguments, return_recv_hook=True) for _ in range(2)]
        if not first:
            sums[0][2]()
            out, _, hook = buffer.low_latency_combine(*arguments, return_recv_hook=True)
            sums[1][2]()
            hook()  # the last call to be made before hear(): any later one could be the first to raise the error
            check_combine(out, combined(batch, rank, "bf16", masked={0}), f"third, {again}")
        else:
            with pytest.raises(HandleError, match=r"hook of combine \d+ was not called, .* at most 2"):
                buffer.low_latency_combine(*arguments)
            for *_, hook in sums:
                hook()
        for out, _, _ in sums:
            check_combine(out, combined(batch, rank, "bf16"), f"two in flight, {again}")
        hear(ranks, buffer)
        round_trip(buffer, batch, "fp8", "after")
    assert time.monotonic() - began < 20  # no rank has waited for its timeout


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


@pytest.mark.timeout(60)
def test_one_rank_is_told_and_normal_mode_goes_on(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """Only rank 0 knows of its bad index: were it raised in normal mode, the others would be alone there."""
    buffer, rank = make_buffer(), ranks.rank
    batch = Batch(0, shape_of(ranks), ranks.device)
    topk_idx = batch.topk_idx[rank].clone()
    if rank == 0:
        topk_idx[0, 0] = batch.shape.experts
    dispatch(buffer, batch, topk_idx=topk_idx)
    torch.cuda.synchronize()  # so that the host can know
    normal_round_trip(buffer, batch)
    if rank == 0:
        with pytest.raises(InputError, match=f"topk_idx = {batch.shape.experts}"):
            dispatch(buffer, batch)
    else:
        dispatch(buffer, batch)
    round_trip(buffer, batch, "fp8", "after")
    normal_round_trip(buffer, batch)
    buffer.low_latency_check()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hook", [False, True])
def test_an_error_in_normal_mode_freezes_these_calls_too(ranks: Ranks, make_buffer: MakeBuffer, hook: bool) -> None:
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    if over_nodes():
        pytest.skip("over several nodes normal calls have a domain of their own")
    buffer, rank = make_buffer(), ranks.rank
    batch = Batch(0, shape_of(ranks), ranks.device)
    round_trip(buffer, batch, "fp8", "before")
    *_, per_expert, in_rank, _ = buffer.get_dispatch_layout(batch.topk_idx[rank], batch.shape.experts)
    rows, *_, handle, _ = buffer.dispatch(
        batch.x[rank], is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=batch.topk_idx[rank]
    )
    assert handle is not None
    begun = dispatch(buffer, batch, return_recv_hook=True) if hook else None
    if rank == 0:
        with pytest.raises(InputError, match="x = "):
            buffer.combine(rows.double(), handle)
    else:
        buffer.combine(rows, handle)
    torch.cuda.synchronize()
    if begun is not None:  # it was sent before: it is received, error or not
        if rank == 0:
            begun[4]()
        else:
            with pytest.raises(PeerError, match="rank 0 refused its input"):
                begun[4]()
        check_dispatch(batch, rank, "fp8", begun)
    elif rank != 0:
        with pytest.raises(PeerError, match="rank 0 refused its input"):
            dispatch(buffer, batch)
    for seed in range(4):
        round_trip(buffer, Batch(seed, shape_of(ranks), ranks.device), "fp8", "after")
        normal_round_trip(buffer, batch)
    buffer.low_latency_check()


@pytest.mark.timeout(60)
def test_a_refused_shape_leaves_no_trace(ranks: Ranks, make_buffer: MakeBuffer) -> None:
    """Ranks that all need new memory, of different sizes, find out on the host, and go on."""
    if ranks.size < 2:
        pytest.skip("needs two ranks")
    buffer, batch = make_buffer(), Batch(0, shape_of(ranks), ranks.device)
    round_trip(buffer, batch, "fp8", "before")
    for _ in range(3):
        with pytest.raises(RankMismatchError, match="num_max_dispatch_tokens_per_rank differs"):
            dispatch(buffer, batch, num_max_dispatch_tokens_per_rank=17 + min(ranks.rank, 1))
        round_trip(buffer, batch, "fp8", "after")
    buffer.low_latency_check()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_fp8": True, "round_scale": True}, "use_fp8"),
        ({"num_max_dispatch_tokens_per_rank": 17}, "num_max_dispatch_tokens_per_rank"),
        ({}, "waited"),  # rank 1 comes when the others have given up
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
        else:  # too late: all that it needs of the others' dispatch is there, but none of them comes to its combine
            time.sleep(SHORT_SECONDS + 1)
            result = dispatch(buffer, batch)
            y = expert_outputs(batch, ranks.rank, "fp8", result)
            buffer.low_latency_combine(y, batch.topk_idx[1], batch.weights[1], result[2])
            torch.cuda.synchronize()
        buffer.low_latency_check()
    except (RankMismatchError, PeerTimeoutError, PeerError) as error:
        told = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    everybody: list[str | None] = [None] * ranks.size
    dist.all_gather_object(everybody, told, group=ranks.group)  # before any assertion: nobody waits for one that failed
    assert all(everybody) and any(message in str(t) for t in everybody), everybody
    assert seconds < 20
