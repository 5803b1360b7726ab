"""The nvlink backend against the collective backend: the same plans, rows and sums."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepep_moe.backends.base import Layout, Plan, Wire
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, HandleError, InputError, PeerError, PeerTimeoutError, RankMismatchError
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks

PLAN_TENSORS = [
    "topk_idx",
    "send_slot",
    "rank_prefix",
    "recv_topk_idx",
    "recv_src_idx",
    "recv_rows",
    "row_recv",
    "expert_counts",
    "expert_offsets",
]


def make_backend(ranks: Ranks, **settings: object) -> NVLinkBackend:
    reason = NVLinkBackend.supports(ranks.group, ranks.device)
    assert reason is None, reason
    config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms, **settings)  # type: ignore[arg-type]
    return NVLinkBackend(ranks.group, ranks.device, config)


@pytest.fixture(scope="module")
def nvlink(ranks: Ranks) -> Iterator[NVLinkBackend]:
    backend = make_backend(ranks)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> CollectiveBackend:
    return CollectiveBackend(ranks.group, torch.device("cpu"), DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS))


@dataclass(frozen=True)
class Case:
    """One batch on the CPU. Sizes are shared by all ranks, values are this rank's own."""

    num_experts: int
    alignment: int
    topk_idx: Tensor  # [T, K]
    x: Tensor  # [T, H]
    weights: Tensor  # [T, K]
    bias: tuple[Tensor, ...]

    @staticmethod
    def draw(ranks: Ranks, seed: int, **fixed: int) -> Case:
        shared, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed * 1000 + ranks.rank)

        def pick(name: str, choices: list[int]) -> int:
            chosen = choices[int(torch.randint(len(choices), (), generator=shared))]
            return fixed.get(name, chosen)

        local = pick("local_experts", [1, 2, 3, 8, 32])
        experts = local * ranks.size
        topk = pick("topk", [1, 2, 3, 6, 8, 17, 32])
        dtype = [torch.bfloat16, torch.float16, torch.float32][pick("dtype", [0, 1, 2])]
        hidden = pick("hidden_vectors", [1, 3, 31, 32, 64, 129, 448]) * (16 // dtype.itemsize)
        alignment = pick("alignment", [1, 2, 16, 128])
        tokens = pick("tokens", [0, 1, 31, 64, 65, 257, 700])
        if tokens and pick("ragged", [0, 1]):
            tokens = int(torch.randint(tokens + 1, (), generator=own))
        if pick("distinct", [0, 1, 1]) and topk <= experts:
            topk_idx = torch.rand((tokens, experts), generator=own).topk(topk, dim=1).indices
        else:
            topk_idx = torch.randint(experts, (tokens, topk), generator=own)
        dropped = pick("dropped_percent", [0, 0, 20, 100]) / 100
        topk_idx[torch.rand(topk_idx.shape, generator=own) < dropped] = -1
        return Case(
            experts,
            alignment,
            topk_idx,
            torch.randn((tokens, hidden), generator=own).to(dtype),
            torch.rand(topk_idx.shape, generator=own),
            tuple(torch.randn((tokens, hidden), generator=own).to(dtype) for _ in range(pick("biases", [0, 1, 2]))),
        )


def assert_same(got: Tensor | None, wanted: Tensor | None, what: str) -> None:
    assert (got is None) == (wanted is None), what
    if got is not None and wanted is not None:
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def assert_sums(got: Tensor, wanted: Tensor, layout: Layout) -> None:
    """Bit for bit in rank layout. In expert layout the reference rounds a rank's own sum too, the kernel does not."""
    if layout is Layout.BY_EXPERT:
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[got.dtype]
        torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=tolerance)
    else:
        assert_same(got, wanted, "combined tokens")


def assert_same_plan(got: Plan, wanted: Plan) -> None:
    for name in PLAN_TENSORS:
        assert_same(getattr(got, name), getattr(wanted, name), name)
    assert_same(got.expert_counts_host, wanted.expert_counts_host, "expert_counts_host")


def compare(ranks: Ranks, nvlink: NVLinkBackend, reference: CollectiveBackend, case: Case) -> None:
    """Every verb on one batch, both layouts, bit for bit where nothing is multiplied."""
    device = ranks.device
    counts, wanted_counts = (
        nvlink.destinations(case.topk_idx.to(device), case.num_experts),
        reference.destinations(case.topk_idx, case.num_experts),
    )
    for got, wanted, name in zip(counts, wanted_counts, wanted_counts._fields, strict=True):
        assert_same(got, wanted, name)
    plan = nvlink.plan(case.topk_idx.to(device), case.num_experts, alignment=case.alignment)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment)
    assert_same_plan(plan, wanted_plan)
    x, weights, bias = case.x.to(device), case.weights.to(device), tuple(b.to(device) for b in case.bias)
    for layout in Layout:
        sent = nvlink.dispatch(plan, x, weights=weights, layout=layout)
        wanted_sent = reference.dispatch(wanted_plan, case.x, weights=case.weights, layout=layout)
        assert_same(sent.x, wanted_sent.x, f"dispatched rows, {layout}")
        assert_same(sent.weights, wanted_sent.weights, f"dispatched weights, {layout}")

        rows = (wanted_sent.x.float() * 1.5).to(case.x.dtype)
        back = nvlink.combine(plan, rows.to(device), weights=sent.weights, bias=bias, layout=layout)
        wanted_back = reference.combine(wanted_plan, rows, weights=wanted_sent.weights, bias=case.bias, layout=layout)
        assert_sums(back.x, wanted_back.x, layout)
        assert_same(back.weights, wanted_back.weights, f"combined weights, {layout}")
        plain = nvlink.combine(plan, rows.to(device), layout=layout)
        assert plain.weights is None
        assert_sums(plain.x, reference.combine(wanted_plan, rows, layout=layout).x, layout)
    assert sent.weights is not None and wanted_sent.weights is not None
    weighted = nvlink.combine(plan, rows.to(device), weights=sent.weights, apply_weights=True, layout=Layout.BY_EXPERT)
    wanted_weighted = reference.combine(
        wanted_plan, rows, weights=wanted_sent.weights, apply_weights=True, layout=Layout.BY_EXPERT
    )
    assert_sums(weighted.x, wanted_weighted.x, Layout.BY_EXPERT)


@pytest.mark.parametrize("first_seed", range(0, 200, 20))
def test_random_shapes(ranks: Ranks, nvlink: NVLinkBackend, reference: CollectiveBackend, first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 20):
        compare(ranks, nvlink, reference, Case.draw(ranks, seed))


@pytest.mark.parametrize("hidden_vectors", [512, 513, 896])
@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_long_rows(
    ranks: Ranks, nvlink: NVLinkBackend, reference: CollectiveBackend, dtype: int, hidden_vectors: int
) -> None:
    """From 8 KiB on, weights carried along included, rows of the expert layout come home in two halves."""
    for topk in (2, 17):
        case = Case.draw(
            ranks, 43, tokens=129, topk=topk, local_experts=8, dtype=dtype, hidden_vectors=hidden_vectors, biases=2
        )
        compare(ranks, nvlink, reference, case)


def test_many_experts(ranks: Ranks, nvlink: NVLinkBackend, reference: CollectiveBackend) -> None:
    compare(ranks, nvlink, reference, Case.draw(ranks, 7, local_experts=1024 // ranks.size, tokens=1500, topk=8))


def test_int32_indices(ranks: Ranks, nvlink: NVLinkBackend) -> None:
    case = Case.draw(ranks, 3, tokens=200, ragged=0)
    wide = nvlink.plan(case.topk_idx.to(ranks.device), case.num_experts)
    narrow = nvlink.plan(case.topk_idx.to(ranks.device, torch.int32), case.num_experts)
    for name in PLAN_TENSORS:
        assert_same(getattr(narrow, name), getattr(wide, name).cpu(), name)


def test_without_expert_indices(ranks: Ranks, nvlink: NVLinkBackend, reference: CollectiveBackend) -> None:
    case = Case.draw(ranks, 5, tokens=300)
    counts = reference.destinations(case.topk_idx, case.num_experts)
    given = {
        "is_token_in_rank": counts.is_token_in_rank,
        "num_tokens_per_expert": counts.num_tokens_per_expert,
    }
    plan = nvlink.plan(None, case.num_experts, **{k: v.to(ranks.device) for k, v in given.items()})
    wanted_plan = reference.plan(None, case.num_experts, **given)
    assert_same_plan(plan, wanted_plan)
    sent, wanted = (
        nvlink.dispatch(plan, case.x.to(ranks.device), layout=Layout.BY_SOURCE),
        reference.dispatch(wanted_plan, case.x, layout=Layout.BY_SOURCE),
    )
    assert_same(sent.x, wanted.x, "rows")
    assert_same(
        nvlink.combine(plan, sent.x, layout=Layout.BY_SOURCE).x,
        reference.combine(wanted_plan, wanted.x, layout=Layout.BY_SOURCE).x,
        "tokens",
    )
    with pytest.raises(HandleError, match="expert layout"):
        nvlink.dispatch(plan, case.x.to(ranks.device), layout=Layout.BY_EXPERT)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("kind", [torch.float32, torch.int32])
def test_fp8_rows_with_scales(
    ranks: Ranks,
    nvlink: NVLinkBackend,
    reference: CollectiveBackend,
    kind: torch.dtype,
    layout: Layout,
    column_major: bool,
) -> None:
    case = Case.draw(ranks, 11, tokens=300, hidden_vectors=64, dtype=0, topk=3, local_experts=4)
    x = case.x.to(torch.float8_e4m3fn)
    scales = torch.randint(1, 100, (len(x), 4), generator=torch.Generator().manual_seed(ranks.rank)).to(kind)
    plan = nvlink.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=16)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=16)
    on_gpu = scales.t().contiguous().to(ranks.device).t() if column_major else scales.to(ranks.device)
    sent = nvlink.dispatch(plan, x.to(ranks.device), scales=on_gpu, layout=layout)
    wanted = reference.dispatch(wanted_plan, x, scales=scales, layout=layout)
    assert_same(sent.x.view(torch.uint8), wanted.x.view(torch.uint8), "rows")
    assert_same(sent.scales, wanted.scales, "scales")


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("hidden", [128, 640, 4096])
def test_quantized_on_the_way(
    ranks: Ranks, nvlink: NVLinkBackend, reference: CollectiveBackend, hidden: int, layout: Layout
) -> None:
    case = Case.draw(ranks, 13, tokens=300, hidden_vectors=hidden // 8, dtype=0, topk=3, local_experts=4)
    plan = nvlink.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=16)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=16)
    sent = nvlink.dispatch(
        plan, case.x.to(ranks.device), weights=case.weights.to(ranks.device), wire=Wire.E4M3, layout=layout
    )
    wanted = reference.dispatch(wanted_plan, case.x, weights=case.weights, wire=Wire.E4M3, layout=layout)
    assert sent.x.dtype == torch.float8_e4m3fn
    assert_same(sent.weights, wanted.weights, "weights")
    assert_same(sent.x.float(), wanted.x.float(), "rows")
    assert_same(sent.scales, wanted.scales, "scales")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(("hidden", "tokens"), [(128, 300), (384, 300), (7168, 65), (7168, 0)])
def test_through_fp8(
    ranks: Ranks,
    nvlink: NVLinkBackend,
    reference: CollectiveBackend,
    hidden: int,
    tokens: int,
    layout: Layout,
    weighted: bool,
) -> None:
    """BF16 arrives: what a dispatch of rounded tokens delivers, wherever a row comes from."""
    case = Case.draw(ranks, 13, tokens=tokens, hidden_vectors=hidden // 8, dtype=0, topk=3, local_experts=4)
    plan = nvlink.plan(case.topk_idx.to(ranks.device), case.num_experts, alignment=16)
    wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=16)
    weights = case.weights if weighted else None
    sent = nvlink.dispatch(
        plan,
        case.x.to(ranks.device),
        weights=None if weights is None else weights.to(ranks.device),
        wire=Wire.E4M3_TO_BF16,
        layout=layout,
    )
    wanted = reference.dispatch(wanted_plan, through_fp8(case.x), weights=weights, layout=layout)
    assert sent.x.dtype == torch.bfloat16 and sent.scales is None
    assert_same(sent.x, wanted.x, "rows")
    assert_same(sent.weights, wanted.weights, "weights")


def through_fp8(x: Tensor) -> Tensor:
    return dequantize_e4m3(*quantize_e4m3(x), x.dtype)


def test_every_scale(ranks: Ranks, nvlink: NVLinkBackend) -> None:
    """The kernel divides in its own way. Blocks with every BF16 number as their largest, infinity and NaN included."""
    largest = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 128, 1)
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand((256, 128, 128), generator=generator) * 2 - 1) * largest.float()
    blocks[..., :1] = largest.float()
    x = blocks.bfloat16().view(256, 128 * 128)
    routes = torch.arange(ranks.size, device=ranks.device).expand(256, -1)  # every token to every rank
    plan = nvlink.plan(routes.contiguous(), ranks.size)

    def wanted(rows: Tensor) -> Tensor:
        return torch.cat([rows] * ranks.size)

    rounded = nvlink.dispatch(plan, x.to(ranks.device), wire=Wire.E4M3_TO_BF16, layout=Layout.BY_SOURCE)
    assert_same(rounded.x, wanted(through_fp8(x)), "rows")
    sent = nvlink.dispatch(plan, x.to(ranks.device), wire=Wire.E4M3, layout=Layout.BY_SOURCE)
    assert sent.scales is not None
    finite = torch.isfinite(wanted(x)).all(1)
    fp8, scales = (wanted(part.float()) for part in quantize_e4m3(x))
    assert_same(sent.x.float().cpu()[finite], fp8[finite], "FP8 rows")
    assert_same(sent.scales.cpu()[finite], scales[finite], "scales")


def test_num_sms_changes_nothing(ranks: Ranks, reference: CollectiveBackend) -> None:
    case = Case.draw(ranks, 17, tokens=700, ragged=0)
    for num_sms in (1, 2, 7):
        config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=num_sms)
        backend = NVLinkBackend(ranks.group, ranks.device, config)
        compare(ranks, backend, reference, case)
        backend.close()


def test_fixed_sizes_need_no_host(ranks: Ranks, reference: CollectiveBackend) -> None:
    """The same rows in front, -1 and zeros behind them, and nothing read back by the host."""
    case = Case.draw(ranks, 19, tokens=300, topk=3, local_experts=4, alignment=16)
    device = ranks.device
    backend = make_backend(ranks, max_tokens_per_rank=300)
    wanted = reference.plan(case.topk_idx, case.num_experts, alignment=16)
    max_recv, max_rows = 300 * ranks.size + 5, 300 * 3 * ranks.size + 4 * 16
    plan = backend.plan(case.topk_idx.to(device), case.num_experts, alignment=16, max_recv=max_recv, max_rows=max_rows)
    assert plan.expert_counts_host is None
    n, m = wanted.num_recv, wanted.num_rows
    for name, used in (("recv_topk_idx", n), ("recv_rows", n), ("recv_src_idx", n), ("row_recv", m)):
        tensor = getattr(plan, name).cpu()
        assert_same(tensor[:used], getattr(wanted, name), name)
        assert (tensor[used:] == -1).all(), name
    assert_same(plan.expert_offsets, wanted.expert_offsets, "expert_offsets")
    sent = backend.dispatch(plan, case.x.to(device), layout=Layout.BY_EXPERT)
    wanted_rows = reference.dispatch(wanted, case.x, layout=Layout.BY_EXPERT).x
    assert_same(sent.x[:m], wanted_rows, "rows")
    assert (sent.x[m:] == 0).all()
    tokens = backend.combine(plan, sent.x, layout=Layout.BY_EXPERT).x
    assert_sums(tokens, reference.combine(wanted, wanted_rows, layout=Layout.BY_EXPERT).x, Layout.BY_EXPERT)

    x = torch.randn((len(case.x), 640), generator=torch.Generator().manual_seed(ranks.rank)).bfloat16()
    for layout, used in ((Layout.BY_SOURCE, n), (Layout.BY_EXPERT, m)):
        sent = backend.dispatch(plan, x.to(device), wire=Wire.E4M3_TO_BF16, layout=layout)
        assert_same(sent.x[:used], reference.dispatch(wanted, through_fp8(x), layout=layout).x, "through FP8")
    assert (sent.x[m:] == 0).all()
    backend.check()
    backend.close()


def test_overflow_is_an_error(ranks: Ranks) -> None:
    backend = make_backend(ranks, max_tokens_per_rank=64)
    topk_idx = torch.zeros((64, 1), dtype=torch.int64, device=ranks.device)  # all tokens to expert 0 on rank 0

    def layer() -> None:
        plan = backend.plan(topk_idx, ranks.size, max_recv=64 * ranks.size - 1, max_rows=64 * ranks.size)
        sent = backend.dispatch(plan, torch.ones((64, 64), device=ranks.device), layout=Layout.BY_EXPERT)
        backend.combine(plan, sent.x, layout=Layout.BY_EXPERT)
        torch.cuda.synchronize()
        backend.check()

    with pytest.raises(CapacityError, match=f"rank 0 needs room for {64 * ranks.size} received tokens"):
        layer()  # on every rank
    backend.check()  # and it goes on
    backend.plan(topk_idx, ranks.size).known_sizes()
    backend.close()


def test_graph_replays_other_routing(ranks: Ranks, reference: CollectiveBackend) -> None:
    tokens, topk, local, hidden = 256, 2, 4, 512
    experts = local * ranks.size
    device = ranks.device
    backend = make_backend(ranks, max_tokens_per_rank=tokens)
    topk_idx = torch.zeros((tokens, topk), dtype=torch.int64, device=device)
    x = torch.zeros((tokens, hidden), dtype=torch.bfloat16, device=device)

    def layer() -> Tensor:
        plan = backend.plan(
            topk_idx, experts, max_recv=tokens * ranks.size, max_rows=tokens * topk * ranks.size, alignment=8
        )
        rows = backend.dispatch(plan, x, layout=Layout.BY_EXPERT).x
        return backend.combine(plan, rows * 2, layout=Layout.BY_EXPERT).x

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = layer()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed * 100 + ranks.rank)
        routes = torch.randint(-1, experts, (tokens, topk), generator=generator)
        values = torch.randn((tokens, hidden), generator=generator).to(torch.bfloat16)
        topk_idx.copy_(routes)
        x.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        plan = reference.plan(routes, experts, alignment=8)
        rows = reference.dispatch(plan, values, layout=Layout.BY_EXPERT).x
        assert_sums(out, reference.combine(plan, rows * 2, layout=Layout.BY_EXPERT).x, Layout.BY_EXPERT)
    backend.check()
    backend.close()


def test_several_backends_and_layers_in_flight(ranks: Ranks, reference: CollectiveBackend) -> None:
    backends = [make_backend(ranks) for _ in range(4)]
    cases = [Case.draw(ranks, 30 + i, tokens=200, hidden_vectors=64) for i in range(8)]
    plans = [
        backends[i % 4].plan(c.topk_idx.to(ranks.device), c.num_experts, alignment=c.alignment)
        for i, c in enumerate(cases)
    ]
    rows = [
        backends[i % 4].dispatch(plans[i], c.x.to(ranks.device), layout=Layout.BY_EXPERT).x for i, c in enumerate(cases)
    ]
    for i in reversed(range(8)):
        case = cases[i]
        tokens = backends[i % 4].combine(plans[i], rows[i], layout=Layout.BY_EXPERT).x
        wanted_plan = reference.plan(case.topk_idx, case.num_experts, alignment=case.alignment)
        wanted_rows = reference.dispatch(wanted_plan, case.x, layout=Layout.BY_EXPERT).x
        assert_same(rows[i], wanted_rows, f"rows of layer {i}")
        assert_sums(tokens, reference.combine(wanted_plan, wanted_rows, layout=Layout.BY_EXPERT).x, Layout.BY_EXPERT)
    for backend in backends:
        backend.close()


def test_other_streams_wait_their_turn(ranks: Ranks, nvlink: NVLinkBackend) -> None:
    case = Case.draw(ranks, 41, tokens=700, ragged=0, hidden_vectors=448, topk=8, local_experts=8, distinct=1)
    plan = nvlink.plan(case.topk_idx.to(ranks.device), case.num_experts)
    x = case.x.to(ranks.device)
    wanted = nvlink.dispatch(plan, x, layout=Layout.BY_SOURCE).x.clone()
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(6)]:
        with torch.cuda.stream(stream):
            results.append(nvlink.dispatch(plan, x, layout=Layout.BY_SOURCE).x)
    torch.cuda.synchronize()
    for got in results:
        assert torch.equal(got, wanted)


def test_bad_expert_index_is_named_on_its_rank(ranks: Ranks) -> None:
    backend = make_backend(ranks)
    topk_idx = torch.zeros((10, 2), dtype=torch.int64, device=ranks.device)
    if ranks.rank == 0:
        topk_idx[3, 1] = ranks.size + 5
    with pytest.raises(InputError if ranks.rank == 0 else PeerError) as error:
        backend.plan(topk_idx, ranks.size).known_sizes()
    assert str(ranks.size + 5) in str(error.value) if ranks.rank == 0 else "rank 0" in str(error.value)
    backend.plan(torch.zeros_like(topk_idx), ranks.size).known_sizes()  # and it goes on
    backend.close()


def test_refused_input_is_known_to_all(ranks: Ranks) -> None:
    """A rank whose arguments are refused before any kernel still tells the others, which then do not wait for it."""
    backend = make_backend(ranks)
    good = torch.zeros((10, 2), dtype=torch.int64, device=ranks.device)
    if ranks.rank == 0:
        with pytest.raises(InputError, match="topk_idx"):
            backend.plan(good.float(), ranks.size)
    else:
        with pytest.raises(PeerError, match="rank 0 refused its input"):
            backend.plan(good, ranks.size).known_sizes()
    plan = backend.plan(good, ranks.size)  # and it goes on
    assert int(plan.expert_counts.sum()) == (20 * ranks.size if ranks.rank == 0 else 0)
    backend.close()


def test_a_plan_waits_only_where_its_sizes_are_needed(ranks: Ranks, reference: CollectiveBackend) -> None:
    """An abandoned plan is in nobody's way, and what went wrong comes with the sizes, once."""
    backend = make_backend(ranks)
    case = Case.draw(ranks, 7, tokens=257, topk=3, local_experts=8)
    topk_idx, experts = case.topk_idx.to(ranks.device), case.num_experts
    for _ in range(3):
        backend.plan(topk_idx, experts)
    padded, plain = backend.plan(topk_idx, experts, alignment=16), backend.plan(topk_idx, experts)
    wanted = reference.plan(case.topk_idx, experts)
    assert plain.known_sizes() == wanted.known_sizes()
    assert_same_plan(plain, wanted)
    assert_same_plan(padded, reference.plan(case.topk_idx, experts, alignment=16))

    wrong = experts if ranks.rank == 0 else 0
    bad = backend.plan(torch.full((10, 3), wrong, device=ranks.device), experts)
    with pytest.raises(InputError if ranks.rank == 0 else PeerError):
        bad.known_sizes()
    with pytest.raises(HandleError, match="failed when it was made"):
        backend.dispatch(bad, torch.zeros((10, 64), device=ranks.device), layout=Layout.BY_SOURCE)
    assert_same(
        backend.dispatch(plain, case.x.to(ranks.device), layout=Layout.BY_SOURCE).x,
        reference.dispatch(wanted, case.x, layout=Layout.BY_SOURCE).x,
        "rows",
    )
    backend.close()


def test_refused_while_capturing_raises_at_once(ranks: Ranks) -> None:
    """Nothing runs during a capture, so there is nobody to tell and nothing to wait for."""
    backend = make_backend(ranks)
    good = torch.zeros((10, 2), dtype=torch.int64, device=ranks.device)
    stream = torch.cuda.Stream(ranks.device)
    began = time.monotonic()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        good.clone()  # a graph may not be empty
        with pytest.raises(InputError, match="topk_idx"):
            backend.plan(good.float(), ranks.size, max_recv=10 * ranks.size, max_rows=20 * ranks.size)
    assert time.monotonic() - began < TIMEOUT_SECONDS / 2
    plan = backend.plan(good, ranks.size)  # and it goes on
    assert int(plan.expert_counts.sum()) == (20 * ranks.size if ranks.rank == 0 else 0)
    backend.close()


def test_ranks_that_disagree(ranks: Ranks) -> None:
    if ranks.size == 1:
        pytest.skip("one rank cannot disagree")
    backend = make_backend(ranks)
    topk_idx = torch.zeros((10, 2), dtype=torch.int64, device=ranks.device)
    with pytest.raises(RankMismatchError, match="num_experts"):
        backend.plan(topk_idx, ranks.size * (2 if ranks.rank == 0 else 4)).known_sizes()
    with pytest.raises(RankMismatchError, match="top-k"):
        backend.plan(topk_idx[:, : 1 + (ranks.rank == 0)].contiguous(), ranks.size).known_sizes()
    plan = backend.plan(topk_idx, ranks.size)
    hidden = 32 if ranks.rank == 0 else 64
    for size in (64, hidden):  # the first makes staging large enough for both
        backend.dispatch(plan, torch.zeros((10, size), device=ranks.device), layout=Layout.BY_SOURCE)
    torch.cuda.synchronize()
    with pytest.raises((RankMismatchError, PeerError), match=r"bytes of a row|gave up"):
        backend.check()
    backend.close()


def test_a_silent_peer_is_named(ranks: Ranks) -> None:
    if ranks.size == 1:
        pytest.skip("one rank has no peer")
    config = DispatcherConfig(timeout_seconds=2.0, num_sms=ranks.num_sms)
    backend = NVLinkBackend(ranks.group, ranks.device, config)
    topk_idx = torch.zeros((10, 1), dtype=torch.int64, device=ranks.device)
    plan = backend.plan(topk_idx, ranks.size)
    x = torch.zeros((10, 64), device=ranks.device)
    backend.dispatch(plan, x, layout=Layout.BY_SOURCE)
    if ranks.rank != ranks.size - 1:  # the last rank does not call
        backend.dispatch(plan, x, layout=Layout.BY_SOURCE)
        torch.cuda.synchronize()
        with pytest.raises((PeerTimeoutError, PeerError), match=f"rank {ranks.size - 1} in dispatch|gave up"):
            backend.plan(topk_idx, ranks.size)
        with pytest.raises(PeerError):
            backend.combine(plan, x, layout=Layout.BY_SOURCE)
    torch.cuda.synchronize()
    backend.close()
    with pytest.raises(HandleError):
        backend.plan(topk_idx, ranks.size)
