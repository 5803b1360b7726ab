"""What the Megatron-Core tests share: small models on this rank's device, and how results are compared.

Imported by the tests when they run, not when they are collected: it registers the plugin with Megatron-Core.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.utils import set_streams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from deepep_moe.integrations.megatron import cpu, register

BACKEND = "nvlink"
HIDDEN, VOCAB, SEQUENCE, BATCH, TOPK, LOCAL_EXPERTS = 64, 64, 32, 2, 2, 4

_layout: dict[str, int] = {}


def parallel(tp: int = 1, ep: int = 1, etp: int = 1) -> dict[str, Any]:
    """Megatron's process groups for this layout, made again only if it changed, and the configuration to go with it."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    if sizes != _layout:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes, distributed_timeout_minutes=1)
        _layout.update(sizes)
    return {**sizes, "sequence_parallel": tp > 1, "num_moe_experts": LOCAL_EXPERTS * ep}


def configure(dispatcher: str, dtype: torch.dtype, **options: Any) -> Any:
    """A small MoE ``TransformerConfig``; fused kernels, which need Apex or TransformerEngine, are off."""
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "moe_router_topk": TOPK,
        "moe_ffn_hidden_size": 32,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.1,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    return TransformerConfig(moe_token_dispatcher_type=dispatcher, **{**defaults, **cpu.CONFIG, **options})


def _seed() -> None:
    torch.manual_seed(11)  # routers, norms and position embeddings are drawn on the CPU
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)


def _spec(config: Any) -> Any:
    return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)


def moe_layer(config: Any, device: torch.device, grouped_experts: bool = False) -> Any:
    """A ``MoELayer`` of the local specification; the same weights on every call."""
    register(grouped_experts=grouped_experts)
    _seed()
    mlp = _spec(config).submodules.mlp
    submodules = getattr(mlp, "submodules", None) or mlp.keywords["submodules"]
    layer = MoELayer(config, submodules, layer_number=1).to(device)
    check_dispatcher(layer)
    return layer


def gpt(config: Any, device: torch.device, grouped_experts: bool = False) -> Any:
    """A ``GPTModel`` of the local specification; the same weights on every call."""
    register(grouped_experts=grouped_experts)
    _seed()
    model = GPTModel(config, _spec(config), vocab_size=VOCAB, max_sequence_length=SEQUENCE)
    model = model.to(device, config.params_dtype)
    for layer in model.decoder.layers:
        check_dispatcher(layer.mlp)
    return model


def check_dispatcher(layer: Any) -> None:
    """The layer has the dispatcher it was configured with, and ours moves tokens over NVLink."""
    dispatcher, kind = layer.token_dispatcher, layer.config.moe_token_dispatcher_type
    expected = {"alltoall": "MoEAlltoAllTokenDispatcher", "deepep": "DeepEPTokenDispatcher"}
    assert type(dispatcher).__name__ == expected[kind]
    if kind == "deepep":
        assert dispatcher.dispatcher.backend.name == BACKEND


def layer_batch(tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """This rank's input of a layer and the gradient of its output, each ``[tokens, BATCH, HIDDEN]``."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    x, grad = torch.randn(2, tokens, BATCH, HIDDEN, generator=generator).to(device, dtype)
    return x, grad


def run_layer(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward: everything that a dispatcher could get wrong."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    output, bias = layer(x)
    assert bias is None
    output.backward(grad)
    return results(layer, x, output)


def results(layer: Any, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    """Copies of the output and all gradients."""
    assert x.grad is not None
    values = {"output": output, "input gradient": x.grad, **stack_experts(gradients(layer))}
    return {name: value.detach().clone() for name, value in values.items()}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def stack_experts(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of expert parameters as ``GroupedExperts`` name and shape them, whatever the kind of experts."""
    found: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        found.setdefault(re.sub(r"local_experts\.\d+\.linear_fc(\d)\.weight", r"weight\1", name), []).append(value)
    return {
        name: torch.stack(parts) if "experts.weight" in name and parts[0].dim() == 2 else parts[0]
        for name, parts in found.items()
    }


def assert_near(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """FP32 to 1e-5 of the largest value; BF16 to 1e-2, in 2-norms."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape} {got.dtype}"
        if want.dtype == torch.bfloat16:
            error, scale, tolerance = (got.float() - want.float()).norm(), want.float().norm(), 1e-2
        else:
            error, scale, tolerance = (got - want).abs().max(), want.abs().max(), 1e-5
        assert error <= tolerance * scale, f"{name}: off by {error:g}, where values are {scale:g}"  # NaN fails too
        assert scale > 0, f"{name} is 0 everywhere: nothing was compared"


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def gpt_batch(step: int, device: torch.device) -> Batch:
    """Tokens, positions, attention mask and labels of this rank: counting sequences, easy to learn."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    start = torch.randint(VOCAB, (4 * BATCH, 1), generator=generator)
    tokens = ((start + torch.arange(SEQUENCE + 1)) % VOCAB).to(device)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).triu(1)
    return tokens[:, :-1], torch.arange(SEQUENCE, device=device).expand(len(tokens), -1), mask, tokens[:, 1:]


def train(model: Any, steps: int, device: torch.device) -> list[float]:
    """Mean loss over all ranks, before each update by Adam (FP32 copies of the weights)."""
    parameters = list(model.parameters())
    masters = [p.detach().float().requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(masters, lr=3e-3)
    curve = []
    for step in range(steps):
        tokens, positions, mask, labels = gpt_batch(step, device)
        loss = model(tokens, positions, mask, labels=labels).float().mean()
        model.zero_grad()
        loss.backward()
        for parameter, master in zip(parameters, masters):
            assert parameter.grad is not None
            master.grad = parameter.grad.float() / dist.get_world_size()
            if getattr(parameter, "allreduce", True):  # experts are not replicated
                dist.all_reduce(master.grad)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters):
                parameter.copy_(master)
        total = loss.detach().clone()
        dist.all_reduce(total)
        curve.append(total.item() / dist.get_world_size())
    return curve


def run_in_turn(model: Any, batches: list[Batch]) -> dict[str, Tensor]:
    """Losses of the batches and the sum of their gradients, one batch after the other."""
    values = {}
    for number, (tokens, positions, mask, labels) in enumerate(batches):
        loss = model(tokens, positions, mask, labels=labels)
        loss.backward(torch.ones_like(loss))
        values[f"loss {number}"] = loss.detach()
    return {**values, **stack_experts(gradients(model))}


def run_overlapped(model: Any, batches: list[Batch]) -> dict[str, Tensor]:
    """The same by Megatron's 1F1B schedule: the forward of a batch beside the backward of the one before it."""
    set_streams()
    losses: list[Tensor] = []
    before = None
    for tokens, positions, mask, labels in batches:
        plan = model.build_schedule_plan(tokens, positions, mask, labels=labels)
        loss = type(plan).run(plan, before, b_grad=torch.ones_like(losses[-1]) if losses else None)
        losses.append(loss.detach())
        before = plan
    type(before).run(None, before, b_grad=torch.ones_like(losses[-1]))
    return {**{f"loss {number}": loss for number, loss in enumerate(losses)}, **stack_experts(gradients(model))}
