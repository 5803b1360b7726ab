"""Megatron-Core on GPUs: ``moe_token_dispatcher_type="deepep"`` over NVLink against Megatron's own ``alltoall``.

Same weights, same data, same process group. ``alltoall`` runs on NCCL, so every rank needs a GPU of its own.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from deepep_moe.errors import InputError, PeerError
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks


def _has_megatron() -> bool:
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _has_megatron(), reason="needs megatron-core: pip install megatron-core")

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHARED = {"moe_shared_expert_intermediate_size": 64}
DROP = {"moe_expert_capacity_factor": 0.5}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))


@pytest.fixture(scope="module")
def util(ranks: Ranks) -> ModuleType:
    if ranks.size > torch.cuda.device_count():
        pytest.skip("needs a GPU for each rank: Megatron's alltoall uses NCCL, which refuses to share one")
    from tests.gpu import megatron_util

    return megatron_util


def assert_same_layer(
    util: ModuleType,
    ranks: Ranks,
    dtype: torch.dtype,
    tokens: int,
    after: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Compare layers on ``alltoall`` and ``deepep``: outputs and all gradients of two batches. Returns the latter.

    ``after`` are options set on the validated configuration: those that Megatron-Core refuses here.
    """
    layers = []
    for dispatcher in ("alltoall", "deepep"):
        config = util.configure(dispatcher, dtype, **options)
        for name, value in (after or {}).items():
            setattr(config, name, value)
        layers.append(util.moe_layer(config, ranks.device))
    for seed in (1, 2):
        batch = util.layer_batch(tokens, dtype, ranks.device, seed)
        expected, actual = (util.run_layer(layer, *batch) for layer in layers)
        util.assert_near(actual, expected)
    return layers[1]


def rows_per_expert(util: ModuleType, layer: Any, ranks: Ranks, dtype: torch.dtype) -> list[int]:
    counts: list[int] = []
    hook = layer.experts.register_forward_pre_hook(lambda module, args: counts.extend(args[1].tolist()))
    util.run_layer(layer, *util.layer_batch(16, dtype, ranks.device))
    hook.remove()
    return counts


@BOTH_DTYPES
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"moe_router_topk": 3}, id="top-3"),
        pytest.param(SHARED, id="shared_experts"),
        pytest.param({**SHARED, "moe_shared_expert_overlap": True}, id="shared_expert_overlap"),
        pytest.param({"moe_router_dtype": "fp32"}, id="router_dtype"),
        pytest.param(DROP, id="token_dropping"),
        pytest.param({**DROP, "moe_token_drop_policy": "position"}, id="token_dropping_by_position"),
        pytest.param({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, id="recompute"),
    ],
)
def test_layer(util: ModuleType, ranks: Ranks, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens = 40 + 3 * ranks.rank
    assert_same_layer(util, ranks, dtype, tokens, **{**util.parallel(ep=ranks.size), **options})


@BOTH_DTYPES
def test_padding_to_capacity(util: ModuleType, ranks: Ranks, dtype: torch.dtype) -> None:
    options = {**DROP, "moe_pad_expert_input_to_capacity": True, **util.parallel(ep=ranks.size)}
    layer = assert_same_layer(util, ranks, dtype, 40, **options)
    assert len(set(rows_per_expert(util, layer, ranks, dtype))) == 1


@BOTH_DTYPES
def test_padding_for_quantization(util: ModuleType, ranks: Ranks, dtype: torch.dtype) -> None:
    """FP8 itself needs TransformerEngine; its padding does not."""
    after = {"fp8": "e4m3", "moe_router_padding_for_quantization": True}
    layer = assert_same_layer(util, ranks, dtype, 40, after, **util.parallel(ep=ranks.size))
    assert all(count % 16 == 0 for count in rows_per_expert(util, layer, ranks, dtype))


@BOTH_DTYPES
def test_expert_alignment(util: ModuleType, ranks: Ranks, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_EXPERT_ALIGNMENT", "24")
    layer = assert_same_layer(util, ranks, dtype, 40 - ranks.rank, **util.parallel(ep=ranks.size))
    assert all(count % 24 == 0 for count in rows_per_expert(util, layer, ranks, dtype))


def test_grouped_experts(util: ModuleType, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """One grouped GEMM gives what ``SequentialMLP`` does, from the same initial weights."""
    from deepep_moe import grouped as gemms

    calls = []
    grouped_mm = gemms._grouped_mm
    assert grouped_mm is not None

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(gemms, "_grouped_mm", counted)
    for options in ({}, {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}):
        config = util.configure("deepep", torch.bfloat16, **{**util.parallel(ep=ranks.size), **options})
        sequential = util.moe_layer(config, ranks.device)
        grouped = util.moe_layer(config, ranks.device, grouped_experts=True)
        expected, actual = (util.stack_experts(dict(layer.named_parameters())) for layer in (sequential, grouped))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), f"initial {name}"
        for seed in (1, 2):
            batch = util.layer_batch(40 + ranks.rank, torch.bfloat16, ranks.device, seed)
            util.assert_near(util.run_layer(grouped, *batch), util.run_layer(sequential, *batch))
    if torch.cuda.get_device_capability(ranks.device) >= (9, 0):
        assert len(calls) == 4 * 2 * 3  # layers, GEMMs in each, and the two gradients of each GEMM


def test_layer_in_a_graph(util: ModuleType, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Router, dispatch, experts, combine and their backward captured once, replayed with batches never seen."""
    if torch.cuda.get_device_capability(ranks.device) < (9, 0):
        pytest.skip("needs grouped_mm (compute capability 9.0): one GEMM per expert wants to know its size")
    tokens = 48
    options = {
        **util.parallel(ep=ranks.size),
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
    eager = util.moe_layer(util.configure("alltoall", torch.bfloat16, **options), ranks.device)
    monkeypatch.setenv("DEEPEP_MOE_CAPACITY_FACTOR", str(float(ranks.size)))
    monkeypatch.setenv("DEEPEP_MOE_MAX_TOKENS_PER_RANK", str(tokens * util.BATCH))
    config = util.configure("deepep", torch.bfloat16, **options)
    graphed = util.moe_layer(config, ranks.device, grouped_experts=True)
    x, grad = util.layer_batch(tokens, torch.bfloat16, ranks.device)
    x.requires_grad_()

    def step() -> Tensor:
        x.grad = None
        graphed.zero_grad()
        output, _ = graphed(x)
        output.backward(grad)
        return output.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = step()
    for seed in range(1, 4):
        new_x, new_grad = util.layer_batch(tokens, torch.bfloat16, ranks.device, seed)
        with torch.no_grad():
            x.copy_(new_x)
            grad.copy_(new_grad)
        graph.replay()
        torch.cuda.synchronize()
        graphed.token_dispatcher.dispatcher.backend.check()
        util.assert_near(util.results(graphed, x, output), util.run_layer(eager, new_x, new_grad))


@BOTH_DTYPES
def test_gpt_learns_like_alltoall(util: ModuleType, ranks: Ranks, dtype: torch.dtype) -> None:
    options = {**SHARED, **util.parallel(ep=ranks.size)}
    expected, actual = (
        util.train(util.gpt(util.configure(dispatcher, dtype, **options), ranks.device), 20, ranks.device)
        for dispatcher in ("alltoall", "deepep")
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for step, (got, want) in enumerate(zip(actual, expected)):
        assert abs(got - want) <= tolerance * want, f"step {step}: {got} instead of {want}"
    assert actual[-1] < 0.8 * actual[0]


@pytest.mark.parametrize("shared", [{}, SHARED], ids=["", "shared_experts"])
def test_overlapped_micro_batches(util: ModuleType, ranks: Ranks, shared: dict[str, Any]) -> None:
    """Megatron's 1F1B schedule: dispatch and combine of a batch on one stream, computation of another beside them."""
    if ranks.size == 1:
        pytest.skip("needs two ranks: Megatron overlaps expert-parallel communication only")
    options = {**util.parallel(ep=ranks.size), **shared}
    batches = [util.gpt_batch(step, ranks.device) for step in range(6)]
    in_turn = util.gpt(util.configure("alltoall", torch.float32, **options), ranks.device)
    config = util.configure("deepep", torch.float32, **options)
    config.overlap_moe_expert_parallel_comm = True  # Megatron-Core allows it for BF16; FP32 shows errors better
    overlapped = util.gpt(config, ranks.device)
    let_experts_lag(overlapped)
    util.assert_near(util.run_overlapped(overlapped, batches), util.run_in_turn(in_turn, batches))


@BOTH_DTYPES
@pytest.mark.parametrize("shared", [{}, SHARED], ids=["", "shared_experts"])
def test_overlapped_micro_batches_in_capacity_mode(
    util: ModuleType, ranks: Ranks, shared: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same schedule with outputs of a fixed size, whose counts only the device knows.

    FP32 is compared with ``alltoall``; BF16, where one grouped GEMM reads the counts, with exact sizes: ``alltoall``
    rounds elsewhere, and a router behind it may choose another expert.
    """
    if ranks.size == 1:
        pytest.skip("needs two ranks: Megatron overlaps expert-parallel communication only")
    options = {**util.parallel(ep=ranks.size), **shared}
    batches = [util.gpt_batch(step, ranks.device) for step in range(6)]
    reference = "alltoall" if dtype == torch.float32 else "deepep"
    in_turn = util.gpt(util.configure(reference, dtype, **options), ranks.device, grouped_experts=True)
    monkeypatch.setenv("DEEPEP_MOE_CAPACITY_FACTOR", str(float(ranks.size)))  # room for all tokens on one rank
    config = util.configure("deepep", dtype, **options)
    config.overlap_moe_expert_parallel_comm = True
    overlapped = util.gpt(config, ranks.device, grouped_experts=True)
    let_experts_lag(overlapped)
    rows: list[int] = []
    for layer in overlapped.decoder.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    util.assert_near(util.run_overlapped(overlapped, batches), util.run_in_turn(in_turn, batches))
    torch.cuda.synchronize()
    for layer in overlapped.decoder.layers:
        layer.mlp.token_dispatcher.dispatcher.backend.check()  # nothing overflowed
    tokens = batches[0][0].numel()
    assert rows == [ranks.size * tokens * util.TOPK] * len(batches) * len(overlapped.decoder.layers)


@BOTH_DTYPES
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({**SHARED, "moe_shared_expert_overlap": True}, id="shared_expert_overlap"),
        pytest.param({**DROP, "moe_pad_expert_input_to_capacity": True}, id="padding_to_capacity"),
    ],
)
def test_layer_in_capacity_mode(
    util: ModuleType, ranks: Ranks, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of a fixed size against exact sizes."""
    config = util.configure("deepep", dtype, **util.parallel(ep=ranks.size), **options)
    exact = util.moe_layer(config, ranks.device, grouped_experts=True)
    monkeypatch.setenv("DEEPEP_MOE_CAPACITY_FACTOR", str(float(ranks.size)))
    fixed = util.moe_layer(config, ranks.device, grouped_experts=True)
    for seed in (1, 2):
        batch = util.layer_batch(40, dtype, ranks.device, seed)
        util.assert_near(util.run_layer(fixed, *batch), util.run_layer(exact, *batch))
    torch.cuda.synchronize()
    fixed.token_dispatcher.dispatcher.backend.check()  # nothing overflowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(util: ModuleType, ranks: Ranks, dtype: torch.dtype, inside: bool) -> None:
    """Grouped experts compute what ``SequentialMLP`` does on ``alltoall``. The router's fp64 is left alone."""
    options = {**util.parallel(ep=ranks.size), **SHARED, "moe_router_dtype": "fp64"}
    found = []
    for kind, grouped in (("alltoall", False), ("deepep", True), ("deepep", False)):
        layer = util.moe_layer(util.configure(kind, torch.float32, **options), ranks.device, grouped_experts=grouped)
        x, grad = util.layer_batch(40 + ranks.rank, torch.float32, ranks.device)
        x.requires_grad_()
        with torch.autocast("cuda", dtype):
            output, _ = layer(x)
        assert output.dtype == dtype
        with torch.autocast("cuda", dtype, enabled=inside):
            output.backward(grad.to(dtype))
        found.append(util.results(layer, x, output))
    for actual in found[1:]:
        assert actual.keys() == found[0].keys()
        for name, wanted in found[0].items():
            assert actual[name].dtype == wanted.dtype, name
            error = (actual[name].float() - wanted.float()).norm() / wanted.float().norm()
            assert error < (2e-2 if dtype == torch.bfloat16 else 4e-3), f"{name}: relative error {error:g}"


@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
def test_copies_have_weights_of_their_own(util: ModuleType, ranks: Ranks, grouped: bool) -> None:
    """CUDA streams, process groups and the dispatcher are shared."""
    options = {**util.parallel(ep=ranks.size), **SHARED, "moe_shared_expert_overlap": True}
    layer = util.moe_layer(util.configure("deepep", torch.bfloat16, **options), ranks.device, grouped_experts=grouped)
    batch = util.layer_batch(40, torch.bfloat16, ranks.device)
    expected = util.run_layer(layer, *batch)
    copied = copy.deepcopy(layer)
    assert copied.token_dispatcher.dispatcher is layer.token_dispatcher.dispatcher
    assert copied.shared_experts.stream is layer.shared_experts.stream
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    util.assert_near(util.run_layer(copied, *batch), expected)


@pytest.mark.parametrize("place", ["router", "experts", "routing map"])
def test_errors_of_one_rank_are_told_to_all(util: ModuleType, ranks: Ranks, place: str) -> None:
    if ranks.size == 1:
        pytest.skip("needs a rank to tell")
    layer = util.moe_layer(util.configure("deepep", torch.bfloat16, **util.parallel(ep=ranks.size)), ranks.device)
    batch = util.layer_batch(40, torch.bfloat16, ranks.device)
    expected = util.run_layer(layer, *batch)
    wrong = ranks.rank == 1

    def fail(module: Any, args: Any, output: Any) -> Any:
        if place == "routing map":
            return output[0], output[1].int()
        raise ValueError("not today")

    def forward() -> None:
        layer(batch[0])
        torch.cuda.synchronize()
        layer.token_dispatcher.dispatcher.backend.check()

    handle = (
        getattr(layer, "experts" if place == "experts" else "router").register_forward_hook(fail) if wrong else None
    )
    started = time.monotonic()
    error = PeerError if not wrong else InputError if place == "routing map" else ValueError
    with pytest.raises(error):
        forward()
    assert time.monotonic() - started < TIMEOUT_SECONDS / 2
    if handle is not None:
        handle.remove()
    util.assert_near(util.run_layer(layer, *batch), expected)


def let_experts_lag(model: Any) -> None:
    """Experts run late in forward and backward: whoever does not wait for them is found out."""
    for layer in model.decoder.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: lag())
        layer.mlp.experts.register_forward_hook(lambda module, args, out: lag_in_backward(out[0]))


def lag() -> None:
    """About a millisecond behind: a stream that does not wait for this one is found out."""
    torch.cuda._sleep(2_000_000)


def lag_in_backward(output: Tensor) -> None:
    output.register_hook(lambda grad: lag())


# Last: another layout makes new process groups, and groups are kept while the layout stays.
@BOTH_DTYPES
def test_expert_tensor_parallel(util: ModuleType, ranks: Ranks, dtype: torch.dtype) -> None:
    if ranks.size % 2:
        pytest.skip("needs an even number of ranks: each expert is cut in two")
    layout = util.parallel(tp=2, ep=ranks.size // 2, etp=2)
    assert_same_layer(util, ranks, dtype, 40, **layout)
    assert_same_layer(util, ranks, dtype, 40, **SHARED, moe_shared_expert_overlap=True, **layout)
