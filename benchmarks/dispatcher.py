"""``benchmarks dispatcher``: tokens to expert rows and back, beside Megatron-Core's own ``alltoall`` dispatcher.

What candidates have in common is in candidates.py. Each runs from an idle GPU and, where there is one, also behind
other work of the GPU: in a training step attention and router still run when the host comes to the dispatch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import peers
from benchmarks.candidates import Candidate, Step, by_budget, measure, with_settings
from benchmarks.megatron_layer import megatron_missing, megatron_modules, transformer_config
from benchmarks.ops import Shape, routing
from benchmarks.report import Table
from benchmarks.timing import Phases
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.row_scaling import scale_rows
from deepep_moe.tools.world import World

CAPACITY_FACTOR = 1.25  # of the capacity mode, at least; more where few tokens make an uneven load

NOTES = [
    "Uncached, bf16. dispatch: tokens to the rows of the local experts; experts: rows times their routing weights, "
    "nothing else, with deepep_moe.scale_rows for all candidates alike; combine: rows to tokens; backward: of all "
    "three. TokenDispatcher starts from top-k indices, Megatron's dispatchers from the router's map and "
    "probabilities.",
    "Memory on the row of the total: peak in PyTorch's allocator, inputs included, and what was taken outside of it "
    "(staging, NCCL's buffers, loaded kernels) first by this candidate.",
]
BUSY_NOTE = (
    "Median, min and max: each step starts from an idle GPU, so dispatch holds all that the host does before its first "
    "kernel. GPU busy before: the clock starts when the GPU ends a millisecond of other work, in which the host begins "
    "the step, as attention and router let it in training; of the host's time only what the GPU waits for is left."
)


def candidates(world: World, shape: Shape, budgets: list[int]) -> list[Candidate]:
    """Megatron-Core's alltoall and flex, our dispatcher inside Megatron and alone, per SM budget. Collective.

    Those of Megatron-Core only where it is installed, flex only where DeepEP is too.
    """
    found = []
    settings = by_budget(world, budgets)
    if megatron_missing(world) is None:
        found.append(Candidate("Megatron alltoall", lambda: megatron_dispatcher(world, shape, "alltoall")))
        for mode, factor in (("", 0.0), ("capacity mode, ", capacity_factor(shape, world.size))):
            for label, budget in settings:
                build = with_settings(
                    lambda: megatron_dispatcher(world, shape, "deepep"), num_sms=budget, capacity_factor=factor
                )
                found.append(Candidate(f"Megatron deepep, {mode}{label}", build))
        if peers.missing(world) is None:
            name = f"Megatron flex, deep_ep {peers.version()}"
            found.append(Candidate(name, lambda: megatron_dispatcher(world, shape, "flex")))
    for label, budget in settings:
        build = with_settings(lambda: token_dispatcher(world, shape), num_sms=budget)
        found.append(Candidate(f"TokenDispatcher, {label}", build))
    return found


def capacity_factor(shape: Shape, ranks: int) -> float:
    """:data:`CAPACITY_FACTOR`, or what the busiest rank needs, rounded up to quarters."""
    owners = torch.cat([routing(shape, rank, imbalanced=False).flatten() for rank in range(ranks)])
    loads = (owners // (shape.experts // ranks)).bincount(minlength=ranks)
    return max(CAPACITY_FACTOR, math.ceil(4 * int(loads.max()) / (shape.tokens * shape.topk)) / 4)


def dispatcher_table(
    world: World, shape: Shape, candidates: list[Candidate], repeats: int, done: Callable[[str], None]
) -> Table:
    """The phases of ``candidates`` on one shape. Collective."""
    title = f"Dispatchers: {shape}, {world.size} ranks"
    table = Table(title, {**shape._asdict(), "ranks": world.size}, list(NOTES))
    missing = megatron_missing(world)
    if missing is None:
        table.case["capacity_factor"] = factor = capacity_factor(shape, world.size)
        table.notes.append(
            f"capacity mode: outputs are sized for {factor} times a balanced load, nothing waits for counts."
        )
    else:
        table.notes.append(f"Megatron's dispatchers are missing: {missing}.")
    if (missing := peers.missing(world)) is not None:
        table.notes.append(f"Megatron's flex dispatcher is not timed: {missing}.")
    if world.on_gpu:
        table.notes.append(BUSY_NOTE)
    return measure(world, table, candidates, repeats, done, busy_ms=1)


def token_dispatcher(world: World, shape: Shape) -> Step:
    """One dispatch and one combine of :class:`TokenDispatcher`, and their backward."""
    dispatcher = TokenDispatcher(dist.group.WORLD, shape.experts, DispatcherConfig.load(), device=world.device)
    x, grad, topk_idx, topk_weights = _inputs(world, shape)

    def step(phase: Phases) -> Tensor:
        x.grad = topk_weights.grad = None
        dispatched = dispatcher.dispatch(x, topk_idx, topk_weights)
        assert dispatched.weights is not None
        phase("dispatch")
        rows = scale_rows(dispatched.rows, dispatched.weights)
        phase("experts")
        output = dispatcher.combine(rows, dispatched)
        phase("combine")
        output.backward(grad)
        phase("backward")
        return output

    return step


def megatron_dispatcher(world: World, shape: Shape, kind: str) -> Step:
    """The six phases that MoELayer calls, of Megatron-Core's dispatcher ``kind``."""
    megatron = megatron_modules(world)
    config = transformer_config(
        world, kind, hidden_size=shape.hidden, num_moe_experts=shape.experts, moe_router_topk=shape.topk
    )
    local = shape.experts // world.size
    own = list(range(world.rank * local, (world.rank + 1) * local))
    dispatcher_class: Any = megatron.token_dispatcher.MoEAlltoAllTokenDispatcher
    if kind == "flex":
        dispatcher_class = megatron.token_dispatcher.MoEFlexTokenDispatcher
    elif kind == "deepep":
        dispatcher_class = importlib.import_module("deepep_moe.integrations.megatron.dispatcher").DeepEPTokenDispatcher
    dispatcher = dispatcher_class(local, own, config, pg_collection=megatron.moe_utils.get_default_pg_collection())
    x, grad, topk_idx, topk_weights = _inputs(world, shape)
    routing_map = torch.zeros(shape.tokens, shape.experts, dtype=torch.bool, device=world.device)
    routing_map.scatter_(1, topk_idx, True)
    probs = torch.zeros(shape.tokens, shape.experts, device=world.device)
    probs = probs.scatter(1, topk_idx, topk_weights.detach()).requires_grad_()

    def step(phase: Phases) -> Tensor:
        x.grad = probs.grad = None
        tokens, sent_probs = dispatcher.dispatch_preprocess(x, routing_map, probs)
        tokens, sent_probs = dispatcher.token_dispatch(tokens, sent_probs)
        rows, _, row_probs = dispatcher.dispatch_postprocess(tokens, sent_probs)
        phase("dispatch")
        rows = scale_rows(rows, row_probs)
        phase("experts")
        rows = dispatcher.combine_preprocess(rows)
        output = dispatcher.combine_postprocess(dispatcher.token_combine(rows))
        phase("combine")
        output.backward(grad)
        phase("backward")
        return output

    return step


def _inputs(world: World, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and weights (both leaves that want gradients), the output's gradient, and expert indices."""
    generator = torch.Generator().manual_seed(world.rank)
    x, grad = (torch.randn(shape.tokens, shape.hidden, generator=generator).bfloat16() for _ in range(2))
    topk_idx = routing(shape, world.rank, imbalanced=False)
    weights = torch.rand(shape.tokens, shape.topk, generator=generator).softmax(1)
    device = world.device
    return (
        x.to(device).requires_grad_(),
        grad.to(device),
        topk_idx.to(device),
        weights.to(device).requires_grad_(),
    )
