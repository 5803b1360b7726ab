"""The hierarchical backend on GPUs of one host that is cut into nodes, beside the collective backend on the CPU.

Plans go through NCCL, which takes one rank per GPU: two ranks (2 x 1) or four (2 x 2 and 4 x 1). More ranks can share
GPUs under CUDA MPS if each of them is a host of its own to NCCL, which then takes sockets (8 ranks as 2 x 4)::

    torchrun --nproc-per-node 8 --no-python bash -c 'export RANKS_PER_NODE=4 NCCL_HOSTID=rank-$RANK
        exec python -m pytest tests/gpu/test_hierarchical.py -k nccl'

Everything runs over each rail transport; ``-k nccl`` or ``-k nvshmem`` takes one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepep_moe import DispatcherConfig, TokenDispatcher, nvshmem
from deepep_moe.backends import Layout, Plan, Wire, get_backend
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.backends.hierarchical_parts import Parts
from deepep_moe.backends.hierarchical_plan import HierarchicalPlan
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.errors import CapacityError, InputError, PeerError, RankMismatchError
from deepep_moe.fp8 import quantize_e4m3
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.test_nvlink import Case, assert_same, assert_same_plan

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CUT = int(os.environ.get("RANKS_PER_NODE", "0"))  # where ranks share GPUs
pytestmark = pytest.mark.skipif(
    not CUT and (WORLD not in (2, 4) or torch.cuda.device_count() < WORLD),
    reason="needs two or four ranks with a GPU each, or RANKS_PER_NODE and NCCL_HOSTID",
)
RAILS = [
    "nccl",
    pytest.param(
        "nvshmem", marks=pytest.mark.skipif(nvshmem.why_missing() is not None, reason="built without NVSHMEM")
    ),
]
CHUNKS = (0, 2000)  # bytes: one chunk for small batches, and as many as there can be
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}  # rounded once more, per hop


def cuts() -> list[int]:
    """Ranks per node."""
    return [CUT] if CUT else [1, 2] if WORLD == 4 else [1]


@pytest.fixture(scope="module", params=RAILS)
def rail(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=[(cut, chunk) for cut in cuts() for chunk in CHUNKS], ids=str)
def nodes(ranks: Ranks, rail: str, request: pytest.FixtureRequest) -> Iterator[HierarchicalBackend]:
    cut, chunk = request.param
    config = DispatcherConfig(
        backend="hierarchical",
        ranks_per_node=cut,
        rail_chunk_bytes=chunk,
        rail=rail,
        num_sms=ranks.num_sms,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    backend = get_backend(ranks.group, ranks.device, config)
    assert isinstance(backend, HierarchicalBackend)
    assert backend.engine.name == "nvlink" and backend.rail.name == rail
    yield backend
    backend.close()


@pytest.mark.parametrize("cut", cuts())
def test_auto_takes_it_over_nodes_of_several_ranks(ranks: Ranks, cut: int) -> None:
    backend = get_backend(ranks.group, ranks.device, DispatcherConfig(ranks_per_node=cut))
    assert backend.name == ("hierarchical" if cut > 1 else "collective")


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> CollectiveBackend:
    return CollectiveBackend(ranks.group, torch.device("cpu"), DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS))


def assert_near(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=tolerance)


def compare_moves(
    nodes: HierarchicalBackend,
    reference: CollectiveBackend,
    plans: tuple[Plan, Plan],
    case: Case,
    with_weights: bool = True,
) -> None:
    """Dispatch bit for bit, combine to rounding, in every layout that the plans have."""
    device, (plan, wanted_plan) = nodes.device, plans
    x, bias = case.x.to(device), tuple(b.to(device) for b in case.bias)
    weights = case.weights if with_weights else None
    on_device = None if weights is None else weights.to(device)
    for layout in Layout if plan.num_topk else (Layout.BY_SOURCE,):
        sent = nodes.dispatch(plan, x, layout=layout, weights=on_device)
        wanted = reference.dispatch(wanted_plan, case.x, layout=layout, weights=weights)
        assert_same(sent.x, wanted.x, f"rows, {layout}")
        assert_same(sent.weights, wanted.weights, f"weights, {layout}")
        rows = (wanted.x.float() * (1 + nodes.rank / 8)).to(case.x.dtype)
        for applied in (False, True):
            applied = applied and layout is Layout.BY_EXPERT and weights is not None
            back = nodes.combine(
                plan, rows.to(device), layout=layout, weights=sent.weights, apply_weights=applied, bias=bias
            )
            wanted_back = reference.combine(
                wanted_plan, rows, layout=layout, weights=wanted.weights, apply_weights=applied, bias=case.bias
            )
            assert_near(back.x, wanted_back.x)
            if wanted_back.weights is not None:
                torch.testing.assert_close(back.weights.cpu(), wanted_back.weights)  # type: ignore[union-attr]
        again = nodes.combine(plan, rows.to(device), layout=layout)
        assert torch.equal(again.x, nodes.combine(plan, rows.to(device), layout=layout).x)  # the same bits


def test_random_shapes(ranks: Ranks, nodes: HierarchicalBackend, reference: CollectiveBackend) -> None:
    for seed in range(24):
        case = Case.draw(ranks, seed)
        plans = (
            nodes.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=case.alignment),
            reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment),
        )
        assert_same_plan(*plans)
        compare_moves(nodes, reference, plans, case)


def test_kernels_make_the_plans_that_operators_make(ranks: Ranks, nodes: HierarchicalBackend) -> None:
    geometry = nodes._geometry
    kernels = geometry.kernels
    assert kernels is not None
    for seed, fixed in ((21, {}), (22, {}), (23, {"tokens": 0}), (24, {"tokens": 700}), (25, {"topk": 8})):
        case = Case.draw(ranks, seed, **{"tokens": 65, "local_experts": 3, **fixed})
        limits = {"max_recv": 700 * ranks.size, "max_rows": 1 << 18} if seed % 2 else {}
        topk_idx = case.topk_idx.to(ranks.device)
        made = []
        for with_kernels in (True, False, True):
            geometry.kernels = kernels if with_kernels else None
            try:
                plan = nodes.plan(topk_idx, case.num_experts, alignment=case.alignment, **limits)
                assert isinstance(plan, HierarchicalPlan)
                parts = [
                    Parts(plan, layout, chunks) for layout in Layout if case.topk_idx.shape[1] for chunks in (1, 2, 8)
                ]
            finally:
                geometry.kernels = kernels
            made.append((plan, parts))
        for plan, parts in made[1:]:
            for name in ("send_slot", "counted", "received", "row_recv", "expert_counts_host"):
                assert_same(getattr(made[0][0], name), _cpu(getattr(plan, name)), f"{name}, seed {seed}")
            wanted, way = made[0][0].way, plan.way
            for name in ("send_shares", "recv_shares", "rail_tokens", "send_position", "recv_position", "arrived"):
                assert_same(wanted.tables.tensor(name), way.tables.tensor(name).cpu(), f"{name}, seed {seed}")
            assert_same(wanted.node_plan.send_slot, way.node_plan.send_slot.cpu(), f"slots, seed {seed}")
            for mine, theirs in zip(made[0][1], parts, strict=True):
                for name in ("send_rows", "home_rows"):
                    assert_same(getattr(mine, name), _cpu(getattr(theirs, name)), f"{name}, seed {seed}")
                for one, other in zip((mine.own, *mine.crossing), (theirs.own, *theirs.crossing), strict=True):
                    for name in ("send_slot", "counted", "received", "row_recv"):
                        assert_same(getattr(one, name), _cpu(getattr(other, name)), f"part's {name}, seed {seed}")


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def test_fixed_sizes(ranks: Ranks, nodes: HierarchicalBackend, reference: CollectiveBackend) -> None:
    case = Case.draw(ranks, 3, tokens=65, topk=3, local_experts=2, dropped_percent=0, ragged=0)
    limits = {"max_recv": 65 * ranks.size + 5, "max_rows": 65 * 3 * ranks.size + 300}
    plans = (
        nodes.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=case.alignment, **limits),
        reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment, **limits),
    )
    assert_same_plan(*plans)
    compare_moves(nodes, reference, plans, case)

    def overflow() -> None:
        for _ in range(2):  # the first may leave it to the second
            nodes.plan(case.topk_idx.to(ranks.device), case.num_experts, max_recv=1, max_rows=4000)

    with pytest.raises(CapacityError, match=r"received tokens, but .* gives room for 1:"):
        overflow()


def test_a_plan_that_went_through_operators(
    ranks: Ranks, nodes: HierarchicalBackend, reference: CollectiveBackend
) -> None:
    case = Case.draw(ranks, 4, tokens=65, topk=3, local_experts=2)
    topk_idx = case.topk_idx.to(ranks.device)
    for limits in ({}, {"max_recv": 65 * ranks.size, "max_rows": 65 * 3 * ranks.size + 300}):
        plan = nodes.plan(topk_idx, case.num_experts, alignment=case.alignment, **limits)
        wanted = reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment, **limits)
        again = TensorPlan.from_tensors(plan.num_experts, plan.alignment, plan.tensors())
        compare_moves(nodes, reference, (again, wanted), case)


def test_without_expert_indices(ranks: Ranks, nodes: HierarchicalBackend, reference: CollectiveBackend) -> None:
    case = Case.draw(ranks, 5, tokens=300)
    counts = reference.destinations(case.topk_idx, case.num_experts)
    given = {"is_token_in_rank": counts.is_token_in_rank, "num_tokens_per_expert": counts.num_tokens_per_expert}
    plans = (
        nodes.plan(None, case.num_experts, **{k: v.to(ranks.device) for k, v in given.items()}),
        reference.plan(None, case.num_experts, **given),
    )
    assert_same_plan(*plans)
    compare_moves(nodes, reference, plans, case, with_weights=False)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("with_weights", [False, True])
def test_fp8_on_the_way(
    ranks: Ranks, nodes: HierarchicalBackend, reference: CollectiveBackend, layout: Layout, with_weights: bool
) -> None:
    case = Case.draw(ranks, 11, tokens=257, topk=6, local_experts=3, dtype=0, hidden_vectors=64, alignment=16)
    plans = (
        nodes.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=16),
        reference.plan(case.topk_idx, case.num_experts, alignment=16),
    )
    for scale in (1.0, 1e-6):
        x = case.x * scale
        weights = case.weights if with_weights else None
        on_device = None if weights is None else weights.to(ranks.device)
        for wire in (Wire.E4M3, Wire.E4M3_TO_BF16):
            sent = nodes.dispatch(plans[0], x.to(ranks.device), layout=layout, wire=wire, weights=on_device)
            wanted = reference.dispatch(plans[1], x, layout=layout, wire=wire, weights=weights)
            for name, got, expected in zip(("x", "scales", "weights"), sent, wanted):
                if got is not None and got.dtype == torch.float8_e4m3fn:
                    got, expected = got.view(torch.uint8), expected.view(torch.uint8)  # type: ignore[union-attr]
                assert_same(got, expected, f"{name} by {wire}")
        rows, scales = quantize_e4m3(x)
        given = nodes.dispatch(plans[0], rows.to(ranks.device), layout=layout, scales=scales.to(ranks.device))
        expected_rows = reference.dispatch(plans[1], rows, layout=layout, scales=scales)
        assert_same(given.x.view(torch.uint8), expected_rows.x.view(torch.uint8), "given FP8")
        assert_same(given.scales, expected_rows.scales, "given scales")


def test_gradients_of_a_layer(ranks: Ranks, nodes: HierarchicalBackend) -> None:
    """Beside the same layer on the CPU."""
    results = []
    for device, config in ((ranks.device, nodes.config), (torch.device("cpu"), DispatcherConfig())):
        generator = torch.Generator().manual_seed(ranks.rank)
        dispatcher = TokenDispatcher(ranks.group, 4 * ranks.size, config, device=device)
        x = torch.randn((97, 64), generator=generator).to(device).requires_grad_()
        topk_idx = torch.rand((97, 4 * ranks.size), generator=generator).topk(3).indices.to(device)
        weights = torch.rand((97, 3), generator=generator).to(device).requires_grad_()
        sent = dispatcher.dispatch(x, topk_idx, weights)
        out = dispatcher.combine(torch.tanh(sent.rows), sent, weights=sent.weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weights))])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)


def test_a_mistake_of_one_rank_reaches_all(ranks: Ranks, nodes: HierarchicalBackend) -> None:
    wrong = ranks.rank == ranks.size - 1
    topk_idx = torch.zeros((8, 2), dtype=torch.int64, device=ranks.device)
    with pytest.raises(InputError if wrong else PeerError, match="topk_idx = 99"):
        nodes.plan(topk_idx + 99 * wrong, 4 * ranks.size)
    with pytest.raises(RankMismatchError, match="num_experts"):
        nodes.plan(topk_idx, (8 if wrong else 4) * ranks.size)
    plan = nodes.plan(topk_idx, 4 * ranks.size)
    # A format that is new to all ranks is compared before anything moves.
    hidden = 8 * (100 + nodes.number % 50)
    x = torch.ones((8, hidden + 8 * wrong), dtype=torch.bfloat16, device=ranks.device)
    with pytest.raises(RankMismatchError, match="hidden size"):
        nodes.dispatch(plan, x, layout=Layout.BY_EXPERT)
    nodes.dispatch(plan, x[:, :hidden].contiguous(), layout=Layout.BY_EXPERT)


def test_no_call_makes_the_host_wait_but_once_in_a_plan(ranks: Ranks, nodes: HierarchicalBackend) -> None:
    """And that wait is bounded, so PyTorch does not see it."""
    case = Case.draw(ranks, 7, tokens=130, topk=4, local_experts=2, dtype=1, ragged=0)
    x, topk_idx, weights = (t.to(ranks.device) for t in (case.x, case.topk_idx, case.weights))
    limits = {"max_recv": 130 * ranks.size, "max_rows": 130 * 4 * ranks.size + 100}

    def step(**sizes: int) -> Tensor:
        plan = nodes.plan(topk_idx, case.num_experts, **sizes)
        rows = nodes.dispatch(plan, x, layout=Layout.BY_EXPERT, weights=weights)
        return nodes.combine(plan, rows.x, layout=Layout.BY_EXPERT, weights=rows.weights, apply_weights=True).x

    for sizes in ({}, limits):
        expected = step(**sizes)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = step(**sizes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, expected), sizes


def test_fixed_sizes_find_an_overflow_on_the_device(ranks: Ranks, nodes: HierarchicalBackend) -> None:
    """The sums are NaN, and the next plan of every rank raises."""
    topk_idx = torch.zeros((40, 1), dtype=torch.int64, device=ranks.device)  # all to rank 0
    good = torch.arange(40, dtype=torch.int64, device=ranks.device).unsqueeze(1) % ranks.size
    limits = {"max_recv": 40 * ranks.size - 1, "max_rows": 40 * ranks.size}
    x = torch.ones((40, 64), dtype=torch.bfloat16, device=ranks.device)
    for routes in (good, topk_idx, good):
        if routes is good:
            nodes.plan(good, ranks.size, **limits)
        plan = nodes.plan(routes, ranks.size, **limits)
        rows = nodes.dispatch(plan, x, layout=Layout.BY_EXPERT).x
        out = nodes.combine(plan, rows, layout=Layout.BY_EXPERT).x
        assert torch.isnan(out).all() if routes is topk_idx else torch.equal(out, x)
        if routes is topk_idx:
            needed = f"rank 0 needs room for {40 * ranks.size} received tokens"
            with pytest.raises(CapacityError, match=needed):
                nodes.plan(good, ranks.size, **limits)


def test_a_layer_in_a_cuda_graph(ranks: Ranks, nodes: HierarchicalBackend) -> None:
    """Forward and backward captured once over the rails, replayed with batches that it has not seen."""
    tokens, experts = 65, 4 * ranks.size
    fixed = replace(nodes.config, capacity_factor=float(ranks.size), max_tokens_per_rank=tokens)
    dispatcher = TokenDispatcher(ranks.group, experts, fixed, device=ranks.device)
    reference = TokenDispatcher(ranks.group, experts, DispatcherConfig(), device=torch.device("cpu"))

    def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + ranks.rank)
        topk_idx = torch.rand((tokens, experts), generator=generator).topk(3).indices
        return torch.randn((tokens, 64), generator=generator), topk_idx, torch.rand((tokens, 3), generator=generator)

    def step(dispatcher: TokenDispatcher, x: Tensor, topk_idx: Tensor, weights: Tensor) -> list[Tensor]:
        sent = dispatcher.dispatch(x, topk_idx, weights)
        out = dispatcher.combine(torch.tanh(sent.rows), sent, weights=sent.weights)
        return [out, *torch.autograd.grad(out.square().sum(), (x, weights))]

    x, topk_idx, weights = (t.to(ranks.device) for t in batch(0))
    x.requires_grad_(), weights.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(dispatcher, x, topk_idx, weights)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = step(dispatcher, x, topk_idx, weights)
    for seed in range(1, 6):
        new = batch(seed)
        with torch.no_grad():
            for old, values in zip((x, topk_idx, weights), new):
                old.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        dispatcher.backend.check()
        for got, wanted in zip(captured, step(reference, new[0].requires_grad_(), new[1], new[2].requires_grad_())):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)
    del graph


@pytest.mark.parametrize("cut", cuts())
def test_transports_give_the_same_bits(ranks: Ranks, cut: int) -> None:
    """Sums too: the order of a sum does not depend on who moves the rows."""
    if nvshmem.why_missing() is not None:
        pytest.skip("built without NVSHMEM")
    results = []
    for rail in ("nccl", "nvshmem"):
        config = DispatcherConfig(
            backend="hierarchical",
            ranks_per_node=cut,
            rail_chunk_bytes=40_000,
            rail=rail,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        backend = get_backend(ranks.group, ranks.device, config)
        got = []
        for seed in range(6):
            case = Case.draw(ranks, 40 + seed)
            plan = backend.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=case.alignment)
            x, weights = case.x.to(ranks.device), case.weights.to(ranks.device)
            for layout in Layout:
                rows = backend.dispatch(plan, x, layout=layout, weights=weights)
                back = backend.combine(plan, rows.x, layout=layout, weights=rows.weights)
                got += [rows.x, rows.weights, back.x, back.weights]
        results.append(got)
        backend.close()
    for one, other in zip(*results):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("cut", cuts())
def test_a_captured_layer_is_replayed_a_thousand_times(ranks: Ranks, cut: int) -> None:
    """With new routing each time, made on the device; every expert gives its rows back, so the sum is known."""
    if nvshmem.why_missing() is not None:
        pytest.skip("built without NVSHMEM")
    tokens, experts, topk, replays = 128, 4 * ranks.size, 4, 1000
    config = DispatcherConfig(
        backend="hierarchical",
        ranks_per_node=cut,
        rail="nvshmem",
        capacity_factor=float(ranks.size),
        max_tokens_per_rank=tokens,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    dispatcher = TokenDispatcher(ranks.group, experts, config, device=ranks.device)
    x = torch.randn((tokens, 256), device=ranks.device, dtype=torch.float32)
    token = torch.arange(tokens, dtype=torch.int64, device=ranks.device).unsqueeze(1)
    choice = torch.arange(topk, dtype=torch.int64, device=ranks.device)
    step = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    worst = torch.zeros((), dtype=torch.float32, device=ranks.device)

    def layer() -> None:
        topk_idx = (token * 7 + step * 13 + ranks.rank * 3 + choice * (experts // topk)) % experts
        weights = ((token + step + choice) % 5 + 1).float()
        sent = dispatcher.dispatch(x, topk_idx, weights)
        out = dispatcher.combine(sent.rows, sent, weights=sent.weights)
        error = (out - x * weights.sum(1, keepdim=True)).abs().max()
        worst.copy_(torch.maximum(worst, torch.nan_to_num(error, nan=torch.inf)))
        step.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        layer()
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    dispatcher.backend.check()
    assert int(step.item()) == replays + 2
    assert worst.item() < 1e-3
    del graph
    dispatcher.backend.close()
