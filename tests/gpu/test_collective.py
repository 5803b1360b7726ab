"""The collective backend over NCCL, with kernels for its local work, against the reference on the CPU.

All but the lost peers needs a GPU for each rank, or NCCL_HOSTID as test_hierarchical.py says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from deepep_moe.backends.base import Backward, Layout, Rows, Wire
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.collective_cuda import CollectiveOnGPU, make_collective
from deepep_moe.backends.exchange import Exchange
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import (
    CapacityError,
    InputError,
    PeerError,
    PeerTimeoutError,
    RankMismatchError,
    UnsupportedError,
)
from tests.distributed.lost_peer import TIMEOUT_SECONDS as LOST_AFTER_SECONDS
from tests.distributed.test_lost_peers import END_SECONDS, START_SECONDS, run
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.test_nvlink import Case, assert_same, assert_same_plan
from tests.gpu.test_robustness import mps_is_running, on_first_rank

SOON_SECONDS = 8.0  # for an error to be found while nothing waits for it


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> CollectiveBackend:
    return CollectiveBackend(ranks.group, torch.device("cpu"), DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS))


@pytest.fixture(scope="module")
def collective(ranks: Ranks) -> Iterator[CollectiveOnGPU]:
    backend = make(ranks, ranks.group)
    yield backend
    backend.close()


@pytest.fixture
def fresh(ranks: Ranks) -> CollectiveOnGPU:
    """A backend over a group of its own, for tests that use the group up."""
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    assert group is not None
    return make(ranks, group)


def make(ranks: Ranks, group: dist.ProcessGroup, **settings: object) -> CollectiveOnGPU:
    if ranks.size > torch.cuda.device_count() and "NCCL_HOSTID" not in os.environ:
        pytest.skip("NCCL refuses several ranks of one host on a GPU")
    config = DispatcherConfig(**{"backend": "collective", "timeout_seconds": TIMEOUT_SECONDS, **settings})  # type: ignore[arg-type]
    backend = make_collective(group, ranks.device, config)
    assert isinstance(backend, CollectiveOnGPU)
    return backend


def assert_same_rows(got: Rows, wanted: Rows, what: str) -> None:
    for name in Rows._fields:
        one, other = getattr(got, name), getattr(wanted, name)
        if one is not None and one.dtype == torch.float8_e4m3fn:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        assert_same(one, other, f"{what}: {name}")


def wires(case: Case) -> list[Wire]:
    fp8 = case.x.dtype == torch.bfloat16 and case.x.shape[1] % 128 == 0
    return list(Wire) if fp8 else [Wire.AS_GIVEN]


def compare(ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend, case: Case) -> None:
    """Every operation on one batch, both layouts, all wire formats, bit for bit where nothing is multiplied."""
    device = ranks.device
    topk_idx = case.topk_idx.to(device)
    counts = collective.destinations(topk_idx, case.num_experts)
    for got, wanted, name in zip(
        counts, reference.destinations(case.topk_idx, case.num_experts), counts._fields, strict=True
    ):
        assert_same(got, wanted, name)
    plan = collective.plan(topk_idx, case.num_experts, alignment=case.alignment)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment)
    assert_same_plan(plan, wanted_plan)
    x, weights, bias = case.x.to(device), case.weights.to(device), tuple(b.to(device) for b in case.bias)
    for layout in Layout:
        for wire in wires(case):
            for with_weights in (True, False) if wire is Wire.AS_GIVEN else (True,):
                got = collective.dispatch(plan, x, layout=layout, wire=wire, weights=weights if with_weights else None)
                wanted = reference.dispatch(
                    wanted_plan, case.x, layout=layout, wire=wire, weights=case.weights if with_weights else None
                )
                assert_same_rows(got, wanted, f"dispatch {layout} {wire}, weights: {with_weights}")
        sent = collective.dispatch(plan, x, layout=layout, weights=weights)
        wanted_sent = reference.dispatch(wanted_plan, case.x, layout=layout, weights=case.weights)
        rows = (wanted_sent.x.float() * 1.5).to(case.x.dtype)
        for added, wanted_added in (((), ()), (bias, case.bias)):
            back = collective.combine(plan, rows.to(device), weights=sent.weights, bias=added, layout=layout)
            wanted_back = reference.combine(
                wanted_plan, rows, weights=wanted_sent.weights, bias=wanted_added, layout=layout
            )
            assert_same(back.x, wanted_back.x, f"combine {layout}")
            assert_same(back.weights, wanted_back.weights, f"combined weights, {layout}")
        plain = collective.combine(plan, rows.to(device), layout=layout)
        assert plain.weights is None
        assert_same(plain.x, reference.combine(wanted_plan, rows, layout=layout).x, f"plain combine {layout}")
    assert sent.weights is not None and wanted_sent.weights is not None  # of the expert layout, the last one
    weighted = collective.combine(
        plan, rows.to(device), weights=sent.weights, apply_weights=True, layout=Layout.BY_EXPERT
    )
    wanted_weighted = reference.combine(
        wanted_plan, rows, weights=wanted_sent.weights, apply_weights=True, layout=Layout.BY_EXPERT
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[case.x.dtype]
    torch.testing.assert_close(weighted.x.cpu(), wanted_weighted.x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first_seed", range(0, 40, 10))
def test_random_shapes(
    ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend, first_seed: int
) -> None:
    for seed in range(first_seed, first_seed + 10):
        compare(ranks, collective, reference, Case.draw(ranks, seed))


@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_large_rows(ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend, dtype: int) -> None:
    case = Case.draw(ranks, 7, dtype=dtype, hidden_vectors=896, tokens=257, topk=8, local_experts=8, dropped_percent=0)
    compare(ranks, collective, reference, case)


def test_batches_that_a_message_has_no_room_for(
    ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend
) -> None:
    for seed in range(2):
        compare(ranks, collective, reference, Case.draw(ranks, seed, local_experts=200, topk=8, tokens=257))
    for tokens in (3000, 4000, 5):
        compare(ranks, collective, reference, Case.draw(ranks, tokens, tokens=tokens, topk=8, hidden_vectors=1))


def test_rows_that_kernels_do_not_take(ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend) -> None:
    topk_idx = torch.arange(12).view(6, 2) % (2 * ranks.size)
    plan = collective.plan(topk_idx.to(ranks.device), 2 * ranks.size)
    wanted_plan = reference.plan(topk_idx, 2 * ranks.size)
    x = torch.randn(6, 3)
    for layout in Layout:
        sent = collective.dispatch(plan, x.to(ranks.device), layout=layout)
        assert_same_rows(sent, reference.dispatch(wanted_plan, x, layout=layout), "three channels")
        assert_same(
            collective.combine(plan, sent.x, layout=layout).x,
            reference.combine(wanted_plan, sent.x.cpu(), layout=layout).x,
            "three channels, combined",
        )
    views = torch.randn(7, 17)[1:, 1:].to(ranks.device)  # starts anywhere, rows further apart than they are long
    got = collective.dispatch(plan, views, layout=Layout.BY_EXPERT).x
    assert_same(got, reference.dispatch(wanted_plan, views.cpu(), layout=Layout.BY_EXPERT).x, "a view")


def test_without_expert_indices(ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend) -> None:
    generator = torch.Generator().manual_seed(ranks.rank)
    in_rank = torch.rand((100 + ranks.rank, ranks.size), generator=generator) < 0.4
    counts = torch.randint(9, (3 * ranks.size,), dtype=torch.int32, generator=generator)
    x = torch.randn((len(in_rank), 64), generator=generator)
    plan = collective.plan(
        None, len(counts), is_token_in_rank=in_rank.to(ranks.device), num_tokens_per_expert=counts.to(ranks.device)
    )
    wanted = reference.plan(None, len(counts), is_token_in_rank=in_rank, num_tokens_per_expert=counts)
    assert_same_plan(plan, wanted)
    sent = collective.dispatch(plan, x.to(ranks.device), layout=Layout.BY_SOURCE)
    assert_same_rows(sent, reference.dispatch(wanted, x, layout=Layout.BY_SOURCE), "no experts")
    back = collective.combine(plan, sent.x, layout=Layout.BY_SOURCE).x
    assert_same(back, reference.combine(wanted, sent.x.cpu(), layout=Layout.BY_SOURCE).x, "no experts, combined")


def test_given_scales(ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend) -> None:
    case = Case.draw(ranks, 3, tokens=65, topk=3, local_experts=3, dropped_percent=20)
    plan = collective.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=16)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=16)
    x = torch.randn(len(case.x), 256).to(torch.float8_e4m3fn)
    for scales in (torch.rand(len(x), 2), torch.randint(2**30, (2, len(x)), dtype=torch.int32).t()):
        for layout in Layout:
            got = collective.dispatch(plan, x.to(ranks.device), layout=layout, scales=scales.to(ranks.device))
            assert_same_rows(got, reference.dispatch(wanted_plan, x, layout=layout, scales=scales), "given scales")


def test_fixed_sizes(ranks: Ranks, collective: CollectiveOnGPU, reference: CollectiveBackend) -> None:
    case = Case.draw(ranks, 11, tokens=65, topk=3, local_experts=3, dtype=0, hidden_vectors=16)
    limits = {"max_recv": 65 * ranks.size + 7, "max_rows": 65 * ranks.size * 3 + 3 * case.alignment}
    plan = collective.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=case.alignment, **limits)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment, **limits)
    assert_same_plan(plan, wanted_plan)
    for layout in Layout:
        for wire in wires(case):
            got = collective.dispatch(
                plan, case.x.to(ranks.device), layout=layout, wire=wire, weights=case.weights.to(ranks.device)
            )
            wanted = reference.dispatch(wanted_plan, case.x, layout=layout, wire=wire, weights=case.weights)
            assert_same_rows(got, wanted, f"fixed sizes {layout} {wire}")
        x = torch.randn((plan.num_rows if layout is Layout.BY_EXPERT else plan.num_recv, 64))
        got_back = collective.combine(plan, x.to(ranks.device), layout=layout).x
        assert_same(got_back, reference.combine(wanted_plan, x, layout=layout).x, f"fixed sizes {layout}, combined")
    limit = 0 if ranks.rank == ranks.size - 1 else 65 * ranks.size
    everywhere = torch.arange(ranks.size).expand(4, -1).to(ranks.device)
    with pytest.raises(CapacityError) as caught:
        collective.plan(everywhere, ranks.size, max_recv=limit)
    assert f"rank {ranks.size - 1} needs room for {4 * ranks.size} received tokens" in str(caught.value)
    compare(ranks, collective, reference, Case.draw(ranks, 12))  # the ranks go on


# -- no host waits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases in which the host waited for the device."""
    phases: list[str] = []
    wait_for = Exchange.wait_for

    def counted(self: Exchange, phase: str, event: torch.cuda.Event) -> None:
        phases.append(phase)
        wait_for(self, phase, event)

    monkeypatch.setattr(Exchange, "wait_for", counted)
    return phases


def test_the_host_waits_once_in_a_plan_and_never_later(
    ranks: Ranks, collective: CollectiveOnGPU, waits: list[str]
) -> None:
    group = ranks.group
    config = DispatcherConfig(backend="collective", timeout_seconds=TIMEOUT_SECONDS)
    fixed = replace(config, capacity_factor=4.0)
    topk_idx = torch.rand((64, 4 * ranks.size), device=ranks.device).topk(3, dim=1).indices
    x = torch.randn((64, 256), dtype=torch.bfloat16, device=ranks.device, requires_grad=True)
    weights = torch.rand((64, 3), device=ranks.device, requires_grad=True)

    for dispatcher in (TokenDispatcher(group, 4 * ranks.size, one, device=ranks.device) for one in (config, fixed)):
        assert isinstance(dispatcher.backend, CollectiveOnGPU)

        def step(dispatcher: TokenDispatcher = dispatcher) -> None:
            sent = dispatcher.dispatch(x, topk_idx, weights)
            dispatcher.combine(sent.rows * 2, sent, weights=sent.weights).sum().backward()

        step()
        torch.cuda.synchronize()
        waits.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert waits == ["plan"]


def test_an_operation_is_few_kernels(ranks: Ranks, collective: CollectiveOnGPU) -> None:
    topk_idx = torch.rand((64, 4 * ranks.size), device=ranks.device).topk(3, dim=1).indices
    x = torch.randn((64, 256), dtype=torch.bfloat16, device=ranks.device)

    def kernels(call: Callable[[], object]) -> list[str]:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [name for name in names if "Mem" not in name]

    plan = collective.plan(topk_idx, 4 * ranks.size)
    sent = collective.dispatch(plan, x, layout=Layout.BY_EXPERT)
    if ranks.size == 1:
        pytest.skip("needs a peer")
    for call in (
        lambda: collective.plan(topk_idx, 4 * ranks.size),
        lambda: collective.dispatch(plan, x, layout=Layout.BY_EXPERT),
        lambda: collective.combine(plan, sent.x, layout=Layout.BY_EXPERT),
    ):
        names = kernels(call)
        assert 0 < len(names) <= 5, names
        assert sum("nccl" in name for name in names) == 1, names


def test_a_capture_is_refused_and_breaks_nothing(ranks: Ranks, collective: CollectiveOnGPU) -> None:
    topk_idx, experts = batch(ranks)
    plan = collective.plan(topk_idx, experts)
    x = torch.ones((8, 64), device=ranks.device)
    for call in (
        lambda: collective.plan(topk_idx, experts),
        lambda: collective.dispatch(plan, x, layout=Layout.BY_SOURCE),
    ):
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(UnsupportedError, match="captured in a CUDA graph"),
        ):
            call()
    assert (collective.dispatch(plan, x, layout=Layout.BY_SOURCE).x == 1).all()


# -- errors ------------------------------------------------------------------------------------------------------------


def batch(ranks: Ranks) -> tuple[Tensor, int]:
    """Every token goes to every rank."""
    return torch.arange(ranks.size, device=ranks.device).expand(8, -1).contiguous(), ranks.size


def test_a_refused_plan_is_an_error_on_all_ranks_and_they_go_on(ranks: Ranks, fresh: CollectiveOnGPU) -> None:
    if ranks.size < 2:
        pytest.skip("needs a peer")
    topk_idx, experts = batch(ranks)
    wrong = topk_idx.clone()
    wrong[3, 0] = experts + 5
    for bad, said in (
        (topk_idx.float(), "topk_idx = torch.float32: must be int32 or int64"),
        (wrong, f"topk_idx = {experts + 5}: an expert must be -1 (dropped) or 0 to {experts - 1}"),
    ):
        last = ranks.rank == ranks.size - 1
        with pytest.raises(InputError if last else PeerError) as caught:
            fresh.plan(bad if last else topk_idx, experts)
        assert said in str(caught.value)
        assert last or f"rank {ranks.size - 1}: " in str(caught.value)
    with pytest.raises(RankMismatchError, match=f"num_experts differs .*{2 * experts} on rank 1"):
        fresh.plan(topk_idx, experts * (2 if ranks.rank == 1 else 1))
    plan = fresh.plan(topk_idx, experts)
    sent = fresh.dispatch(plan, torch.ones((8, 8), device=ranks.device), layout=Layout.BY_SOURCE)
    assert (sent.x == 1).all() and fresh.usable


def found_by(backend: CollectiveOnGPU, call: Callable[[], Tensor]) -> tuple[Exception, Tensor | None]:
    """The error of a call, found while it is made or a moment later, and the call's result if it has one."""
    began, result = time.monotonic(), None
    try:
        result = call()
        while time.monotonic() - began < SOON_SECONDS:
            backend.check()
            time.sleep(0.01)
    except Exception as error:
        return error, result
    raise AssertionError(f"nothing was found within {SOON_SECONDS:g} s")


@pytest.mark.parametrize("known", [False, True])
def test_a_refused_dispatch_is_an_error_on_all_ranks(ranks: Ranks, fresh: CollectiveOnGPU, known: bool) -> None:
    if ranks.size < 2:
        pytest.skip("needs a peer")
    topk_idx, experts = batch(ranks)
    plan = fresh.plan(topk_idx, experts)
    x = torch.ones((8, 64), dtype=torch.bfloat16, device=ranks.device)
    if known:  # then nothing goes ahead of the rows
        fresh.dispatch(plan, x, layout=Layout.BY_EXPERT)
    if ranks.rank == ranks.size - 1:
        with pytest.raises(InputError, match="x = shape"):
            fresh.dispatch(plan, x[1:], layout=Layout.BY_EXPERT)
    else:
        error, sent = found_by(fresh, lambda: fresh.dispatch(plan, x, layout=Layout.BY_EXPERT).x)
        assert isinstance(error, PeerError), error
        assert f"rank {ranks.size - 1} broke off dispatch: InputError: x = shape (7, 64)" in str(error)
        torch.cuda.synchronize()  # ends
        assert sent is None or sent.isnan().all()
    with pytest.raises(PeerError, match="given up after an earlier error"):
        fresh.plan(topk_idx, experts)
    assert not fresh.usable


@pytest.mark.parametrize(
    ("what", "known"),
    [
        ("hidden size", False),
        ("dtype", False),
        ("backward", False),
        ("call", False),
        ("weights", False),
        ("hidden size", True),
        ("dtype", True),
        ("call", True),
        ("plan", True),
    ],
)
def test_ranks_in_different_calls(ranks: Ranks, fresh: CollectiveOnGPU, what: str, known: bool) -> None:
    if ranks.size < 2:
        pytest.skip("needs a peer")
    topk_idx, experts = batch(ranks)
    plan = fresh.plan(topk_idx, experts)
    other = ranks.rank == 1
    x = torch.ones((8, 64), dtype=torch.bfloat16, device=ranks.device)
    if known:  # then headers go with the rows, and NCCL waits where sizes differ
        for tokens in (x, x.half(), x.repeat(1, 2)):
            sent = fresh.dispatch(plan, tokens, layout=Layout.BY_SOURCE)
            fresh.combine(plan, sent.x, layout=Layout.BY_SOURCE)
    if what == "hidden size" and other:
        x = x.repeat(1, 2)
    if what == "dtype" and other:
        x = x.half()
    weights = torch.ones(topk_idx.shape, device=ranks.device) if what == "weights" and other else None
    backward = Backward.ROWS if what == "backward" and other else Backward.NONE

    def call() -> Tensor:
        if what == "plan" and other:
            return fresh.plan(topk_idx, experts).counted
        if what == "call" and other:
            return fresh.combine(plan, x.repeat(ranks.size, 1), layout=Layout.BY_SOURCE).x
        return fresh.dispatch(plan, x, layout=Layout.BY_SOURCE, weights=weights, backward=backward).x

    error, result = found_by(fresh, call)
    assert isinstance(error, RankMismatchError), error
    assert f"{'call' if what == 'plan' else what} differs between the ranks of the group" in str(error)
    torch.cuda.synchronize()  # ends
    assert result is None or result.isnan().all()
    assert not fresh.usable


def test_a_peer_that_does_not_come_is_named_while_the_host_waits_elsewhere(ranks: Ranks) -> None:
    if ranks.size < 2:
        pytest.skip("needs a peer")
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    assert group is not None
    limit, last = 3.0, ranks.size - 1
    backend = make(ranks, group, timeout_seconds=limit)
    topk_idx, experts = batch(ranks)
    plan = backend.plan(topk_idx, experts)
    x = torch.ones((8, 64), dtype=torch.bfloat16, device=ranks.device)
    dist.barrier(ranks.group)
    if ranks.rank == last:
        _get_process_group_store(ranks.group).wait(["the test of a late peer is over"], timedelta(seconds=30))
        return
    began = time.monotonic()
    backend.dispatch(plan, x, layout=Layout.BY_EXPERT)
    torch.cuda.synchronize()  # as loss.item() does; no call of this library is there to look at a clock
    assert time.monotonic() - began < limit + SOON_SECONDS
    with pytest.raises(PeerTimeoutError, match=f"dispatch: .*no answer from rank {last} within 3 s"):
        backend.plan(topk_idx, experts)
    if ranks.rank == 0:
        _get_process_group_store(ranks.group).set("the test of a late peer is over", "")


def test_a_plan_that_went_through_operators(ranks: Ranks, collective: CollectiveOnGPU) -> None:
    topk_idx = torch.rand((64, 4 * ranks.size), device=ranks.device).topk(3, dim=1).indices
    plan = collective.plan(topk_idx, 4 * ranks.size)
    other = TensorPlan.from_tensors(plan.num_experts, plan.alignment, plan.tensors())
    x = torch.randn((64, 256), dtype=torch.bfloat16, device=ranks.device)
    sent, again = (collective.dispatch(p, x, layout=Layout.BY_EXPERT).x for p in (plan, other))
    assert torch.equal(sent, again)
    back, once_more = (collective.combine(p, sent, layout=Layout.BY_EXPERT).x for p in (plan, other))
    assert torch.equal(back, once_more)


@pytest.mark.timeout(3 * START_SECONDS)
@pytest.mark.parametrize("how", ["asleep", "killed"])
def test_a_lost_peer_is_named_and_the_other_ends(ranks: Ranks, how: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if mps_is_running():
        pytest.skip("must not run under CUDA MPS: a killed client can take the server's other clients with it")
    (ended,) = on_first_rank(ranks, lambda: run(2, how, "cuda"))
    first, again = ended.told["first"], ended.told["again"]
    assert first["error"] == "PeerTimeoutError", ended.output
    assert "plan: rank 0 of 2: no answer from rank 1 within 2 s" in first["message"]
    assert first["seconds"] < LOST_AFTER_SECONDS + 5
    assert again["error"] == "PeerTimeoutError" and again["seconds"] < LOST_AFTER_SECONDS / 2
    assert "given up after an earlier error" in again["message"]
    assert not ended.told["state"]["usable"]
    assert ended.status == 0, ended.output
    assert ended.seconds < END_SECONDS
