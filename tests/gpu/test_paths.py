"""What users call, on GPUs: Buffer programs, the dispatcher with autograd, capacity mode in a CUDA graph, overlap.

The same calls on the CPU (a gloo group) are the reference.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepep_moe import Buffer, EventOverlap
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from deepep_moe.overlap import Overlap
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks

HIDDEN, TOPK, LOCAL_EXPERTS = 256, 3, 4


def batch(ranks: Ranks, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H] bf16, routes [T, K] with some dropped, weights [T, K]; this rank's own, on the CPU."""
    generator = torch.Generator().manual_seed(seed * 100 + ranks.rank)
    experts = LOCAL_EXPERTS * ranks.size
    routes = torch.rand((tokens, experts), generator=generator).topk(TOPK, dim=1).indices
    routes[torch.rand(routes.shape, generator=generator) < 0.1] = -1
    x = torch.randn((tokens, HIDDEN), generator=generator).bfloat16()
    return x, routes, torch.rand(routes.shape, generator=generator)


def settings(ranks: Ranks, **more: object) -> DispatcherConfig:
    return DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms, **more)  # type: ignore[arg-type]


def make_dispatcher(ranks: Ranks, **more: object) -> TokenDispatcher:
    made = TokenDispatcher(ranks.group, LOCAL_EXPERTS * ranks.size, settings(ranks, **more), device=ranks.device)
    assert made.backend.name == "nvlink"
    return made


@pytest.fixture(scope="module")
def cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


@pytest.fixture(autouse=True)
def few_sms(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
    monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))


Program = Callable[[Buffer, torch.device], list[Tensor]]


def run_both(ranks: Ranks, cpu_group: dist.ProcessGroup, program: Program) -> None:
    """Run a DeepEP program on the GPU and on the CPU; all tensors it returns must be equal."""
    buffer, wanted_buffer = Buffer(ranks.group), Buffer(cpu_group)
    got = program(buffer, ranks.device)
    torch.cuda.synchronize()
    for i, (g, w) in enumerate(zip(got, program(wanted_buffer, torch.device("cpu")), strict=True)):
        assert g.dtype == w.dtype and torch.equal(g.cpu(), w), f"result {i}: {g} is not {w}"
    buffer.destroy()
    wanted_buffer.destroy()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_buffer_program(ranks: Ranks, cpu_group: dist.ProcessGroup, asynchronous: bool) -> None:
    def program(buffer: Buffer, device: torch.device) -> list[Tensor]:
        x, routes, weights = (t.to(device) for t in batch(ranks, 200 + 10 * ranks.rank))
        experts = LOCAL_EXPERTS * ranks.size
        options = {"async_finish": asynchronous, "allocate_on_comm_stream": asynchronous}

        def previous() -> EventOverlap | None:
            return Buffer.capture() if asynchronous else None

        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            routes, experts, previous_event=previous(), **options
        )
        recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=routes,
            topk_weights=weights,
            expert_alignment=8,
            previous_event=event if asynchronous else None,
            **options,
        )
        if asynchronous:
            event.current_stream_wait()
        again, *_, event = buffer.dispatch(x, handle=handle, previous_event=previous(), **options)
        back, back_weights, event = buffer.combine(
            recv_x, handle, topk_weights=recv_weights, bias=x, previous_event=previous(), **options
        )
        if asynchronous:
            event.current_stream_wait()
        assert recv_idx is not None and recv_weights is not None and back_weights is not None
        assert counts is not None and all(count % 8 == 0 for count in counts)
        results = [per_rank, per_expert, in_rank, recv_x, recv_idx, recv_weights, again, back, back_weights]
        return [*results, torch.tensor(counts), handle[0], handle[3]]

    run_both(ranks, cpu_group, program)


def test_buffer_with_fp8_and_worst_case(ranks: Ranks, cpu_group: dist.ProcessGroup) -> None:
    worst = 150 * ranks.size

    def program(buffer: Buffer, device: torch.device) -> list[Tensor]:
        x, routes, weights = batch(ranks, 150)
        scales = torch.rand((150, HIDDEN // 128), generator=torch.Generator().manual_seed(ranks.rank)).to(device)
        routes, fp8 = routes.to(device), x.to(torch.float8_e4m3fn).to(device)
        *_, per_expert, in_rank, _ = buffer.get_dispatch_layout(routes, LOCAL_EXPERTS * ranks.size)
        (recv_x, recv_scales), recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            (fp8, scales),
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=routes,
            topk_weights=weights.to(device),
            num_worst_tokens=worst,
        )
        assert counts == [] and len(recv_x) == worst and handle is not None and recv_idx is not None
        rows = int(handle[0][-1, ranks.rank])
        assert (recv_idx[rows:] == -1).all()
        back, _, _ = buffer.combine(recv_x.to(torch.bfloat16), handle)
        return [recv_x[:rows].view(torch.uint8), recv_scales[:rows], recv_idx, recv_weights[:rows], back]

    run_both(ranks, cpu_group, program)


def layer(dispatcher: TokenDispatcher, x: Tensor, routes: Tensor, weights: Tensor) -> Tensor:
    dispatched = dispatcher.dispatch(x, routes, weights)
    return dispatcher.combine(torch.tanh(dispatched.rows), dispatched, weights=dispatched.weights)


class Watching(TorchDispatchMode):
    """Changes nothing, but makes every call go through PyTorch's operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["plain", "recomputed", "watched", "compiled"])
def test_gradients(ranks: Ranks, cpu_group: dist.ProcessGroup, way: str) -> None:
    wanted_dispatcher = TokenDispatcher(
        cpu_group, LOCAL_EXPERTS * ranks.size, settings(ranks), device=torch.device("cpu")
    )
    results = []
    for dispatcher in (make_dispatcher(ranks, expert_alignment=16), wanted_dispatcher):
        x, routes, weights = (t.to(dispatcher.backend.device) for t in batch(ranks, 300 - 20 * ranks.rank))
        x, weights = x.float().requires_grad_(), weights.requires_grad_()
        if way == "recomputed":
            out = checkpoint(layer, dispatcher, x, routes, weights, use_reentrant=False)
        elif way == "compiled":
            out = torch.compile(partial(layer, dispatcher), fullgraph=True, backend="aot_eager")(x, routes, weights)
        else:
            with Watching() if way == "watched" else nullcontext():
                out = layer(dispatcher, x, routes, weights)
        (out * torch.linspace(-1, 1, HIDDEN, device=out.device)).sum().backward()
        results.append([out.detach().cpu(), x.grad.cpu(), weights.grad.cpu()])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_ranks_share_a_backend_only_if_all_still_have_it(ranks: Ranks, cpu_group: dist.ProcessGroup) -> None:
    """When the garbage collector ends a dispatcher differs between ranks; what they use next must not."""
    x, routes, weights = batch(ranks, 64)
    wanted = layer(TokenDispatcher(cpu_group, LOCAL_EXPERTS * ranks.size, settings(ranks)), x, routes, weights)
    kept = []
    for number in range(3):
        dispatcher = make_dispatcher(ranks, max_tokens_per_rank=64)
        got = layer(dispatcher, *(t.to(ranks.device) for t in (x, routes, weights)))
        torch.testing.assert_close(got.cpu(), wanted, rtol=2e-2, atol=2e-2)
        if number == ranks.rank:
            kept.append(dispatcher)
        del dispatcher
        gc.collect()


def test_fp8_dispatch_is_close(ranks: Ranks) -> None:
    x, routes, weights = (t.to(ranks.device) for t in batch(ranks, 300))
    exact = layer(make_dispatcher(ranks), x, routes, weights)
    rough = layer(make_dispatcher(ranks, fp8_dispatch=True, fp8_dispatch_grad=True), x, routes, weights)
    error = (rough.float() - exact.float()).norm() / exact.float().norm()
    assert 0 < error < 0.05
    # What crosses is rounded, and nothing else is: as if the tokens had been rounded beforehand.
    rounded = dequantize_e4m3(*quantize_e4m3(x), x.dtype)
    assert torch.equal(rough, layer(make_dispatcher(ranks), rounded, routes, weights))


def test_layer_in_a_graph_with_other_routing(ranks: Ranks) -> None:
    """Forward and backward captured once, replayed with batches it has never seen, equal to eager."""
    tokens = 128
    graphed = make_dispatcher(ranks, capacity_factor=float(ranks.size), max_tokens_per_rank=tokens)
    eager = make_dispatcher(ranks)
    x, routes, weights = (t.to(ranks.device) for t in batch(ranks, tokens))
    x, weights = x.requires_grad_(), weights.requires_grad_()
    loss_weights = torch.randn((tokens, HIDDEN), device=ranks.device)

    def step(dispatcher: TokenDispatcher) -> Tensor:
        out = layer(dispatcher, x, routes, weights)
        (out.float() * loss_weights).sum().backward()
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(graphed)
    stream.synchronize()
    x.grad = weights.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = step(graphed)
    captured = [out, x.grad, weights.grad]
    for seed in range(1, 4):
        new_x, new_routes, new_weights = batch(ranks, tokens, seed)
        with torch.no_grad():
            for old, new in ((x, new_x), (routes, new_routes), (weights, new_weights)):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.detach().clone() for t in captured if t is not None]
        graphed.backend.check()
        x.grad = weights.grad = None
        out = step(eager)
        for g, w in zip(got, [out.detach(), x.grad, weights.grad], strict=True):
            torch.testing.assert_close(g, w)


def test_overlap_changes_nothing(ranks: Ranks) -> None:
    x, routes, weights = (t.to(ranks.device) for t in batch(ranks, 400))
    whole, chunked = make_dispatcher(ranks), make_dispatcher(ranks, num_chunks=4)
    results = []
    for run in ("whole", "begin", "pipeline"):
        leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        if run == "whole":
            out = layer(whole, leaf, routes, leaf_weights)
        elif run == "begin":
            overlap = Overlap(whole)
            sent = overlap.begin_dispatch(leaf, routes, leaf_weights)
            torch.ones(1000, 1000, device=ranks.device) @ torch.ones(1000, 1000, device=ranks.device)
            dispatched = sent.wait()
            out = overlap.begin_combine(torch.tanh(dispatched.rows), dispatched, weights=dispatched.weights).wait()
        else:

            def experts(arrived: Dispatched) -> Tensor:
                return torch.tanh(arrived.rows)

            out = Overlap(chunked).pipeline(experts, leaf, routes, leaf_weights)
        out.float().square().sum().backward()
        results.append([out.detach(), leaf.grad, leaf_weights.grad])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted)
