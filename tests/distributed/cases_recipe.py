"""The training recipe's gradients do not depend on how the experts are spread: run by test_recipe.py."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from deepep_moe import notices
from deepep_moe.errors import ConfigError
from tests.launch import ROOT, case

sys.path.insert(0, str(ROOT / "recipes"))

import common
import gpt
import optimizer
import sections
import train_megatron as recipe
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

OPTIMIZER = {"learning_rate": 1e-2, "weight_decay": 0.1}
EXPERTS, LENGTH, SEQUENCES = 8, 16, 3
MODEL = {
    "moe_token_dispatcher_type": "deepep",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "num_moe_experts": EXPERTS,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}


def build(world: common.World, expert_parallel: int, grouped: bool, fused: bool = True, **model: Any) -> Any:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    config = recipe.transformer_config({**MODEL, **model}, world, expert_parallel)
    return recipe.build_model(config, recipe.Gpt(grouped_experts=grouped, fused_attention=fused), LENGTH, world)


def of_this_rank(name: str, whole: dict[str, torch.Tensor], expert_parallel: int) -> torch.Tensor:
    """What ``whole``, the tensors of a model with all experts, has for this rank's parameter ``name``."""
    count = EXPERTS // expert_parallel
    first = parallel_state.get_expert_model_parallel_rank() * count
    if ".experts.weight" in name:  # grouped: [experts, ...]
        return whole[name][first : first + count]
    head, mark, tail = name.partition(".local_experts.")
    if mark:
        number, _, rest = tail.partition(".")
        return whole[f"{head}{mark}{first + int(number)}.{rest}"]
    return whole[name]


def gradients_equal_those_of_one_process(expert_parallel: int, grouped: bool = False) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    text = common.ByteText(common.read_text("python-docs"), LENGTH, seed=3)

    # the truth: one process that holds all experts and sees the tokens of all ranks
    whole = build(world, 1, grouped)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / world.size))
    losses = []
    for rank in range(world.size):
        loss = recipe.loss_of(whole, *text.batch(0, rank, SEQUENCES))
        (loss / world.size).backward()
        losses.append(loss.item())
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    # an expert without tokens has no gradient there, and zeros after sum_gradients
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in whole.named_parameters()
    }
    expected_norm = torch.stack([gradient.square().sum() for gradient in expected.values()]).sum().sqrt()

    spread = build(world, expert_parallel, grouped)
    with torch.no_grad():
        for name, parameter in spread.named_parameters():
            parameter.copy_(of_this_rank(name, weights, expert_parallel))
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / world.size))
    loss = recipe.loss_of(spread, *text.batch(0, world.rank, SEQUENCES))
    torch.testing.assert_close(loss.item(), losses[world.rank], rtol=1e-5, atol=0)
    (loss / world.size).backward()
    adam = optimizer.Adam(
        spread.parameters(), recipe.replicas, **OPTIMIZER, clip=0.5 * expected_norm.item(), warmup=1, steps=10
    )
    gradients = adam.sum_gradients()

    names = {parameter: name for name, parameter in spread.named_parameters()}
    assert any(map(gpt.is_expert, names)) == (expert_parallel > 1)
    for share, gradient in zip(adam.shares, gradients, strict=True):
        name = names[share.parameter]
        wanted = of_this_rank(name, expected, expert_parallel).flatten()
        if share.divided:
            wanted = wanted.chunk(share.group.size())[dist.get_rank(share.group)]
        difference = (gradient - wanted).norm()
        assert difference <= 1e-5 * max(wanted.norm(), 1e-3), (name, difference)
    torch.testing.assert_close(adam.norm(gradients), expected_norm, rtol=1e-5, atol=0)

    # An update of the whole model by torch's AdamW, from the gradients clipped to half of their norm.
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, parameter in whole.named_parameters():
        parameter.grad = 0.5 * expected[name]
    decays, others = ([p for p in whole.parameters() if (p.dim() >= 2) == many] for many in (True, False))
    groups = [{"params": decays, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=OPTIMIZER["learning_rate"], betas=(0.9, 0.95)).step()
    for parameter in spread.parameters():  # what sum_gradients summed is summed again by step
        parameter.grad = None
    loss = recipe.loss_of(spread, *text.batch(0, world.rank, SEQUENCES))
    (loss / world.size).backward()
    torch.testing.assert_close(adam.step(0), expected_norm, rtol=1e-5, atol=0)
    for name, parameter in spread.named_parameters():
        start, end = (of_this_rank(name, whole, expert_parallel) for whole in (before, weights))
        # A first update has the size of the rate wherever the gradient is not 0, so compare their sum and not each.
        assert (parameter.detach() - end).norm() <= 0.02 * (end - start).norm(), name
    parallel_state.destroy_model_parallel()


@case(ranks=(2,))
def data_parallel_only(group: dist.ProcessGroup) -> None:
    gradients_equal_those_of_one_process(1)


@case(ranks=(2, 4))
def expert_parallel_over_all_ranks(group: dist.ProcessGroup) -> None:
    gradients_equal_those_of_one_process(dist.get_world_size())


@case(ranks=(4,))
def two_copies_of_each_expert(group: dist.ProcessGroup) -> None:
    gradients_equal_those_of_one_process(2)
    with mock.patch.object(optimizer, "SMALL", 600):  # some updates are divided, of experts too
        gradients_equal_those_of_one_process(2)
        gradients_equal_those_of_one_process(4, grouped=True)


@case(ranks=(2,))
def grouped_experts(group: dist.ProcessGroup) -> None:
    gradients_equal_those_of_one_process(2, grouped=True)


@case(ranks=(2,))
def fused_attention_computes_what_megatrons_does(group: dist.ProcessGroup) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    text = common.ByteText(common.read_text("python-docs"), LENGTH, seed=3)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    found = []
    for fused in (False, True):
        model = build(world, 2, grouped=True, fused=fused, num_query_groups=2, kv_channels=16, qk_layernorm=True)
        attention = model.decoder.layers[0].self_attention.core_attention
        assert isinstance(attention, gpt.FusedAttention) == fused
        loss = recipe.loss_of(model, *text.batch(0, world.rank, SEQUENCES))
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    with pytest.raises(sections.RecipeError, match=r"model.window_size = .*: set gpt.fused_attention=false"):
        build(world, 2, grouped=True, window_size=(4, 0))
    parallel_state.destroy_model_parallel()


@case(ranks=(2,))
def operations_are_counted(group: dist.ProcessGroup) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    for expert_parallel in (1, 2):
        config = recipe.transformer_config(MODEL, world, expert_parallel)
        model = build(world, expert_parallel, grouped=True)
        attention, router, experts = 32 * (3 * 32) + 32 * 32, 32 * EXPERTS, 2 * 3 * 32 * 48  # top-2, gated
        scores = LENGTH * 32
        expected = 6 * (2 * (attention + router + experts + scores) + 32 * 256)
        assert recipe.flops_per_token(model, config, LENGTH) == expected
    parallel_state.destroy_model_parallel()


@case(ranks=(2,))
def wrong_model_settings_are_named(group: dist.ProcessGroup) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    for changed, message in (
        ({"num_expert": 4}, r"unknown key model\.num_expert: .* \(did you mean num_moe_experts"),
        ({"hidden_size": "wide"}, "model.hidden_size = 'wide': allowed is an integer"),
        ({"num_moe_experts": 7}, "model.num_moe_experts = 7: allowed is a positive multiple of 2"),
        ({"num_moe_experts": None}, "model.num_moe_experts = None: allowed is a positive multiple of 2"),
        ({"moe_router_topk": 9}, "model.moe_router_topk = 9: allowed is 1 to 8"),
        ({"recompute_granularity": "whole"}, "section model: Megatron-Core refuses it: .*recompute"),
    ):
        with pytest.raises(sections.RecipeError, match=message):
            recipe.transformer_config({**MODEL, **changed}, world, 2)
    with pytest.raises(sections.RecipeError, match=r"train\.precision = fp16: allowed are auto, bf16, fp32"):
        recipe.transformer_config(MODEL, world, 2, "fp16")


@case(ranks=(2,))
def section_dispatcher_reaches_the_dispatchers(group: dist.ProcessGroup) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    register = recipe.deepep_moe.integrations.megatron.register
    try:
        register(settings={"timeout_seconds": 77, "num_chunks": 2})
        with mock.patch.dict(os.environ, DEEPEP_MOE_NUM_CHUNKS="3"):
            model = build(world, 2, grouped=True)
        config = model.decoder.layers[0].mlp.token_dispatcher.dispatcher.config
        assert (config.timeout_seconds, config.num_chunks) == (77, 3)
        warned = "num_chunks = 3 has no effect in Megatron-Core layers" in notices._warned
        assert warned == (world.rank == 0)
        with pytest.raises(ConfigError, match=r"unknown setting 'chunks' from settings of register\(\)"):
            register(settings={"chunks": 2})
    finally:
        register(settings={})
    parallel_state.destroy_model_parallel()


@case(ranks=(2,))
def a_capacity_that_overflows_trains_to_the_same_losses(group: dist.ProcessGroup) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    text = common.ByteText(common.read_text("python-docs"), LENGTH, seed=3)
    train = recipe.Train(steps=4, sequences=SEQUENCES, accumulate=2, warmup_steps=0, learning_rate=1e-2)

    def losses(**settings: float) -> tuple[list[float], Any]:
        register = recipe.deepep_moe.integrations.megatron.register
        register(settings=settings)
        try:
            model = build(world, 2, grouped=True, hidden_dropout=0.1, moe_router_load_balancing_type="seq_aux_loss")
        finally:
            register(settings={})
        if settings:
            recipe.replay_on_overflow(model)
        adam = optimizer.Adam(
            model.parameters(), recipe.replicas, **OPTIMIZER, clip=train.clip_gradient, warmup=0, steps=train.steps
        )
        found = [recipe.train_step(model, adam, text, train, world, step).item() for step in range(train.steps)]
        return found, recipe.replay_of(model)

    expected, nothing = losses()
    actual, replay = losses(capacity_factor=0.4)
    assert nothing is None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert replay.forwards == train.steps * train.accumulate
    assert 0 < replay.replays < replay.forwards
    assert replay.capacity_factor > 0.8
    parallel_state.destroy_model_parallel()


@case(ranks=(2,))
def what_a_graph_or_transformer_engine_needs_is_said(group: dist.ProcessGroup) -> None:
    world = common.World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    recipe.cpu.enable()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, create_gloo_process_groups=False)
    config, grouped = recipe.transformer_config(MODEL, world, 2), recipe.Gpt(grouped_experts=True)
    recipe.check_capturable(config, grouped, replay=object())
    for options, replay in ((recipe.Gpt(), object()), (grouped, None)):
        with pytest.raises(sections.RecipeError, match=r"train.cuda_graph = true needs .*capacity_factor above 0"):
            recipe.check_capturable(config, options, replay)
    alltoall = recipe.transformer_config({**MODEL, "moe_token_dispatcher_type": "alltoall"}, world, 2)
    with pytest.raises(sections.RecipeError, match="moe_token_dispatcher_type=deepep"):
        recipe.check_capturable(alltoall, grouped, object())

    engine = recipe.Gpt(transformer_engine=True)
    with pytest.raises(sections.RecipeError, match="transformer_engine is not installed"):
        recipe.build_model(config, engine, LENGTH, world)
    asked = mock.Mock(side_effect=KeyboardInterrupt)
    with (
        mock.patch.object(gpt.importlib.util, "find_spec"),
        mock.patch.object(gpt, "get_gpt_decoder_block_spec", asked),
        pytest.raises(KeyboardInterrupt),
    ):
        recipe.build_model(config, engine, LENGTH, world)
    assert asked.call_args.kwargs["use_transformer_engine"] is True
    parallel_state.destroy_model_parallel()
