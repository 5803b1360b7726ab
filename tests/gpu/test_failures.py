"""What must not crash, hang or be silently wrong: callers' defaults, refusals, ranks out of step, overflow, capture."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from deepep_moe import Buffer, ElasticBuffer, TokenDispatcher
from deepep_moe.backends import get_backend
from deepep_moe.backends.base import Layout, Wire
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import (
    CapacityError,
    DeepEPMoEError,
    HandleError,
    InputError,
    PeerError,
    PeerTimeoutError,
    RankMismatchError,
)
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.test_nvlink import make_backend

SOON = TIMEOUT_SECONDS / 3  # an error that waited for a timeout comes later
HIDDEN = 64

several_ranks = pytest.mark.skipif("int(__import__('os').environ.get('WORLD_SIZE', '1')) < 2", reason="needs a peer")


@contextmanager
def soon() -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SOON


@contextmanager
def defaults(device: str | None, dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(previous)


def batch(ranks: Ranks, seed: int, tokens: int = 40, topk: int = 2, local: int = 2) -> tuple[Tensor, Tensor, int]:
    """x [T, HIDDEN] bf16, topk_idx [T, K], num_experts; different on each rank."""
    generator = torch.Generator(device="cpu").manual_seed(100 * seed + ranks.rank)
    experts = local * ranks.size
    scores = torch.rand((tokens, experts), generator=generator, dtype=torch.float32, device="cpu")
    x = torch.randn((tokens, HIDDEN), generator=generator, dtype=torch.float32, device="cpu").bfloat16()
    return x.to(ranks.device), scores.topk(topk, dim=1).indices.to(ranks.device), experts


def round_trip(backend: NVLinkBackend, ranks: Ranks, seed: int, **plan: Any) -> None:
    """Every token comes back as often as it was sent: top-k times."""
    x, topk_idx, experts = batch(ranks, seed)
    made = backend.plan(topk_idx, experts, **plan)
    rows = backend.dispatch(made, x, layout=Layout.BY_EXPERT).x
    tokens = backend.combine(made, rows, layout=Layout.BY_EXPERT).x
    torch.testing.assert_close(tokens.float(), 2 * x.float(), rtol=2e-2, atol=1e-2)
    backend.check()


def all_nan(*tensors: Tensor | None) -> bool:
    return all(bool(t.float().isnan().all()) for t in tensors if t is not None)


def error_of(backend: NVLinkBackend, calls: Callable[[], list[Tensor]], kind: type[DeepEPMoEError]) -> str:
    """The error that comes of ``calls``, soon: of one of them, or once the work that they enqueue is done. Results are
    NaN then."""

    def run() -> None:
        results = calls()
        torch.cuda.synchronize()
        assert all_nan(*results)
        backend.check()

    with soon(), pytest.raises(kind) as raised:
        run()
    return str(raised.value)


# -- what callers have set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cuda", "cpu"])
def test_default_device_and_dtype(
    ranks: Ranks, device: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
    x, topk_idx, experts = batch(ranks, 1)
    weights = torch.full(topk_idx.shape, 0.5, dtype=torch.float32, device=ranks.device)
    with defaults(device, dtype):
        dispatcher = TokenDispatcher(ranks.group, experts, DispatcherConfig(num_sms=ranks.num_sms, expert_alignment=8))
        x.requires_grad_()
        weights.requires_grad_()
        sent = dispatcher.dispatch(x, topk_idx, weights)
        tokens = dispatcher.combine(sent.rows, sent, weights=sent.weights)
        tokens.float().sum().backward()
        assert int(sent.tokens_per_expert.sum()) == len(sent.rows)
        x.requires_grad_(False)

        buffer = Buffer(ranks.group)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
        rows, local, _, counts, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights.detach(),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        home, _, _ = buffer.combine(rows, handle)
        assert sum(counts) == int((local >= 0).sum())

        elastic = ElasticBuffer(ranks.group, num_max_tokens_per_rank=64, hidden=HIDDEN)
        arrived, _, _, elastic_handle, _ = elastic.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights.detach(), num_experts=experts, do_expand=True
        )
        back, _, _ = elastic.combine(arrived, handle=elastic_handle)
    torch.testing.assert_close(tokens, x, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(x.grad if x.grad is not None else tokens, torch.ones_like(x), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(home.float(), in_rank.sum(1, keepdim=True) * x.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(back.float(), 2 * x.float(), rtol=2e-2, atol=2e-2)


def test_views_that_start_anywhere(ranks: Ranks) -> None:
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 2)
    shifted = torch.empty(x.numel() + 4, dtype=x.dtype, device=x.device)[4:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16 == 8
    strided = torch.zeros((experts, 2), dtype=torch.int32, device=x.device)[:, 0]
    strided.copy_(backend.destinations(topk_idx, experts).num_tokens_per_expert)
    in_rank = backend.destinations(topk_idx, experts).is_token_in_rank
    plan = backend.plan(None, experts, is_token_in_rank=in_rank, num_tokens_per_expert=strided)
    wanted = backend.plan(topk_idx, experts)
    assert torch.equal(plan.expert_counts, wanted.expert_counts)
    rows = backend.dispatch(plan, shifted, layout=Layout.BY_SOURCE).x
    assert torch.equal(rows, backend.dispatch(wanted, x, layout=Layout.BY_SOURCE).x)
    moved = torch.empty(rows.numel() + 4, dtype=rows.dtype, device=rows.device)[4:].view(rows.shape).copy_(rows)
    added = shifted.new_empty(x.numel() + 4)[4:].view(x.shape).zero_()
    tokens = backend.combine(plan, moved, layout=Layout.BY_SOURCE, bias=(added,)).x
    torch.testing.assert_close(tokens.float(), in_rank.sum(1, keepdim=True) * x.float(), rtol=2e-2, atol=2e-2)
    backend.close()


def test_inputs_may_be_freed_before_their_kernel_runs(ranks: Ranks) -> None:
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 3, tokens=3000)
    destinations = backend.destinations(topk_idx, experts)
    torch.cuda._sleep(50_000_000)
    in_rank = destinations.is_token_in_rank.t().contiguous().t()  # a copy is made of it
    plan = backend.plan(
        topk_idx, experts, is_token_in_rank=in_rank, num_tokens_per_expert=destinations.num_tokens_per_expert
    )
    del in_rank
    garbage = [torch.ones((3000, ranks.size), dtype=torch.bool, device=x.device) for _ in range(20)]
    assert plan.num_recv == backend.plan(topk_idx, experts).num_recv
    rows = backend.dispatch(plan, x, layout=Layout.BY_SOURCE).x
    tokens = backend.combine(plan, rows, layout=Layout.BY_SOURCE).x
    wanted = destinations.is_token_in_rank.sum(1, keepdim=True) * x.float()
    torch.testing.assert_close(tokens.float(), wanted, rtol=2e-2, atol=2e-2)
    assert all(g.all() for g in garbage)
    backend.close()


def test_worst_case_calls_go_with_any_other(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
    buffer = Buffer(ranks.group)
    x, topk_idx, experts = batch(ranks, 4)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, experts)
    given = {"topk_idx": topk_idx, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    exact, *_ = buffer.dispatch(x, **given)
    for _ in range(3):
        rows, local, _, counts, handle, _ = buffer.dispatch(x, num_worst_tokens=40 * ranks.size, **given)
        assert counts == []
        assert torch.equal(rows[: len(exact)], exact)
        assert (local[len(exact) :] == -1).all()
        assert torch.equal(buffer.dispatch(x, **given)[0], exact)
        again, *_ = buffer.dispatch(x, handle=handle)
        assert torch.equal(again[: len(exact)], exact)
        home, _, _ = buffer.combine(rows, handle)
        torch.testing.assert_close(home.float(), in_rank.sum(1, keepdim=True) * x.float(), rtol=2e-2, atol=2e-2)
    buffer.destroy()


# -- a rank that refuses ----------------------------------------------------------------------------------------------


@several_ranks
@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_a_refused_call_is_an_error_everywhere(ranks: Ranks, call: str) -> None:
    """Its own error on the rank; on the others NaN and an error, at once. Then all go on."""
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 5)
    for _ in range(2):
        plan = backend.plan(topk_idx, experts)
        rows = backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x if call == "combine" else None
        bad = ranks.rank == ranks.size - 1
        given = x if rows is None else rows
        run: Callable[..., Any] = getattr(backend, call)
        if bad:
            with pytest.raises(InputError, match="x = "):
                run(plan, given.double(), layout=Layout.BY_EXPERT)
        else:
            said = error_of(backend, lambda: [run(plan, given, layout=Layout.BY_EXPERT).x], PeerError)  # noqa: B023
            assert f"rank {ranks.size - 1} refused its input" in said
        round_trip(backend, ranks, 6)
    assert backend.usable
    backend.close()


def test_a_call_that_all_refuse_stops_nobody(ranks: Ranks) -> None:
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 7)
    plan = backend.plan(topk_idx, experts)
    for _ in range(3):
        with pytest.raises(InputError, match=r"x = torch\.float64"):
            backend.dispatch(plan, x.double(), layout=Layout.BY_EXPERT)
    round_trip(backend, ranks, 8)
    backend.close()


@several_ranks
def test_refusal_in_capacity_mode(ranks: Ranks) -> None:
    backend = make_backend(ranks, max_tokens_per_rank=40)
    room = {"max_recv": 40 * ranks.size, "max_rows": 80 * ranks.size}
    round_trip(backend, ranks, 9, **room)
    x, topk_idx, experts = batch(ranks, 10)
    if ranks.rank == 0:
        with pytest.raises(InputError, match="topk_idx"):
            backend.plan(topk_idx.float(), experts, **room)
    else:

        def layer() -> list[Tensor]:
            plan = backend.plan(topk_idx, experts, **room)
            assert int(plan.expert_counts.sum()) == 0  # a grouped GEMM by these counts touches nothing
            rows = backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x
            return [rows, backend.combine(plan, rows, layout=Layout.BY_EXPERT).x]

        assert "rank 0 refused its input in plan" in error_of(backend, layer, PeerError)
    for seed in range(3):
        round_trip(backend, ranks, 11 + seed, **room)
    backend.close()


# -- overflow -----------------------------------------------------------------------------------------------------


def test_overflow_surfaces_by_itself(ranks: Ranks) -> None:
    config = DispatcherConfig(
        num_sms=ranks.num_sms, capacity_factor=1.0, max_tokens_per_rank=64, timeout_seconds=TIMEOUT_SECONDS
    )
    dispatcher = TokenDispatcher(ranks.group, 4 * ranks.size, config, device=ranks.device)
    x, topk_idx, experts = batch(ranks, 12, tokens=64, topk=2, local=4)
    skewed = torch.zeros_like(topk_idx)
    skewed[:, 1] = 1  # all routes to rank 0
    weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=ranks.device)

    def layer(routes: Tensor) -> Tensor:
        sent = dispatcher.dispatch(x, routes, weights)
        return dispatcher.combine(sent.rows, sent, weights=sent.weights)

    def overflow_then_go_on() -> None:
        out = layer(skewed)
        torch.cuda.synchronize()
        assert all_nan(out)
        layer(balanced)

    balanced = (torch.arange(64, device=ranks.device)[:, None] + torch.arange(2, device=ranks.device)) % experts
    for _ in range(2):
        torch.testing.assert_close(layer(balanced), 2 * x, rtol=2e-2, atol=1e-2)
        if ranks.size > 1:
            said = r"rank 0 needs room for \d+ (received tokens|expert rows).*capacity_factor"
            with pytest.raises(CapacityError, match=said):
                overflow_then_go_on()
    dispatcher.backend.close()


@several_ranks
def test_more_tokens_than_agreed_in_capacity_mode(ranks: Ranks) -> None:
    """Without the host staging cannot grow: an error on every rank, whichever has the tokens."""
    backend = make_backend(ranks, max_tokens_per_rank=16)
    room = {"max_recv": 64 * ranks.size, "max_rows": 128 * ranks.size}
    round_trip_of_16 = batch(ranks, 13, tokens=16)
    backend.plan(round_trip_of_16[1], round_trip_of_16[2], **room)
    x, topk_idx, experts = batch(ranks, 14, tokens=17 if ranks.rank == 1 else 16)
    said = error_of(
        backend,
        lambda: [backend.dispatch(backend.plan(topk_idx, experts, **room), x, layout=Layout.BY_EXPERT).x],
        CapacityError,
    )
    assert "17 tokens" in said
    assert "max_tokens_per_rank" in said
    backend.close()


def test_capacity_mode_sizes_staging_by_the_largest_rank(ranks: Ranks) -> None:
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 15, tokens=129 - ranks.rank)
    plan = backend.plan(topk_idx, experts, max_recv=129 * ranks.size, max_rows=258 * ranks.size)
    rows = backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x
    tokens = backend.combine(plan, rows, layout=Layout.BY_EXPERT).x
    torch.testing.assert_close(tokens.float(), 2 * x.float(), rtol=2e-2, atol=1e-2)
    backend.check()
    backend.close()


# -- ranks out of step ------------------------------------------------------------------------------------------------


@several_ranks
@pytest.mark.parametrize("differs", ["dtype", "wire", "hidden", "weights", "layout"])
def test_calls_that_differ(ranks: Ranks, differs: str) -> None:
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 16)
    x = x.repeat(1, 2)  # a block of FP8
    plan = backend.plan(topk_idx, experts)
    if differs != "hidden":  # else staging has to grow on one rank alone
        backend.dispatch(plan, x.float(), layout=Layout.BY_EXPERT)
    odd = ranks.rank == 0
    weights = torch.ones(topk_idx.shape, dtype=torch.float32, device=x.device) if odd and differs == "weights" else None
    given = x.half() if odd and differs == "dtype" else x[:, :64] if odd and differs == "hidden" else x
    wire = Wire.E4M3_TO_BF16 if odd and differs == "wire" else Wire.AS_GIVEN
    layout = Layout.BY_SOURCE if odd and differs == "layout" else Layout.BY_EXPERT

    def call() -> None:
        out = backend.dispatch(plan, given, layout=layout, wire=wire, weights=weights).x
        torch.cuda.synchronize()
        assert all_nan(out)
        backend.check()

    with soon(), pytest.raises((RankMismatchError, PeerError), match=r"differs between ranks|gave up"):
        call()
    with pytest.raises(DeepEPMoEError):
        backend.plan(topk_idx, experts)
    assert not backend.usable


@several_ranks
@pytest.mark.parametrize("how", ["other plan", "calls swapped", "plan left out"])
def test_ranks_in_different_calls(ranks: Ranks, how: str) -> None:
    backend = make_backend(ranks)
    x, topk_idx, experts = batch(ranks, 17)
    first, second = backend.plan(topk_idx, experts), backend.plan(topk_idx.flip(0).contiguous(), experts)
    rows = [backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x for plan in (first, second)]
    odd = ranks.rank == 0

    def call() -> None:
        if how == "plan left out" and odd:
            backend.plan(topk_idx, experts).known_sizes()
        elif how == "other plan" or (how == "calls swapped" and odd):
            chosen = 0 if odd else 1
            backend.combine((first, second)[chosen], rows[chosen], layout=Layout.BY_EXPERT)
        else:
            backend.dispatch(first, x, layout=Layout.BY_EXPERT)
        torch.cuda.synchronize()
        backend.check()

    said = "the plan differs" if how == "other plan" else "the call differs"
    with soon(), pytest.raises((RankMismatchError, PeerError), match=f"{said}|gave up"):
        call()
    assert not backend.usable


@several_ranks
def test_a_plan_of_another_backend(ranks: Ranks) -> None:
    backend, other = make_backend(ranks), make_backend(ranks, expert_alignment=2)
    x, topk_idx, experts = batch(ranks, 18)
    foreign = other.plan(topk_idx, experts)
    with pytest.raises(HandleError):
        backend.dispatch(foreign, x, layout=Layout.BY_EXPERT)
    round_trip(backend, ranks, 19)
    plan = backend.plan(topk_idx, experts)
    if ranks.rank == 0:
        with pytest.raises(HandleError):
            backend.dispatch(foreign, x, layout=Layout.BY_EXPERT)
    else:
        said = error_of(backend, lambda: [backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x], PeerError)
        assert "rank 0 refused" in said
    round_trip(backend, ranks, 20)
    backend.close()
    other.close()


@several_ranks
def test_a_late_rank_and_its_peers(ranks: Ranks) -> None:
    """Who waited in vain names whom; who came too late hears of it at once; both for good."""
    config = DispatcherConfig(num_sms=ranks.num_sms, timeout_seconds=1.0)
    backend = NVLinkBackend(ranks.group, ranks.device, config)
    _, topk_idx, experts = batch(ranks, 21)
    late = ranks.rank == 0
    if late:
        time.sleep(4)
    begun = time.monotonic()
    with pytest.raises(PeerError) as raised:
        backend.plan(topk_idx, experts).known_sizes()
    assert time.monotonic() - begun < 5
    if late:
        assert re.search(r"gave up \((it timed out waiting for another|another rank had failed)", str(raised.value))
    else:
        assert "rank 0" in str(raised.value) or "gave up" in str(raised.value)
        assert isinstance(raised.value, PeerTimeoutError) or "gave up" in str(raised.value)
    for _ in range(2):
        with soon(), pytest.raises(PeerError):
            backend.plan(topk_idx, experts)
    assert not backend.usable


# -- life of a backend ------------------------------------------------------------------------------------------------


def test_a_closed_backend_is_not_handed_out(ranks: Ranks) -> None:
    config = DispatcherConfig(num_sms=ranks.num_sms, timeout_seconds=TIMEOUT_SECONDS)
    first = get_backend(ranks.group, ranks.device, config)
    assert get_backend(ranks.group, ranks.device, config) is first
    first.close()
    second = get_backend(ranks.group, ranks.device, config)
    assert second is not first
    round_trip(second, ranks, 22)  # type: ignore[arg-type]
    with pytest.raises(HandleError, match="closed"):
        first.plan(*batch(ranks, 22)[1:])
    second.close()


def test_a_captured_graph_keeps_its_memory(ranks: Ranks) -> None:
    """Captured with few tokens, then a larger batch beside it, then replayed."""
    backend = make_backend(ranks, max_tokens_per_rank=40)
    x, topk_idx, experts = batch(ranks, 23)
    room = {"max_recv": 40 * ranks.size, "max_rows": 80 * ranks.size}

    def layer() -> Tensor:
        plan = backend.plan(topk_idx, experts, **room)
        rows = backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x
        return backend.combine(plan, rows, layout=Layout.BY_EXPERT).x

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = layer()
    for tokens in (300, 3000):
        large, routes, _ = batch(ranks, 24, tokens=tokens)
        plan = backend.plan(routes, experts)
        rows = backend.dispatch(plan, large.repeat(1, 8), layout=Layout.BY_EXPERT).x
        back = backend.combine(plan, rows, layout=Layout.BY_EXPERT).x
        torch.testing.assert_close(back.float(), 2 * large.repeat(1, 8).float(), rtol=2e-2, atol=1e-2)
        for seed in (25, 26):
            other, routes, _ = batch(ranks, seed)
            x.copy_(other)
            topk_idx.copy_(routes)
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(out.float(), 2 * other.float(), rtol=2e-2, atol=1e-2)
    backend.check()
    backend.close()


@pytest.mark.parametrize("start", [2**31 - 6, 2**32 - 6, 2**32 - 7])
def test_numbers_of_calls_wrap_around(ranks: Ranks, start: int) -> None:
    backend = make_backend(ranks)
    torch.distributed.barrier(ranks.group)  # nobody enters a call before all have the number
    signed = start - 2**32 if start >= 2**31 else start
    assert backend._engine is not None
    backend._engine.set_epochs(signed, signed, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    torch.distributed.barrier(ranks.group)
    room = {"max_recv": 40 * ranks.size, "max_rows": 80 * ranks.size}
    for seed in range(12):
        round_trip(backend, ranks, 28 + seed, **(room if seed % 2 else {}))
    backend.close()


def test_backends_on_streams_of_their_own(ranks: Ranks) -> None:
    """Two backends whose kernels each want all SMs they may have: the host's order is the order on every GPU."""
    backends = [make_backend(ranks), make_backend(ranks, expert_alignment=4)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    x, topk_idx, experts = batch(ranks, 40, tokens=2000)
    torch.cuda.synchronize()
    plans = [backend.plan(topk_idx, experts) for backend in backends]
    results = []
    for turn in range(30):
        if ranks.rank == turn % ranks.size:
            time.sleep(0.003)
        for backend, stream, plan in zip(backends, streams, plans):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                rows = backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x
                results.append(backend.combine(plan, rows, layout=Layout.BY_EXPERT).x)
    torch.cuda.synchronize()
    for backend in backends:
        backend.check()
    for tokens in results:
        assert torch.equal(tokens, results[0])
    torch.testing.assert_close(results[0].float(), 2 * x.float(), rtol=2e-2, atol=1e-2)
    for backend in backends:
        backend.close()
