"""``bench deepspeed``: DeepSpeed's native MoE layer as it is, and converted by our plugin.

Contenders and clocks are those of bench_megatron.py. No engine is made: the layer runs alone, on expert-parallel groups
that DeepSpeed makes from the ranks of this run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepep_moe.errors import UnsupportedError
from deepep_moe.tools.bench_megatron import SEED, Contender, Layer, Step, by_budget, measure, with_budget
from deepep_moe.tools.bench_report import Table
from deepep_moe.tools.bench_timing import Phases, World

STOCK = "DeepSpeed"

NOTES = [
    "deepspeed.moe.layer.MoE with drop_tokens=False: gate, dispatch, experts and combine, forward and backward with "
    "weight gradients, without an engine. Experts are two linear layers without bias and a GELU between them. "
    f"{STOCK} pads every expert to the busiest one's tokens and loops over the experts; deepep is the same layer after "
    "deepep_moe.integrations.deepspeed.convert, which on GPUs of compute capability 9.0 or newer also runs the experts "
    "as one grouped GEMM per linear layer. Weights and input are the same.",
    "Memory on the row of the total: peak in PyTorch's allocator with weights, gradients and activations, and what was "
    "taken outside of it (staging, NCCL's buffers, loaded kernels) first by this contender.",
]


def layer_table(
    world: World, layer: Layer, tokens: int, budgets: list[int], repeats: int, done: Callable[[str], None]
) -> Table:
    """One layer: stock, and converted, per SM budget. Call :func:`start` before."""
    case = {**layer._asdict(), "tokens": tokens, "ranks": world.size, "dtype": str(_dtype(world)).partition(".")[2]}
    title = f"DeepSpeed MoE: {layer}, {case['dtype']}, {tokens} tokens per rank, {world.size} ranks"
    contenders = [Contender(STOCK, _layer_builder(world, layer, tokens, ours=False))]
    for label, budget in by_budget(world, budgets):
        build = _layer_builder(world, layer, tokens, ours=True)
        contenders.append(Contender(f"deepep, {label}", with_budget(budget, build)))
    return measure(world, Table(title, case, list(NOTES)), contenders, repeats, done)


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
        generator = torch.Generator().manual_seed(world.rank)
        inputs = (torch.randn(tokens, shape.hidden, generator=generator) for _ in range(2))
        x, grad = (tensor.to(world.device, _dtype(world)) for tensor in inputs)
        x.requires_grad_()

        def step(phase: Phases) -> Tensor:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            output: Tensor = layer(x)[0]
            phase("forward")
            output.backward(grad)
            phase("backward")
            return output

        return step

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


def _dtype(world: World) -> torch.dtype:
    return torch.bfloat16 if world.on_gpu else torch.float32
