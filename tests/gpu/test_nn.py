"""deepep_moe.nn on GPUs against the same layer on CPUs: eager, compiled by Inductor, checkpointed, without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.nn import (
    GroupedExperts,
    MoELayer,
    TopKRouter,
    average_expert_gradients,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_experts,
    prepare_ddp,
)
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks

HIDDEN, FFN, LOCAL_EXPERTS, TOPK, TOKENS = 256, 128, 4, 3, 96


def build(
    ranks: Ranks, device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup | None = None, **settings: Any
) -> MoELayer:
    config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms, **settings)
    dispatcher = TokenDispatcher(group or ranks.group, LOCAL_EXPERTS * ranks.size, config, device=device)
    torch.manual_seed(0)
    layer = MoELayer(
        dispatcher,
        TopKRouter(HIDDEN, dispatcher.num_experts, TOPK, device="cpu", dtype=torch.float32),
        GroupedExperts(dispatcher.local_experts, HIDDEN, FFN, device="cpu", dtype=torch.float32),
        nn.Linear(HIDDEN, HIDDEN, device="cpu", dtype=torch.float32),
    )
    layer.experts.to(device, dtype)
    layer.shared_expert.to(device, dtype)
    layer.router.to(device)  # in fp32 on both, so that both choose the same experts
    return layer


def run(layer: MoELayer, ranks: Ranks, forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(ranks.rank)
    tokens = torch.randn(TOKENS - 5 * ranks.rank, HIDDEN, generator=generator, dtype=torch.float32, device="cpu")
    x = tokens.bfloat16().to(layer.dispatcher.backend.device, dtype).requires_grad_()
    layer.zero_grad()
    out = forward(x)
    out.float().square().mean().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, exact in wanted.items():
        error = (got[name].cpu().float() - exact).norm() / exact.norm()
        assert error < 0.02, f"{name}: relative error {error}"


@pytest.mark.parametrize("backend", ["auto", "collective"])
@pytest.mark.parametrize("mode", ["eager", "checkpointed", "compiled", "recomputed", "capacity", "aligned"])
def test_layer(ranks: Ranks, backend: str, mode: str) -> None:
    if backend == "collective" and ranks.size > torch.cuda.device_count():
        pytest.skip("NCCL needs a GPU for each rank")
    exact = build(ranks, torch.device("cpu"), torch.float32, backend="collective")
    wanted = run(exact, ranks, exact, torch.float32)
    settings = {
        "capacity": {"capacity_factor": 2.0 * ranks.size, "max_tokens_per_rank": TOKENS},
        "aligned": {"expert_alignment": 16},
    }.get(mode, {})
    layer = build(ranks, ranks.device, torch.bfloat16, backend=backend, **settings)
    layer.experts.recompute_activation = mode == "recomputed"
    forward: Callable[[Tensor], Tensor] = layer
    if mode == "checkpointed":
        forward = lambda x: checkpoint(layer, x, use_reentrant=False)  # noqa: E731
    elif mode == "compiled":
        forward = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        got = run(layer, ranks, forward, torch.bfloat16)
        assert got["out"].dtype == torch.bfloat16
        assert_near(got, wanted)
    layer.dispatcher.backend.check()


def test_capacity_mode_never_waits_for_the_host(ranks: Ranks) -> None:
    layer = build(ranks, ranks.device, torch.bfloat16, capacity_factor=2.0 * ranks.size, max_tokens_per_rank=TOKENS)
    run(layer, ranks, layer, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
        x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.bfloat16, device=ranks.device)
        layer(x).float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layer.dispatcher.backend.check()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 with replicas", "fsdp2 that ignores experts"])
def test_data_parallelism(ranks: Ranks, wrapper: str) -> None:
    """Gradients of the mean over the ranks' losses."""
    if ranks.size > torch.cuda.device_count():
        pytest.skip("NCCL needs a GPU for each rank")
    exact = build(ranks, torch.device("cpu"), torch.float32, backend="collective")
    wanted = run(exact, ranks, exact, torch.float32)
    for name, p in exact.named_parameters():
        if not name.startswith("experts."):
            dist.all_reduce(p.grad, group=ranks.group)
        wanted[name] = p.grad / ranks.size
    wanted.pop("out"), wanted.pop("x")

    spread = 1 if wrapper == "fsdp2 with replicas" else ranks.size
    mesh = init_device_mesh(ranks.device.type, (ranks.size // spread, spread), mesh_dim_names=("replicas", "experts"))
    layer = build(ranks, ranks.device, torch.float32, group=mesh["experts"].get_group())
    net: nn.Module = layer
    if wrapper == "ddp":
        net = DDP(prepare_ddp(layer))
    elif wrapper == "fsdp2 that ignores experts":
        average_expert_gradients(layer)
        fully_shard(layer, ignored_params=set(expert_parameters(layer)))
    else:
        fully_shard(fully_shard_experts(layer, mesh["replicas"]))
    run(layer, ranks, net, torch.float32)
    first = ranks.rank * LOCAL_EXPERTS
    for name, p in layer.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        if name.startswith("experts.") and spread == 1:
            grad = grad[first : first + LOCAL_EXPERTS]
        assert_near({name: grad}, {name: wanted[name]})


def test_clipping(ranks: Ranks) -> None:
    if ranks.size > torch.cuda.device_count():
        pytest.skip("NCCL needs a GPU for each rank")
    layer = build(ranks, ranks.device, torch.bfloat16)
    run(layer, ranks, layer, torch.bfloat16)
    for p in (*layer.router.parameters(), *layer.shared_expert.parameters()):
        dist.all_reduce(p.grad, group=ranks.group)
    norm = clip_grad_norm_(layer, 1e-3)
    norms = [torch.zeros_like(norm) for _ in range(ranks.size)]
    dist.all_gather(norms, norm, group=ranks.group)
    assert all(torch.equal(other, norm) for other in norms)
    torch.testing.assert_close(clip_grad_norm_(layer, 1e9), norm.new_tensor(1e-3), atol=0, rtol=0.02)
