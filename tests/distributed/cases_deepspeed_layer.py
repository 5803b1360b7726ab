"""Native MoE on this library: tensor parallelism, grouped GEMM, checkpoints, odd batches, errors."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.moe import sharded_moe
from torch import Tensor, nn

from deepep_moe import grouped
from deepep_moe.errors import ConfigError, DeepEPMoEError, InputError, UnsupportedError
from deepep_moe.integrations.deepspeed import MoE, convert
from tests.distributed.cases_dispatcher import raises
from tests.distributed.deepspeed_util import (
    EXPERTS,
    HIDDEN,
    INNER,
    GatedMLP,
    Model,
    Setup,
    build,
    compare,
    ds_config,
    engine_for,
    mlp,
    near,
    parity,
    supports_fp16,
    train,
)
from tests.launch import case

# ------------------------------------------------------------------------------------------ tensor parallelism


class Mpu:
    """Tensor-parallel groups of neighbouring ranks, as Megatron's model-parallel unit tells DeepSpeed."""

    def __init__(self, size: int) -> None:
        world = dist.get_world_size()
        self.size = size
        tensor = [list(range(first, first + size)) for first in range(0, world, size)]
        data = [list(range(first, world, size)) for first in range(size)]
        self.tensor_group = self._own(tensor)
        self.data_group = self._own(data)

    @staticmethod
    def _own(all_ranks: list[list[int]]) -> dist.ProcessGroup:
        groups = [dist.new_group(ranks) for ranks in all_ranks]
        return next(g for g, ranks in zip(groups, all_ranks, strict=True) if dist.get_rank() in ranks)

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.size

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self.tensor_group)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data_group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class SlicedMLP(nn.Module):
    """An expert whose inner dimension is cut over the tensor-parallel group."""

    group: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, INNER // 2, bias=False)
        self.second = nn.Linear(INNER // 2, HIDDEN, bias=False)

    def __deepcopy__(self, memo: Any) -> SlicedMLP:  # DeepSpeed copies the expert it is given
        return SlicedMLP()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first(_SumBackward.apply(x, SlicedMLP.group)))
        return _SumForward.apply(self.second(inner), SlicedMLP.group)


@case(ranks=(2, 4))
def tensor_parallel_model(group: dist.ProcessGroup) -> None:
    for drop in (False, True):
        parity(Setup(k=2, drop=drop, capacity_factor=0.5, mpu=Mpu(2)), reduce=True)


@case(ranks=(2, 4))
def tensor_parallel_model_and_experts(group: dist.ProcessGroup) -> None:
    mpu = Mpu(2)
    SlicedMLP.group = mpu.tensor_group
    ep_size = dist.get_world_size() // 2
    sliced = Setup(k=2, drop=True, capacity_factor=0.5, ep_size=ep_size, expert=SlicedMLP, expert_tp=True, mpu=mpu)
    parity(sliced, reduce=True)
    # Stock DeepSpeed stops here if the busiest expert has an odd load. A capacity that nothing exceeds is the same.
    parity(replace(sliced, drop=False), reduce=True, stock_setup=replace(sliced, capacity_factor=2.0))


# ------------------------------------------------------------------------------------------------ grouped GEMM


@case(ranks=(2,))
def grouped_gemm(group: dist.ProcessGroup) -> None:
    """The code of the GPU path. On a CPU ``grouped_mm`` is slow, but computes the same."""
    calls = 0
    real = grouped._grouped_mm

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    always = mock.patch.object(grouped, "_takes", lambda rows, weight: rows.shape[0] > 0)
    with always, mock.patch.object(grouped, "_grouped_mm", counting):
        parity(Setup(k=2, expert=mlp))
        parity(Setup(k=2, expert=GatedMLP))
        parity(Setup(k=2, expert=mlp, stage=2, bf16=True))
        parity(Setup(k=2, expert=mlp, settings={"capacity_factor": 4.0}))  # with rows that are nobody's
    # Steps and layers; a linear layer makes three calls in a step, and one more for the gradient of its biases.
    assert calls == 2 * 2 * (2 * 4 + 3 * 3 + 2 * 4 + 2 * 4)


@case(ranks=(2,))
def hooks_on_experts_are_called(group: dist.ProcessGroup) -> None:
    engine = engine_for(Setup(k=2, expert=mlp), ours=True)
    seen = []
    for layer in engine.moe_layers:
        for expert in layer.experts.deepspeed_experts:
            expert[2].register_full_backward_hook(lambda module, *gradients: seen.append(module))
    train(engine, Setup(k=2), range(1))
    assert len(seen) == 2 * EXPERTS // 2


@case(ranks=(2,))
def zero_keeps_weights_where_one_gemm_can_read_them(group: dist.ProcessGroup) -> None:
    engine = engine_for(Setup(k=2, stage=2, expert=GatedMLP), ours=True)
    for layer in engine.moe_layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights = [expert.get_submodule(name).weight for expert in layer.experts.deepspeed_experts]
            together = grouped.stacked(weights)
            assert together.data_ptr() == weights[0].data_ptr()
            assert torch.equal(together, torch.stack(weights))


# ----------------------------------------------------------------------------------- what stays, what goes away


@case(ranks=(2,))
def keys_tags_and_returned_tuple_stay(group: dist.ProcessGroup) -> None:
    stock, ours = Model(Setup(k=2, residual=True)), convert(Model(Setup(k=2, residual=True)))
    assert list(stock.state_dict()) == list(ours.state_dict())
    tags = [
        {name: (getattr(p, "allreduce", None), getattr(p, "group_name", None)) for name, p in model.named_parameters()}
        for model in (stock, ours)
    ]
    assert tags[0] == tags[1]
    assert (False, "ep_size_2") in tags[0].values()

    torch.manual_seed(3)
    x = torch.randn(3, 5, HIDDEN)
    results = []
    for model in (build(Setup(k=2)), convert(build(Setup(k=2)))):
        layer = model.layers[0]
        layer.set_deepspeed_parallelism()
        results.append(layer(x))
    for got, expected in zip(results[1], results[0], strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        near(got, expected, 1e-6, "returned tuple")


@case(ranks=(2,))
def drop_in_layer(group: dist.ProcessGroup) -> None:
    """``MoE`` from this library, without the block: the same arguments, keys and training."""
    for setup in (Setup(k=2, residual=True), Setup(k=1, drop=True, stage=2)):
        ours = replace(setup, layer=MoE)
        stock_engine, engine = engine_for(setup, ours=False), engine_for(ours, ours=False)
        assert {type(layer).__name__ for layer in engine.moe_layers} == {"DispatchedMOELayer"}
        assert list(engine.module.state_dict()) == list(stock_engine.module.state_dict())
        compare(train(engine, ours), train(stock_engine, setup), setup.tolerance)


@case(ranks=(2,))
def whose_settings_a_layer_has(group: dist.ProcessGroup) -> None:
    given = partial(MoE, deepep_moe={"num_chunks": 3})
    for layer, ours, chunks in ((given, False, 3), (given, True, 3), (MoE, False, 1), (MoE, True, 2)):
        engine = engine_for(Setup(k=2, layer=layer, settings={"num_chunks": 2}), ours)
        assert {one.settings.num_chunks for one in engine.moe_layers} == {chunks}
    with raises(ConfigError, "'num_chunk'", "did you mean num_chunks?"):
        MoE(HIDDEN, mlp(), EXPERTS, deepep_moe={"num_chunk": 3})


@case(ranks=(2,))
def dropless_routing_agrees_on_nothing(group: dist.ProcessGroup) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an all-reduce in the forward pass")

    for k in (1, 2, 3):
        layer = convert(build(Setup(k=k))).layers[0]
        layer.set_deepspeed_parallelism()
        with mock.patch.object(deepspeed.comm, "all_reduce", refuse), mock.patch.object(dist, "all_reduce", refuse):
            layer(torch.randn(4, 6, HIDDEN))


@case(ranks=(2,))
def ranks_with_different_or_no_tokens(group: dist.ProcessGroup) -> None:
    """Every rank's output is what the experts, gathered in one place, make of its own tokens."""
    for k in (1, 2, 3):
        layer = convert(build(Setup(k=k))).layers[0]
        layer.set_deepspeed_parallelism()
        everyone = [mlp() for _ in range(EXPERTS)]
        for index, expert in enumerate(everyone):
            generator = torch.Generator().manual_seed(index)
            for parameter in expert.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        x = torch.randn(0 if group.rank() else 7, 1, HIDDEN, requires_grad=True)
        out, aux, counts = layer(x)

        probs = torch.softmax(x[:, 0] @ layer.deepspeed_moe.gate.wg.weight.t(), dim=1)
        weights, chosen = probs.topk(k, dim=1)
        weights = weights / weights.sum(1, keepdim=True) if k > 1 else weights
        expected = torch.zeros(len(x), HIDDEN)
        for row in range(len(x)):
            for weight, expert in zip(weights[row], chosen[row], strict=True):
                expected[row] += weight * everyone[expert](x[row, 0])
        near(out[:, 0], expected, 1e-6, "output")
        assert counts.sum() == k * len(x)
        (out.sum() + aux).backward()
        assert all(p.grad is not None for p in layer.parameters())


# ------------------------------------------------------------------------------------------------- checkpoints


@case(ranks=(2,))
def checkpoints_resume_in_both_directions(group: dist.ProcessGroup) -> None:
    """Two steps, a checkpoint, two more: whoever wrote the checkpoint and whoever goes on."""
    setup = Setup(k=2, stage=1)
    folders = [tempfile.mkdtemp() if group.rank() == 0 else None]
    dist.broadcast_object_list(folders, src=0)
    results: dict[tuple[bool, bool], SimpleNamespace] = {}
    for writer in (False, True):
        engine = engine_for(setup, ours=writer)
        train(engine, setup, range(2))
        engine.save_checkpoint(folders[0], tag=f"ours-{writer}")
        for reader in (False, True):
            resumed = engine_for(setup, ours=reader)
            with torch.no_grad():
                for parameter in resumed.module.parameters():
                    parameter.zero_()
            path, _ = resumed.load_checkpoint(folders[0], tag=f"ours-{writer}")
            assert path is not None
            results[writer, reader] = train(resumed, setup, range(2, 4))
    for pair, result in results.items():
        if pair != (False, False):
            compare(result, results[False, False], setup.tolerance)
    dist.barrier()
    if group.rank() == 0:
        for path in sorted(Path(folders[0]).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path(folders[0]).rmdir()


# ------------------------------------------------------------------------------------------------------ errors


def initialize(setup: Setup, model: nn.Module | None = None, **changes: Any) -> Any:
    config = {**ds_config(setup, ours=True), **changes}
    model = model or build(setup)
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )[0]


def block(**settings: Any) -> dict[str, Any]:
    return {"deepep_moe": {"enabled": True, **settings}}


ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}


@case(ranks=(2,))
def errors_at_initialisation(group: dist.ProcessGroup) -> None:
    refused: list[tuple[type[DeepEPMoEError], dict[str, Any], tuple[str, ...]]] = [
        (ConfigError, block(num_sm=4), ("'num_sm'", "ds_config block deepep_moe", "did you mean num_sms?")),
        (ConfigError, block(backend="nccl"), ("backend = 'nccl'", "auto, collective, hierarchical, nvlink")),
        (ConfigError, {"deepep_moe": {"num_sms": 4}}, ("deepep_moe.enabled = None",)),
        (ConfigError, {"deepep_moe": True}, ("deepep_moe = True",)),
        (ConfigError, block(fp8_dispatch=True), ("fp8_dispatch", "bf16.enabled")),
        (UnsupportedError, {"zero_optimization": {"stage": 3}}, ("stage = 3", "0, 1 or 2", "AutoEP")),
        (UnsupportedError, block(backend="nvlink"), ("nvlink cannot run here",)),
        (
            ConfigError,
            {"expert_parallel": {"enabled": True, "autoep_size": 2}, "bf16": {"enabled": True}},
            ("comm_backend = 'comm'", "deepep"),
        ),
    ]
    for kind, changes, texts in refused:
        with raises(kind, *texts):
            initialize(Setup(k=2), optimizer=ADAM, **changes)
    off = {"deepep_moe": {"enabled": False}}
    for layer, changes, text in (
        (MoE, {"zero_optimization": {"stage": 3}}, "stage = 3"),
        *([(MoE, {"fp16": {"enabled": True}}, "fp16.enabled = true")] if supports_fp16() else []),
        (partial(MoE, deepep_moe={"fp8_dispatch": True}), {}, "fp8_dispatch"),
    ):
        with raises(DeepEPMoEError, text):
            initialize(Setup(k=2, layer=layer), optimizer=ADAM, **off, **changes)


@case(ranks=(2,))
def too_many_tokens(group: dist.ProcessGroup) -> None:
    engine = engine_for(Setup(k=2, settings={"max_tokens_per_rank": 20}), ours=True)
    x = torch.randn(2, 12, HIDDEN)
    with raises(InputError, "max_tokens_per_rank = 20", "24 tokens", "train_micro_batch_size_per_gpu"):
        engine(x, x)


@case(ranks=(2,))
def a_model_without_moe_layers(group: dist.ProcessGroup) -> None:
    with raises(InputError, "model = Linear", "no deepspeed.moe.layer.MoE"):
        convert(nn.Linear(2, 2))
    with_block = initialize(Setup(), model=nn.Linear(2, 2), optimizer=ADAM)  # a warning: nothing to do is no harm
    assert with_block(torch.ones(1, 2)).shape == (1, 2)


@case(ranks=(2,))
def a_block_that_is_off_changes_nothing(group: dist.ProcessGroup) -> None:
    engine = engine_for(Setup(k=2), ours=False)
    assert [type(layer) for layer in engine.moe_layers] == [sharded_moe.MOELayer] * 2


@case(ranks=(2,))
def breakdown_of_time(group: dist.ProcessGroup) -> None:
    """DeepSpeed's ``wall_clock_breakdown`` reads these from every layer."""
    layer = convert(build(Setup(k=2))).layers[0]
    layer.set_deepspeed_parallelism()
    inner = layer.deepspeed_moe
    inner.wall_clock_breakdown = inner.gate.wall_clock_breakdown = True
    with raises(RuntimeError, "shapes"):  # and a timer that was stopped
        layer(torch.randn(4, 6, HIDDEN + 1))
    layer(torch.randn(4, 6, HIDDEN))
    assert inner.time_moe >= inner.time_falltoall + inner.time_salltoall + inner.gate.gate_time > 0
