"""Copies of native MoE layers and models: deepcopy, averages of weights, pickling."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deepep_moe.errors import UnsupportedError
from deepep_moe.integrations.deepspeed import MoE
from tests.deepspeed_experts import WIDTH, Lora, mlp
from tests.distributed.cases_deepspeed_modules import EXPERTS, SETTINGS, experts_of, layer_of, outcome, same
from tests.distributed.cases_dispatcher import raises
from tests.distributed.deepspeed_util import Setup, batch, device, engine_for, near, train
from tests.launch import case


def parts_of(layers: Iterable[Any]) -> list[tuple[Any, Any]]:
    return [(layer.ep_group, layer.overlap.dispatcher) for layer in layers]


@case(ranks=(2,))
def copies_of_a_layer(group: dist.ProcessGroup) -> None:
    """Weights are copied, groups shared; the copy works beside the original, which it leaves alone."""
    layer = layer_of(True, use_residual=True)
    expected = outcome(layer_of(True, use_residual=True))
    early = copy.deepcopy(layer)
    outcome(layer)
    late = copy.deepcopy(layer)  # with a loss and gradients from its last step
    for copied in (early, late):
        copied.zero_grad()
        assert parts_of([copied.deepspeed_moe]) == parts_of([layer.deepspeed_moe])
        same(outcome(copied), expected, 0.0, "copy")
        for (name, got), original in zip(copied.named_parameters(), layer.parameters(), strict=True):
            assert got.data_ptr() != original.data_ptr(), name
            tags = [(getattr(p, "allreduce", None), getattr(p, "group_name", None)) for p in (got, original)]
            assert tags[0] == tags[1], name
        assert list(copied.state_dict()) == list(layer.state_dict())
    with torch.no_grad():
        for parameter in early.parameters():
            parameter.zero_()
    layer.zero_grad()
    same(outcome(layer), expected, 0.0, "original")

    changed = copy.deepcopy(layer)
    experts_of(changed).deepspeed_experts[0][0] = Lora(experts_of(changed).deepspeed_experts[0][0]).to(device())
    assert changed.deepspeed_moe.local_experts.formula is None
    assert layer.deepspeed_moe.local_experts.formula is not None

    unconnected = copy.deepcopy(MoE(WIDTH, mlp(), EXPERTS, ep_size=2, deepep_moe=SETTINGS))
    unconnected.to(device()).set_deepspeed_parallelism()
    assert outcome(unconnected)["output"] is not None


@case(ranks=(2,))
def averages_of_weights_during_training(group: dist.ProcessGroup) -> None:
    """EMA: a copy of the engine's model, updated after each step, evaluated between steps."""
    for stage in (0, 1, 2):
        setup = Setup(k=2, stage=stage)
        engine, without = engine_for(setup, ours=True), engine_for(setup, ours=True)
        average = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))  # makes a copy
        expected = [parameter.detach().clone() for parameter in engine.module.parameters()]
        for step in range(2):
            train(engine, setup, range(step, step + 1))
            train(without, setup, range(step, step + 1))
            average.update_parameters(engine.module)
            now = [parameter.detach() for parameter in engine.module.parameters()]
            expected = now if step == 0 else [mean.lerp(p, 0.5) for mean, p in zip(expected, now, strict=True)]
            expected = [mean.clone() for mean in expected]
            with torch.no_grad():
                average(*batch(setup, step))
            average = copy.deepcopy(average)
        for got, mean in zip(average.module.parameters(), expected, strict=True):
            near(got, mean, 1e-6, "average")
        for got, expected in zip(engine.module.parameters(), without.module.parameters(), strict=True):
            assert torch.equal(got, expected)


@case(ranks=(2,))
def pickling(group: dist.ProcessGroup) -> None:
    layer = layer_of(True)
    outcome(layer)
    for save in (pickle.dumps, lambda it: torch.save(it, io.BytesIO()), lambda it: pickle.dumps(it.deepspeed_moe)):
        with raises(UnsupportedError, "cannot be pickled", "state_dict()"):
            save(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_of(True, before=lambda layer: [nn.init.zeros_(p) for p in layer.parameters()])
    other.load_state_dict(torch.load(file))
    layer.zero_grad()
    same(outcome(other), outcome(layer), 0.0, "after loading")
    pickle.loads(pickle.dumps(MoE(WIDTH, mlp(), EXPERTS)))  # before it has a group, as in stock
