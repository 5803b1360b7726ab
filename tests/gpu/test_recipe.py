"""The Megatron-Core recipe on GPUs: steps as CUDA graphs, whose dispatches may overflow, train as without graphs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.test_megatron import pytestmark  # noqa: F401 (needs megatron-core)
from tests.launch import ROOT

STEPS, LENGTH, SEQUENCES, ACCUMULATE = 8, 64, 2, 2
MODEL = {
    "moe_token_dispatcher_type": "deepep",
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "gated_linear_unit": True,
    "num_moe_experts": 16,
    "moe_router_topk": 4,
    "moe_ffn_hidden_size": 96,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}


@pytest.fixture(scope="module")
def recipe(ranks: Ranks) -> Iterator[ModuleType]:
    if ranks.size > torch.cuda.device_count() or 16 % ranks.size:
        pytest.skip("needs a GPU for each rank: the optimizer uses NCCL")
    if torch.cuda.get_device_capability(ranks.device) < (9, 0):
        pytest.skip("needs grouped_mm (compute capability 9.0)")
    sys.path.insert(0, str(ROOT / "recipes"))
    module: ModuleType = importlib.import_module("train_megatron")
    module.parallel_state.destroy_model_parallel()
    module.parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks.size)
    yield module
    sys.path.remove(str(ROOT / "recipes"))


def train(recipe: Any, ranks: Ranks, graph: bool, **settings: Any) -> tuple[list[float], Any]:
    """The losses, and the graphed pass if ``graph``."""
    common = importlib.import_module("common")
    world = common.World(ranks.rank, ranks.size, ranks.device, "nccl")
    recipe.tensor_parallel.model_parallel_cuda_manual_seed(5, use_cudagraphable_rng=graph, force_reset_rng=True)
    torch.manual_seed(5)
    register = recipe.deepep_moe.integrations.megatron.register
    register(settings={"timeout_seconds": TIMEOUT_SECONDS, **settings})
    try:
        config = recipe.transformer_config(MODEL, world, ranks.size)
        model = recipe.build_model(config, recipe.Gpt(grouped_experts=True), LENGTH, world)
    finally:
        register(settings={})
    scale = torch.tensor(1 / (ACCUMULATE * ranks.size), dtype=torch.float32, device=ranks.device)
    recipe.MoEAuxLossAutoScaler.set_loss_scale(scale)
    meter = recipe.DispatcherMeter(model, world)
    settings = recipe.Train(steps=STEPS, sequences=SEQUENCES, accumulate=ACCUMULATE, learning_rate=1e-2)
    adam = recipe.Adam(
        model.parameters(), recipe.replicas, learning_rate=1e-2, weight_decay=0.1, clip=1.0, warmup=2, steps=STEPS
    )
    graphed = None
    if graph:
        recipe.replay_on_overflow(model)
        graphed = recipe.GraphedStep(model, adam, meter, (ACCUMULATE, SEQUENCES, LENGTH), world)
    text = common.ByteText(common.read_text("python-docs"), LENGTH, seed=3)
    losses = []
    for step in range(STEPS):
        with meter.measuring():
            losses.append(recipe.train_step(model, adam, text, settings, world, step, graphed).item())
        if graphed is not None:
            assert meter.report()["rank_imbalance"] >= 1
            assert meter.report()["dispatch_percent"] > 0
    if graphed is not None:
        graphed.close()
    return losses, graphed


def test_captured_steps_train_as_others_do(recipe: ModuleType, ranks: Ranks) -> None:
    # Fixed sizes here too, with room for everything: what torch.compile compiled is used again.
    expected, _ = train(recipe, ranks, graph=False, capacity_factor=float(ranks.size))
    actual, graphed = train(recipe, ranks, graph=True, capacity_factor=0.5)  # too little even for a balanced load
    assert graphed.replay.replays > 0
    assert 1 <= graphed.captures <= graphed.replay.replays + 1
    assert graphed.replay.capacity_factor > 0.5
    assert expected[-1] < 0.9 * expected[0]
    for step, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert abs(got - wanted) <= 0.02 * wanted, f"step {step}: {got} instead of {wanted}"
