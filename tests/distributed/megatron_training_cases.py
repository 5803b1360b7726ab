"""Cases for ``test_megatron.py``: what trainers do around the layers, on ``deepep`` as on ``alltoall``."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.errors import UnsupportedError
from tests.launch import case, on_ranks

_util = on_ranks("tests.distributed.megatron_util")

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OVERLAP = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def compare(run: Callable[..., dict[str, Tensor]], **options: Any) -> None:
    """What ``run(kind, **options)`` gives on both dispatchers."""
    util = _util()
    expected, actual = (run(kind, **options) for kind in ("alltoall", "deepep"))
    assert expected
    try:
        util.assert_all_near(actual, expected)
    except AssertionError as error:
        raise AssertionError(f"with {options}: {error}") from error


def train(
    kind: str, steps: int = 2, batches: int = 1, frozen: str | None = None, evaluate: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Losses and all gradients of a GPT over some steps; ``frozen`` names parameters, "!" those that are not."""
    util = _util()
    model = util.gpt(util.configure(kind, **options))
    for name, parameter in model.named_parameters():
        if frozen is not None:
            parameter.requires_grad_((frozen.lstrip("!") in name) is frozen.startswith("!"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    seen: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(batches):
            tokens, positions, mask, labels = util.batch(10 * step + number)
            loss = model(tokens, positions, mask, labels=labels).mean()
            if evaluate:  # between a forward and its backward
                model.eval()
                with torch.inference_mode() if number % 2 else torch.no_grad():
                    seen[f"evaluation {step} {number}"] = model(tokens[:1], positions[:1], mask).clone()
                model.train()
            loss.backward()
            seen[f"loss {step} {number}"] = loss.detach()
        seen.update({f"{name} in step {step}": value.clone() for name, value in util.gradients(model).items()})
        for parameter in trained:
            if getattr(parameter, "allreduce", True):  # experts are not replicated
                dist.all_reduce(parameter.grad)
        optimizer.step()
    return seen


@case(ranks=(2,))
def recomputation(group: dist.ProcessGroup) -> None:
    layout = _util().parallel(ep=2)
    for options in (
        {**FULL, **OVERLAP, "hidden_dropout": 0.1},
        {**FULL, **PADDED},
        {**FULL, "recompute_method": "block"},
        {**FULL, "recompute_num_layers": 2},
        {**selective("moe"), **OVERLAP},
        {**selective("moe"), **PADDED},
        selective("core_attn"),
    ):
        compare(train, **options, **layout)
    with _util().stand_ins_for_transformer_engine():
        compare(train, **selective("moe", "layernorm"), **layout)


@case(ranks=(2,))
def parts_that_are_frozen(group: dist.ProcessGroup) -> None:
    """Routers, experts, all but one kind, a whole layer; with and without recomputation."""
    layout = _util().parallel(ep=2)
    for frozen in ("router", "local_experts", "!router", "!local_experts", "!layers.1", "linear_fc1", "experts.0"):
        compare(train, frozen=frozen, **layout)
    compare(train, frozen="router", **FULL, **layout)
    compare(train, frozen="local_experts", **selective("moe"), **layout)
    compare(train, frozen="!layers.1", **OVERLAP, **layout)


@case(ranks=(2,))
def one_forward_one_backward_with_frozen_parts(group: dist.ProcessGroup) -> None:
    """Megatron's fine-grained schedule on ``deepep`` against batches in turn on ``alltoall``."""
    util = _util()

    def run(kind: str, frozen: str, **options: Any) -> dict[str, Tensor]:
        model = util.gpt(util.configure(kind, **options))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        run_batches = util.run_in_turn if kind == "alltoall" else util.run_overlapped
        return {name: value.clone() for name, value in run_batches(model, [util.batch(1), util.batch(2)]).items()}

    layout = util.parallel(ep=2)
    compare(run, frozen="router", **layout)
    compare(run, frozen="local_experts", **PADDED, **layout)
    compare(run, frozen="experts.0", fp32_residual_connection=True, **layout)


@case(ranks=(2,))
def accumulation_and_evaluation_in_between(group: dist.ProcessGroup) -> None:
    layout = _util().parallel(ep=2)
    compare(train, batches=3, evaluate=True, **layout)
    compare(train, batches=2, evaluate=True, **OVERLAP, **layout)


@case(ranks=(2,))
def losses_and_biases_of_the_router(group: dist.ProcessGroup) -> None:
    layout = _util().parallel(ep=2)
    none = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    for options in (
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_z_loss_coeff": 1e-3},
        {"moe_router_load_balancing_type": "global_aux_loss"},
        {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [1e-2, 1e-3]},
        {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0, "moe_router_topk": 1},
        {**none, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {**none, "moe_router_topk": 8},
        {"moe_input_jitter_eps": 0.1},
        {"fp32_residual_connection": True},
        {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        {"add_bias_linear": True},
    ):
        torch.manual_seed(7)
        compare(train, **options, **layout)


@case(ranks=(2,))
def dense_layers_and_moe_layers(group: dist.ProcessGroup) -> None:
    util = _util()
    layout = util.parallel(ep=2)
    for options in ({}, FULL):
        compare(partial(train_mixed, util), moe_layer_freq=[0, 1], **options, **layout)


def train_mixed(util: Any, kind: str, **options: Any) -> dict[str, Tensor]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = util.configure(kind, **options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    with mock.patch.object(util, "get_gpt_layer_local_spec", return_value=spec):
        model = util.gpt(config)
    assert [hasattr(layer.mlp, "token_dispatcher") for layer in model.decoder.layers] == [False, True]
    return util.run_in_turn(model, [util.batch(1), util.batch(2)])


@case(ranks=(2,))
def several_models_in_one_process(group: dist.ProcessGroup) -> None:
    """Two that train together, a teacher, and one of another dispatcher type: each computes what it does alone."""
    util = _util()
    layout = util.parallel(ep=2)
    batch = util.batch(1)
    other = {"moe_router_topk": 3, "num_moe_experts": 4}

    def alone(kind: str, **options: Any) -> dict[str, Tensor]:
        return util.run_in_turn(util.gpt(util.configure(kind, **options, **layout)), [batch])

    expected = alone("alltoall"), alone("alltoall", **other)
    models = [util.gpt(util.configure("deepep", **options, **layout)) for options in ({}, other)]
    stock = util.gpt(util.configure("alltoall", **layout))
    losses = [model(*batch[:3], labels=batch[3]) for model in (*models, stock)]
    torch.autograd.backward([loss.sum() for loss in losses])
    for model, loss, wanted in zip((*models, stock), losses, (*expected, expected[0]), strict=True):
        util.assert_all_near({"loss 0": loss.detach(), **util.gradients(model)}, wanted)


@case(ranks=(2,))
def hooks_see_and_change_the_same(group: dist.ProcessGroup) -> None:
    util = _util()

    def run(kind: str, **options: Any) -> dict[str, Tensor]:
        layer = util.moe_layer(util.configure(kind, **options))
        seen: dict[str, Tensor] = {}

        def see(name: str, value: Any) -> None:
            first = value[0] if isinstance(value, tuple) else value
            # The order of rows inside an expert is the dispatcher's own.
            seen[name] = first.detach().clone() if first.shape[:1] == (4,) else first.detach().sum(0)

        for name, module in (("layer", layer), ("router", layer.router), ("expert", layer.experts.local_experts[0])):
            module.register_forward_pre_hook(lambda module, args, name=name: see(f"{name} in", args))
            module.register_forward_hook(lambda module, args, out, name=name: see(f"{name} out", out))
            module.register_full_backward_pre_hook(lambda module, grads, name=name: see(f"{name} grad in", grads))
            module.register_full_backward_hook(lambda module, to, grads, name=name: see(f"{name} grad out", to))
        layer.experts.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))
        layer.experts.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
        layer.experts.register_full_backward_hook(lambda module, to, grads: (3 * to[0], *to[1:]))
        layer.router.register_forward_hook(lambda module, args, out: (0.5 * out[0], out[1]))
        for name, parameter in layer.named_parameters():
            parameter.register_hook(lambda grad, name=name: see(f"gradient of {name}", grad.clone()))
        return {**util.run_layer(layer, 4), **seen}

    compare(run, **util.parallel(ep=2))


@case(ranks=(2,))
def backward_twice_and_of_a_gradient(group: dist.ProcessGroup) -> None:
    """A graph that is kept, and a penalty on the gradient of the input."""
    util = _util()

    def run(kind: str, penalty: bool, **options: Any) -> dict[str, Tensor]:
        layer = util.moe_layer(util.configure(kind, **options))
        x = torch.randn(4, 2, util.HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
        value = layer(x)[0].square().sum()
        if penalty:
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            gradient.square().sum().backward()
        else:
            value.backward(retain_graph=True)
            value.backward()
        return {"input gradient": x.grad, **util.gradients(layer)}

    layout = util.parallel(ep=2)
    compare(run, penalty=False, **layout)
    compare(run, penalty=True, **layout)


@case(ranks=(2,))
def megatrons_own_data_parallel_wrapper(group: dist.ProcessGroup) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    util = _util()

    def run(kind: str, **options: Any) -> dict[str, Tensor]:
        model = util.gpt(util.configure(kind, **options))
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        wrapped.zero_grad_buffer()
        for step in range(2):
            tokens, positions, mask, labels = util.batch(step)
            wrapped(tokens, positions, mask, labels=labels).sum().backward()
        wrapped.finish_grad_sync()
        if kind == "deepep":
            with pytest.raises(UnsupportedError, match=r"DistributedDataParallel cannot be copied.*copy the model"):
                copy.deepcopy(wrapped)
        return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}

    compare(run, **util.parallel(ep=2))


@case(ranks=(2,))
def copies_have_weights_of_their_own(group: dist.ProcessGroup) -> None:
    """An average of the weights: of a layer and of a model, whatever the experts, before and after training."""
    from torch.optim.swa_utils import AveragedModel

    util = _util()
    layout = util.parallel(ep=2)
    batches = [util.batch(1)]
    for grouped in (False, True):
        model = util.gpt(util.configure("deepep", **OVERLAP, moe_shared_expert_gate=True, **layout), grouped)
        expected = {name: value.clone() for name, value in util.run_in_turn(model, batches).items()}
        for copied in (copy.deepcopy(model), AveragedModel(model).module):
            for original, own in zip(model.parameters(), copied.parameters(), strict=True):
                assert own is not original and torch.equal(own, original)
                for mark in ("allreduce", "tensor_model_parallel", "partition_dim", "sequence_parallel"):
                    assert getattr(own, mark, None) == getattr(original, mark, None), mark
            for original, own in zip(model.decoder.layers, copied.decoder.layers, strict=True):
                assert own.mlp.token_dispatcher is not original.mlp.token_dispatcher
                assert own.mlp.token_dispatcher.dispatcher is original.mlp.token_dispatcher.dispatcher
                assert own.mlp.token_dispatcher.shared_experts is own.mlp.shared_experts
                assert own.mlp.ep_group is original.mlp.ep_group
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
            copied.zero_grad()
            util.assert_all_near(util.run_in_turn(copied, batches), expected)
            with torch.no_grad():
                for original, own in zip(model.parameters(), copied.parameters(), strict=True):
                    original.copy_(own)
        shallow = copy.copy(model)
        assert all(own is original for own, original in zip(shallow.parameters(), model.parameters(), strict=True))
        for module in (model, model.decoder.layers[0].mlp):
            with pytest.raises(UnsupportedError, match=rf"{type(module).__name__} .* cannot be pickled: .*state_dict"):
                torch.save(module, io.BytesIO())
    with pytest.raises(TypeError, match="ProcessGroup"):  # Megatron-Core's own types stay as they are
        copy.deepcopy(util.moe_layer(util.configure("alltoall", **layout)))


@case(ranks=(2,))
def autocast(group: dist.ProcessGroup) -> None:
    """Of ``alltoall`` with its backward inside of autocast, which Megatron-Core's linear layers need on a CPU.

    The router computes in fp64, which autocast leaves alone; Megatron-Core's other routers fail in their backward.
    """
    util = _util()

    def run(kind: str, dtype: torch.dtype, grouped: bool, inside: bool = True, **options: Any) -> dict[str, Tensor]:
        config = util.configure(kind, moe_router_dtype="fp64", **options)
        layer = util.moe_layer(config, grouped_experts=grouped and kind == "deepep")
        x = torch.randn(6, 2, util.HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
        with torch.autocast("cpu", dtype):
            output, _ = layer(x)
        with torch.autocast("cpu", dtype) if inside or kind == "alltoall" else contextlib.nullcontext():
            output.backward(torch.ones_like(output))
        assert output.dtype == dtype
        found = util.gradients(layer)
        shared = {name: value for name, value in found.items() if "shared" in name}
        experts = {f"experts {name}": value for name, value in util.expert_weights(layer, found).items()}
        return {"output": output.detach(), "x": x.grad, "router": found["router.weight"], **shared, **experts}

    layout = util.parallel(ep=2)
    softplus = {"gated_linear_unit": False, "activation_func": torch.nn.functional.softplus}
    for dtype in (torch.bfloat16, torch.float16):
        for options in (
            {},
            OVERLAP,
            PADDED,
            {"params_dtype": torch.bfloat16} if dtype == torch.float16 else {},
            {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
            {"num_moe_experts": 2},
            softplus,
        ):
            run_both = partial(run, dtype=dtype)
            compare(run_both, grouped=False, **options, **layout)
            compare(run_both, grouped=True, inside="moe_shared_expert_overlap" in options, **options, **layout)
        # The activation that is computed again sees autocast as it was.
        results = [
            run("deepep", dtype, True, inside=False, **softplus, **layout, **recompute)
            for recompute in ({}, {"moe_grouped_gemm": True, **selective("moe_act")})
        ]
        util.assert_all_near(results[1], results[0])


@case(ranks=(2,))
def compiled_layer(group: dist.ProcessGroup) -> None:
    util = _util()

    def run(kind: str, **options: Any) -> dict[str, Tensor]:
        layer = util.moe_layer(util.configure(kind, **options))
        if kind == "deepep":
            layer.forward = torch.compile(layer.forward, backend="eager")
        return util.run_layer(layer, 4)

    compare(run, num_moe_experts=2, **util.parallel(ep=2))


@case(ranks=(2,))
def small_gradients_that_travel_as_fp8(group: dist.ProcessGroup) -> None:
    """Of a loss that is a mean over many tokens, in a BF16 layer. Without FP8 they would be exact."""
    util = _util()
    options = {"hidden_size": 128, "params_dtype": torch.bfloat16, "bf16": True, "moe_aux_loss_coeff": 0.0}

    def gradients(fp8: bool, scale: float) -> dict[str, Tensor]:
        with mock.patch.dict(os.environ, {"DEEPEP_MOE_FP8_DISPATCH_GRAD": str(int(fp8))}):
            layer = util.moe_layer(util.configure("deepep", **options, **util.parallel(ep=2)))
        generator = torch.Generator().manual_seed(dist.get_rank())
        x, grad = torch.randn(2, 8, 2, 128, generator=generator)
        x = x.to(torch.bfloat16).requires_grad_()
        output, _ = layer(x)
        output.backward((grad * scale).to(torch.bfloat16))
        return {"input": x.grad, **util.gradients(layer)}

    for scale in (1.0, 1e-6, 1e-9, 1e-12):
        exact, rounded = gradients(False, scale), gradients(True, scale)
        for name, value in exact.items():
            error = (rounded[name].double() - value.double()).norm() / value.double().norm()
            assert 1e-4 < error < 0.1, f"{name}, output gradients of {scale:g}: relative error {error:g}"
