"""What the Megatron-Core cases share: models on a CPU, and the comparison of two dispatchers.

Imported only by ranks: :func:`cpu.enable` changes ``torch.cuda`` for the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.integrations.megatron import cpu, register

warnings.filterwarnings("ignore", module="megatron")
cpu.enable()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel.utils import set_streams  # noqa: E402
from megatron.core.tensor_parallel import mappings, random  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe import moe_layer as moe_layer_module  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402

from deepep_moe.integrations.megatron.experts import GroupedExperts  # noqa: E402

TOLERANCE = 1e-5
HIDDEN, HEADS, EXPERTS, VOCAB, SEQUENCE, BATCH = 32, 4, 8, 64, 16, 2


def _teach_gloo_unequal_splits() -> None:
    """``alltoall`` gathers and reduces unequal parts over expert tensor parallel ranks, which gloo refuses."""
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(x: Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_split_sizes is None:
            return gather(x, group, output_split_sizes, *args, **kwargs)
        padded = torch.cat([x, x.new_zeros(max(output_split_sizes) - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes)])

    def reduce_scatter_any(x: Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if input_split_sizes is None:
            return reduce_scatter(x, group, input_split_sizes, *args, **kwargs)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any


_teach_gloo_unequal_splits()


def parallel(tp: int = 1, ep: int = 1, etp: int = 1) -> dict[str, Any]:
    """Set up Megatron's process groups, and give the configuration that goes with them."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    return {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "sequence_parallel": tp > 1,
    }


def configure(dispatcher: str, **options: Any) -> Any:
    """A small MoE ``TransformerConfig``."""
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
    }
    return TransformerConfig(moe_token_dispatcher_type=dispatcher, **{**defaults, **cpu.CONFIG, **options})


def moe_layer(config: Any, grouped_experts: bool = False) -> Any:
    """A ``MoELayer`` with the local spec's submodules; the same weights on every call."""
    register(grouped_experts=grouped_experts)
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False).submodules.mlp
    submodules = getattr(spec, "submodules", None) or spec.keywords["submodules"]
    return MoELayer(config, submodules, layer_number=1)


@contextlib.contextmanager
def stand_ins_for_transformer_engine() -> Iterator[None]:
    """What Megatron-Core takes from TransformerEngine without need: latent projections, FP8 state in recomputation."""

    class Linear(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, *, init_method: Callable, bias: bool, **others: Any) -> None:
            super().__init__(inputs, outputs, bias)
            init_method(self.weight)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    def nothing(**settings: Any) -> Any:
        return contextlib.nullcontext()

    no_fp8 = mock.Mock(**{"is_fp8_enabled.return_value": False})
    with (
        mock.patch.object(moe_layer_module, "HAVE_TE", True),
        mock.patch.object(moe_layer_module, "TELinear", Linear, create=True),
        mock.patch.object(random, "FP8GlobalStateManager", no_fp8, create=True),
        mock.patch.object(random, "activation_recompute_forward", nothing, create=True),
        mock.patch.object(random, "fp8_autocast", nothing, create=True),
    ):
        yield


def gpt(config: Any, grouped_experts: bool = False) -> Any:
    """A ``GPTModel`` of the local specification; the same weights on every call."""
    register(grouped_experts=grouped_experts)
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    return GPTModel(config, spec, vocab_size=VOCAB, max_sequence_length=SEQUENCE)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, attention mask and labels of this rank: counting sequences, easy to learn."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    start = torch.randint(VOCAB, (BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQUENCE + 1)) % VOCAB
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    return tokens[:, :-1], torch.arange(SEQUENCE).expand(BATCH, -1), mask, tokens[:, 1:]


def run_in_turn(model: Any, batches: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Losses of the batches and the sum of their gradients, one batch after the other."""
    losses = []
    for tokens, positions, mask, labels in batches:
        loss = model(tokens, positions, mask, labels=labels)
        loss.sum().backward()
        losses.append(loss.detach())
    return {**{f"loss {number}": loss for number, loss in enumerate(losses)}, **gradients(model)}


def run_overlapped(model: Any, batches: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The same by Megatron's 1F1B schedule: the forward of each beside the backward of the one before it."""
    set_streams()
    losses: list[Tensor] = []
    before = None
    for tokens, positions, mask, labels in batches:
        plan = model.build_schedule_plan(tokens, positions, mask, labels=labels)
        loss = type(plan).run(plan, before, b_grad=torch.ones_like(losses[-1]) if losses else None)
        losses.append(loss.detach())
        before = plan
    type(before).run(None, before, b_grad=torch.ones_like(losses[-1]))
    return {**{f"loss {number}": loss for number, loss in enumerate(losses)}, **gradients(model)}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_near(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal to ``TOLERANCE``, relative to the largest value."""
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    error = (actual - expected).abs().max() if actual.numel() else torch.tensor(0.0)
    scale = expected.abs().max().clamp(min=1e-12) if actual.numel() else torch.tensor(1.0)
    assert error <= TOLERANCE * scale, f"{name}: off by {error:g}, largest value {scale:g}"


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and :func:`assert_near` for each."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(name, actual[name], value)


@contextlib.contextmanager
def capacity_mode(**settings: float) -> Iterator[None]:
    """Dispatchers made in here give outputs of a fixed size: by default, that of all tokens on one rank."""
    settings = {"capacity_factor": float(dist.get_world_size()), **settings}
    with mock.patch.dict(os.environ, {f"DEEPEP_MOE_{name.upper()}": str(value) for name, value in settings.items()}):
        yield


def run_layer(layer: Any, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Forward and backward of one layer on this rank's own input: everything a dispatcher could get wrong."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    x = torch.randn(tokens, BATCH, HIDDEN, generator=generator, requires_grad=True)
    grad = torch.randn(tokens, BATCH, HIDDEN, generator=generator)
    output, bias = layer(x)
    assert bias is None
    output.backward(grad)
    return {"output": output.detach(), "input gradient": x.grad, **gradients(layer)}


def assert_same_layer(
    tokens: int = SEQUENCE, build: Callable[[Any], Any] = moe_layer, after: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Compare a layer on ``deepep`` with one on ``alltoall``: outputs and all gradients, two batches.

    ``after`` are options set on the validated configuration: those that Megatron-Core refuses on a CPU.
    """
    results = {}
    for dispatcher in ("alltoall", "deepep"):
        config = configure(dispatcher, **options)
        for name, value in (after or {}).items():
            setattr(config, name, value)
        layer = build(config)
        results[dispatcher] = [run_layer(layer, tokens, seed) for seed in (1, 2)]
    assert type(layer.token_dispatcher).__name__ == "DeepEPTokenDispatcher"
    assert layer.config.moe_token_dispatcher_type == "deepep"
    for expected, actual in zip(results["alltoall"], results["deepep"]):
        assert_all_near(actual, expected)
    assert any(value.abs().max() > 0 for name, value in results["deepep"][0].items() if "experts" in name)
    return layer, results["deepep"][0]


def expert_weights(layer: Any, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Expert parameters, or their ``values``, stacked over the experts: the same for both kinds of experts."""
    values = dict(layer.named_parameters()) if values is None else values
    if isinstance(layer.experts, GroupedExperts):
        return {f"linear_fc{i}": values[f"experts.weight{i}"].detach() for i in (1, 2)}
    one_by_one = range(layer.num_local_experts)
    return {
        name: torch.stack([values[f"experts.local_experts.{i}.{name}.weight"].detach() for i in one_by_one])
        for name in ("linear_fc1", "linear_fc2")
    }


def assert_grouped_experts_agree(**options: Any) -> None:
    config = configure("deepep", **options)
    sequential, grouped = moe_layer(config), moe_layer(config, grouped_experts=True)
    assert type(grouped.experts).__name__ == "GroupedExperts"
    for name, value in expert_weights(sequential).items():
        assert torch.equal(expert_weights(grouped)[name], value), f"initial {name}"
    expected, actual = run_layer(sequential, SEQUENCE), run_layer(grouped, SEQUENCE)
    for name in ("output", "input gradient", "router.weight"):
        assert_near(name, actual[name], expected[name])
    for name, value in expert_weights(sequential, expected).items():
        assert_near(f"gradient of {name}", expert_weights(grouped, actual)[name], value)


def assert_checkpoint_moves(
    saved: dict[str, int], loaded: dict[str, int], writes_grouped: bool, metadata: dict[str, Any]
) -> None:
    """A layer with one kind of experts writes a checkpoint; one with the other kind reads it and computes the same."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)

    def whole_output(layer: Any) -> Tensor:
        x = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(3))
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        part = layer(x.chunk(size)[rank])[0].detach()
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(parts)

    try:
        writer = moe_layer(configure("deepep", **parallel(**saved)), grouped_experts=writes_grouped)
        dist_checkpointing.save(writer.sharded_state_dict(metadata=dict(metadata)), folder[0])
        expected = whole_output(writer)
        reader = moe_layer(configure("deepep", **parallel(**loaded)), grouped_experts=not writes_grouped)
        for parameter in reader.parameters():
            torch.nn.init.zeros_(parameter)
        state = dist_checkpointing.load(reader.sharded_state_dict(metadata=dict(metadata)), folder[0])
        reader.load_state_dict(state)
        assert_near("output", whole_output(reader), expected)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
