"""``benchmarks deepspeed``: DeepSpeed's two kinds of MoE layer as they are, and on this library.

Candidates and clocks are those of candidates.py. No engine is made: a layer runs alone, on expert-parallel groups
that DeepSpeed makes from the ranks of this run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.candidates import Candidate, Step, by_budget, measure, with_settings
from benchmarks.megatron_layer import SEED, Layer, layer_step
from benchmarks.report import Table
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import UnsupportedError
from deepep_moe.tools.world import World

STOCK = "DeepSpeed"

_MEMORY = (
    "Memory on the row of the total: peak in PyTorch's allocator with weights, gradients and activations, and what was "
    "taken outside of it (staging, NCCL's buffers, loaded kernels) first by this candidate."
)
NOTES = [
    "deepspeed.moe.layer.MoE with drop_tokens=False: gate, dispatch, experts and combine, forward and backward with "
    "weight gradients, without an engine. Experts are two linear layers without bias and a GELU between them. "
    f"{STOCK} pads every expert to the busiest one's tokens and loops over the experts; deepep is the same layer after "
    "deepep_moe.integrations.deepspeed.convert, which computes a linear layer of all experts in one call. Weights and "
    "input are the same.",
    _MEMORY,
]
AUTOEP_NOTES = [
    "AutoEP's layer, which takes the place of a Hugging Face MoE block: router, dispatch, gated experts and combine, "
    "forward and backward with weight gradients, without an engine. comm is AutoEP's own backend, torch.distributed's "
    "all-to-all; deepep is its DeepEP backend on deepep_moe.ElasticBuffer. All else is AutoEP's in both, its defaults "
    "too. Weights and input are the same.",
    _MEMORY,
]


def layer_table(
    world: World, layer: Layer, tokens: int, budgets: list[int], repeats: int, done: Callable[[str], None]
) -> Table:
    """One layer: stock, and converted, per SM budget. Call :func:`start` before."""
    case = {**layer._asdict(), "tokens": tokens, "ranks": world.size, "dtype": str(_dtype(world)).partition(".")[2]}
    title = f"DeepSpeed MoE: {layer}, {case['dtype']}, {tokens} tokens per rank, {world.size} ranks"
    candidates = [Candidate(STOCK, _layer_builder(world, layer, tokens, ours=False))]
    for label, budget in by_budget(world, budgets):
        build = _layer_builder(world, layer, tokens, ours=True)
        candidates.append(Candidate(f"deepep, {label}", with_settings(build, num_sms=budget)))
    return measure(world, Table(title, case, list(NOTES)), candidates, repeats, done)


def autoep_table(
    world: World, layer: Layer, tokens: int, budgets: list[int], repeats: int, done: Callable[[str], None]
) -> Table:
    """One AutoEP layer: its own backend, and ours per SM budget. Call :func:`start` before."""
    case = {**layer._asdict(), "tokens": tokens, "ranks": world.size, "dtype": "bfloat16"}
    title = f"DeepSpeed AutoEP: {layer}, bfloat16, {tokens} tokens per rank, {world.size} ranks"
    candidates = [Candidate("comm", _autoep_builder(world, layer, tokens, ours=False))]
    for label, budget in by_budget(world, budgets):
        build = _autoep_builder(world, layer, tokens, ours=True)
        candidates.append(Candidate(f"deepep, {label}", with_settings(build, num_sms=budget)))
    return measure(world, Table(title, case, list(AUTOEP_NOTES)), candidates, repeats, done)


def start(world: World) -> None:
    """Import the plugin, and let DeepSpeed work on the ranks of this run. Collective.

    Raises:
        UnsupportedError: DeepSpeed is not installed or of another version, or has no all-to-all on these ranks.
    """
    if not world.can_all_to_all:
        raise UnsupportedError("DeepSpeed cannot be timed: its all-to-all needs a GPU for every rank")
    importlib.import_module("deepep_moe.integrations.deepspeed")
    import deepspeed

    # Else DeepSpeed compiles this operator on a CPU, under a lock that a killed build leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed()  # takes over the process group that is there


def _layer_builder(world: World, shape: Layer, tokens: int, ours: bool) -> Callable[[], Step]:
    def build() -> Step:
        layer = moe_layer(world, shape, ours)
        return layer_step(world, layer, lambda x: layer(x)[0], (tokens, shape.hidden), _dtype(world))

    return build


def _autoep_builder(world: World, shape: Layer, tokens: int, ours: bool) -> Callable[[], Step]:
    def build() -> Step:
        layer = autoep_layer(world, shape, tokens, ours)
        return layer_step(world, layer, layer, (1, tokens, shape.hidden), torch.bfloat16)

    return build


def moe_layer(world: World, shape: Layer, ours: bool) -> Any:
    """An ``MoE`` over all ranks, its weights the same whether converted or not. Collective."""
    from deepspeed.moe.layer import MoE

    from deepep_moe.integrations.deepspeed import convert

    torch.manual_seed(SEED)  # the gate is the same on all ranks
    kind = {"device": world.device, "dtype": _dtype(world)}
    expert = nn.Sequential(
        nn.Linear(shape.hidden, shape.ffn, bias=False, **kind),
        nn.GELU(),
        nn.Linear(shape.ffn, shape.hidden, bias=False, **kind),
    )
    layer = MoE(
        shape.hidden,
        expert,
        shape.experts,
        ep_size=world.size,
        k=shape.topk,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).to(**kind)
    torch.manual_seed(SEED + 1 + world.rank)  # the experts, until now copies of one, all differ
    for module in layer.deepspeed_moe.experts.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that it makes a group
        layer.set_deepspeed_parallelism()
    return convert(layer) if ours else layer


def autoep_layer(world: World, shape: Layer, tokens: int, ours: bool) -> Any:
    """An ``AutoEPMoELayer`` over all ranks, its weights the same with both backends. Collective."""
    from deepspeed.module_inject import auto_ep_comm, auto_ep_layer
    from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec

    from deepep_moe.integrations.deepspeed import auto_ep

    torch.manual_seed(SEED)
    kind: dict[str, Any] = {"device": world.device, "dtype": torch.bfloat16}
    block = nn.Module()  # stands in for the block of a Hugging Face model, with the experts of all ranks
    block.gate = nn.Linear(shape.hidden, shape.experts, bias=False, **kind)
    block.experts = nn.Module()
    for name, (rows, columns) in {
        "gate_up_proj": (2 * shape.ffn, shape.hidden),
        "down_proj": (shape.hidden, shape.ffn),
    }.items():
        weight = torch.randn(shape.experts, rows, columns, **kind).mul_(columns**-0.5)
        block.experts.register_parameter(name, nn.Parameter(weight))
    spec = MoELayerSpec(
        moe_module_name="block",
        model_family="qwen3_moe",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.experts,
        top_k=shape.topk,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    config = AutoEPConfig(
        enabled=True,
        autoep_size=world.size,
        use_grouped_mm=world.on_gpu,
        comm_backend="deepep" if ours else "comm",
        comm_max_tokens_per_rank=tokens,
    )
    layer = auto_ep_layer.AutoEPMoELayer(spec, block, world.size, world.rank, config).to(world.device)
    with contextlib.redirect_stdout(io.StringIO()):
        layer.set_deepspeed_parallelism()
    if ours and world.size > 1:
        auto_ep.install(DispatcherConfig.load())
        # By itself the layer does this in its first forward, after a barrier that only NCCL takes.
        layer._deepep_exchange = auto_ep_comm.shared_exchange(
            scope=layer.deepep_scope,
            ep_group=layer.ep_group,
            num_experts=shape.experts,
            top_k=shape.topk,
            hidden_size=shape.hidden,
            num_max_tokens_per_rank=tokens,
            num_sms=layer.comm_num_sm,
            qp_margin=layer.comm_qp_margin,
        )
        weakref.finalize(layer, layer._deepep_exchange.release).atexit = False
    return layer


def _dtype(world: World) -> torch.dtype:
    return torch.bfloat16 if world.on_gpu else torch.float32
