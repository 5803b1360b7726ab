"""``benchmarks megatron``: Megatron-Core's MoE layer on our dispatcher and on its own; Megatron-Core for benchmarks."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.candidates import Candidate, Step, by_budget, measure, with_settings
from benchmarks.ops import parse_sizes
from benchmarks.report import Table
from benchmarks.timing import Phases
from deepep_moe.errors import InputError, UnsupportedError
from deepep_moe.tools.world import World

SEED = 1234


# --------------------------------------------------------------------------------------------------- layers


class Layer(NamedTuple):
    """Shape of a ``MoELayer``: gated experts, no shared ones."""

    hidden: int
    ffn: int
    experts: int
    topk: int

    @classmethod
    def parse(cls, text: str) -> Layer:
        """A name in :data:`LAYERS`, or ``7168,2048,32,8``: hidden size, FFN size of an expert, experts, top-k."""
        if text in LAYERS:
            return LAYERS[text]
        rule = f"{', '.join(LAYERS)}, or hidden,ffn,experts,topk with topk <= experts, such as 7168,2048,32,8"
        return parse_sizes(cls, "--layer", text, rule)

    def check(self, ranks: int) -> None:
        """Raise InputError unless every rank gets the same number of experts."""
        if self.experts % ranks:
            raise InputError("--layer", ",".join(map(str, self)), f"experts must be a multiple of the {ranks} ranks")

    def __str__(self) -> str:
        name = next((f"{name}-like, " for name, layer in LAYERS.items() if layer == self), "")
        return f"{name}hidden {self.hidden}, FFN {self.ffn}, top-{self.topk} of {self.experts} experts"


LAYERS = {"deepseek": Layer(7168, 2048, 32, 8), "mixtral": Layer(4096, 14336, 8, 2)}

LAYER_NOTES = [
    "Megatron-Core's MoELayer from its local specification (no TransformerEngine), bf16: router, dispatch, experts and "
    "combine, forward and backward with weight gradients. Uncached. SequentialMLP is Megatron-Core's loop over the "
    "experts, GroupedExperts ours (all of a linear layer in one call).",
    "Memory on the row of the total: peak in PyTorch's allocator with weights, gradients and activations, and what was "
    "taken outside of it (staging, NCCL's buffers, loaded kernels) first by this candidate.",
]


def layer_table(
    world: World, layer: Layer, tokens: int, budgets: list[int], repeats: int, done: Callable[[str], None]
) -> Table:
    """One layer: both dispatchers with both kinds of experts, ours per SM budget."""
    title = f"MoELayer: {layer}, {tokens} tokens per rank, {world.size} ranks"
    table = Table(title, {**layer._asdict(), "tokens": tokens, "ranks": world.size}, list(LAYER_NOTES))
    candidates = []
    for grouped in (False, True):
        experts = "GroupedExperts" if grouped else "SequentialMLP"
        build = layer_builder(world, layer, tokens, "alltoall", grouped)
        candidates.append(Candidate(f"alltoall, {experts}", build))
        for label, budget in by_budget(world, budgets):
            build = layer_builder(world, layer, tokens, "deepep", grouped)
            candidates.append(Candidate(f"deepep, {experts}, {label}", with_settings(build, num_sms=budget)))
    return measure(world, table, candidates, repeats, done)


def layer_builder(world: World, shape: Layer, tokens: int, kind: str, grouped: bool) -> Callable[[], Step]:
    def build() -> Step:
        layer = moe_layer(world, shape, kind, grouped)
        return layer_step(world, layer, lambda x: layer(x)[0], (tokens, 1, shape.hidden), torch.bfloat16)

    return build


def layer_step(
    world: World, layer: torch.nn.Module, call: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Step:
    """Forward and backward of ``layer`` by ``call``, on tokens and gradients of ``shape`` that differ between ranks."""
    generator = torch.Generator().manual_seed(world.rank)
    x, grad = (torch.randn(shape, generator=generator).to(world.device, dtype) for _ in range(2))
    x.requires_grad_()

    def step(phase: Phases) -> Tensor:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        output = call(x)
        phase("forward")
        output.backward(grad)
        phase("backward")
        return output

    return step


def moe_layer(world: World, shape: Layer, kind: str, grouped: bool, **options: Any) -> Any:
    """A ``MoELayer``; the same weights whatever the dispatcher and the kind of experts. ``options``: of its config."""
    megatron = megatron_modules(world)
    config = transformer_config(
        world,
        kind,
        hidden_size=shape.hidden,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_ffn_hidden_size=shape.ffn,
        **options,
    )
    torch.manual_seed(SEED + world.rank)  # of what is initialised on the CPU, which differs between experts' ranks
    megatron.random.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    spec = megatron.specs.get_gpt_layer_local_spec(num_experts=shape.experts, moe_grouped_gemm=False).submodules.mlp
    submodules = getattr(spec, "submodules", None) or spec.keywords["submodules"]  # a functools.partial from 0.18
    if grouped:
        from deepep_moe.integrations.megatron.experts import GroupedExperts

        submodules = dataclasses.replace(submodules, experts=GroupedExperts)
    return megatron.moe_layer.MoELayer(config, submodules, layer_number=1).to(world.device)


# ------------------------------------------------------------------------------------------ Megatron itself


class MegatronModules(NamedTuple):
    """The modules of Megatron-Core used here, imported once its CPU stand-ins are in place."""

    parallel_state: ModuleType
    random: ModuleType
    specs: ModuleType
    transformer_config: ModuleType
    moe_layer: ModuleType
    moe_utils: ModuleType
    token_dispatcher: ModuleType


def megatron_missing(world: World) -> str | None:
    """Why Megatron-Core with our dispatcher cannot run on these ranks, or None."""
    if not world.can_all_to_all:
        return "its alltoall needs a GPU for every rank"
    try:
        importlib.metadata.version("megatron-core")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("deepep_moe.integrations.megatron")
    except importlib.metadata.PackageNotFoundError:
        return "megatron-core is not installed"
    except (ImportError, UnsupportedError) as error:
        return str(error)
    return None


def megatron_modules(world: World) -> MegatronModules:
    """Import Megatron-Core, register our dispatcher, and make all ranks one expert-parallel group."""
    missing = megatron_missing(world)
    if missing is not None:
        raise UnsupportedError(f"Megatron-Core cannot be timed: {missing}")
    warnings.filterwarnings("ignore", module=r"megatron\.")  # that optional packages are missing is no news here
    from deepep_moe.integrations.megatron import cpu

    cpu.enable()
    names = (
        "parallel_state",
        "tensor_parallel.random",
        "models.gpt.gpt_layer_specs",
        "transformer.transformer_config",
        "transformer.moe.moe_layer",
        "transformer.moe.moe_utils",
        "transformer.moe.token_dispatcher",
    )
    modules = MegatronModules(*(importlib.import_module(f"megatron.core.{name}") for name in names))
    if not modules.parallel_state.model_parallel_is_initialized():
        modules.parallel_state.initialize_model_parallel(
            expert_model_parallel_size=world.size, create_gloo_process_groups=False
        )
    return modules


def transformer_config(world: World, kind: str, **options: Any) -> Any:
    """A ``TransformerConfig`` of one MoE layer in bf16, with dispatcher ``kind``, routing without balancing."""
    from deepep_moe.integrations.megatron import cpu

    values: dict[str, Any] = {
        "num_layers": 1,
        "num_attention_heads": 8,
        "moe_ffn_hidden_size": 64,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": kind,
        "expert_model_parallel_size": world.size,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        "params_dtype": torch.bfloat16,
    }
    if not world.on_gpu:
        values.update(cpu.CONFIG)
    return megatron_modules(world).transformer_config.TransformerConfig(**{**values, **options})
