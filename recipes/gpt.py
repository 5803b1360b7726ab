"""The model of the Megatron-Core recipe: GPTModel, with attention and loss from PyTorch."""

from __future__ import annotations

# ruff: noqa: E402
import dataclasses
import difflib
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.")  # that optional packages are missing is no news here

import sections
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import World
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from sections import Positive, RecipeError
from torch import Tensor, nn

import deepep_moe.integrations.megatron
from deepep_moe.errors import DeepEPMoEError
from deepep_moe.integrations.megatron import cpu


@dataclass(frozen=True)
class Gpt:
    """Section ``gpt``: what GPTModel takes beside its TransformerConfig."""

    vocab_size: Positive = 256  # at least the 256 bytes; larger only to give the layers their real shape
    rotary_base: Positive = 10000
    share_embeddings_and_output_weights: bool = False
    grouped_experts: bool = False  # all local experts in one module; with dispatcher type deepep only
    fused_attention: bool = True  # PyTorch's scaled_dot_product_attention instead of Megatron-Core's local attention
    transformer_engine: bool = False  # layers of TransformerEngine, which must be installed, instead of local ones


def transformer_config(
    section: Mapping[str, Any], world: World, expert_parallel: int, precision: str = "auto"
) -> TransformerConfig:
    """Section ``model``: fields of Megatron-Core's TransformerConfig, by their own names."""
    known = {field.name: field.type for field in dataclasses.fields(TransformerConfig)}
    given = {}
    for key, value in section.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise RecipeError(f"unknown key model.{key}: not a field of Megatron-Core's TransformerConfig{hint}")
        given[key] = sections.checked(f"model.{key}", value, known[key])
    experts = given.get("num_moe_experts")
    if not experts or experts % expert_parallel:
        raise RecipeError(
            f"model.num_moe_experts = {experts}: allowed is a positive multiple of {expert_parallel}, the number of "
            "processes that share the experts (train.expert_parallel)"
        )
    topk = given.get("moe_router_topk", 2)
    if not 1 <= topk <= experts:
        raise RecipeError(f"model.moe_router_topk = {topk}: allowed is 1 to {experts}, the number of experts")
    values: dict[str, Any] = {
        "expert_model_parallel_size": expert_parallel,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
    }
    if precision not in ("auto", "bf16", "fp32"):
        raise RecipeError(f"train.precision = {precision}: allowed are auto, bf16, fp32")
    if precision == "bf16" or (precision == "auto" and world.device.type == "cuda"):
        values.update(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
    if world.device.type == "cpu":
        values.update(cpu.CONFIG)
    if given.get("gated_linear_unit"):
        values["activation_func"] = F.silu
        values["bias_activation_fusion"] = world.device.type == "cuda"
    try:
        return TransformerConfig(**{**values, **given})
    except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
        if isinstance(error, DeepEPMoEError):
            raise
        raise RecipeError(f"section model: Megatron-Core refuses it: {error or type(error).__name__}") from error


class FusedAttention(nn.Module):
    """Causal attention by PyTorch's ``scaled_dot_product_attention``, in the place of Megatron-Core's local one.

    Megatron-Core's ``DotProductAttention`` stores every score, ``[heads, length, length]``; this one does not. The
    arguments are those that Megatron-Core's ``SelfAttention`` gives to any core attention.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        for name, plain in (
            ("window_size", None),
            ("softmax_type", "vanilla"),
            ("apply_query_key_layer_scaling", False),
        ):
            if getattr(config, name, plain) != plain:
                raise RecipeError(f"model.{name} = {getattr(config, name)}: set gpt.fused_attention=false for it")
        self.dropout, self.scale = config.attention_dropout, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``query [length, sequences, heads, width]``, key and value with as many or fewer heads.

        Returns ``[length, sequences, heads * width]``.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        shares_keys = q.shape[1] != k.shape[1]  # grouped-query attention
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale, enable_gqa=shares_keys
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each token, ``[B, S]`` fp32, from ``logits [S, B, V]`` and ``labels [B, S]``.

    Compiled, it reads BF16 logits once and its backward once more, without copies of them in fp32.
    """
    length, sequences, _ = logits.shape
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.t().flatten(), reduction="none")
    return loss.view(length, sequences).t()


class Model(GPTModel):
    """Megatron-Core's GPTModel, with another implementation of the same loss."""

    token_loss = staticmethod(cross_entropy)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """``labels [B, S]``, ``logits [S, B, V]``; returns ``[B, S]``."""
        return self.token_loss(logits, labels)


@cache
def compile_small_operations() -> None:
    """Fuse what Megatron-Core computes with TransformerEngine's kernels, or one PyTorch operator after another."""
    Model.token_loss = staticmethod(torch.compile(cross_entropy))
    rope_utils._apply_rotary_pos_emb_bshd = torch.compile(rope_utils._apply_rotary_pos_emb_bshd)


def build_model(config: TransformerConfig, gpt: Gpt, sequence_length: int, world: World) -> Model:
    """Megatron-Core's GPTModel; from its local layer spec, unless TransformerEngine is asked for."""
    if gpt.transformer_engine and importlib.util.find_spec("transformer_engine") is None:
        raise RecipeError("gpt.transformer_engine = true, but the package transformer_engine is not installed")
    deepep_moe.integrations.megatron.register(grouped_experts=gpt.grouped_experts)
    if world.device.type == "cuda":
        compile_small_operations()
    try:
        model = _new_model(config, gpt, sequence_length).to(world.device)
    except Exception as error:
        if type(error) not in (Exception, AssertionError, TypeError, ValueError):  # what Megatron-Core's checks raise
            raise
        raise RecipeError(f"section model: Megatron-Core refuses it: {error or type(error).__name__}") from error
    if config.params_dtype != torch.float32:
        model = model.to(config.params_dtype)
    # Ranks that hold the same parameter start from the same values.
    for parameter in model.parameters():
        group = replicas(parameter)
        if group.size() > 1:
            dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)
    return model


def _new_model(config: TransformerConfig, gpt: Gpt, sequence_length: int) -> Model:
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=gpt.transformer_engine, normalization=config.normalization
    )
    if gpt.fused_attention and not gpt.transformer_engine:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = FusedAttention
    return Model(
        config,
        transformer_layer_spec=spec,
        vocab_size=gpt.vocab_size,
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
        rotary_base=gpt.rotary_base,
        share_embeddings_and_output_weights=gpt.share_embeddings_and_output_weights,
    )


def flops_per_token(model: GPTModel, config: TransformerConfig, length: int) -> float:
    """Floating-point operations that training on one token needs, recomputation not counted.

    Six per weight that the token is multiplied by (two in the forward, four in the backward); of the experts' weights
    those of the top-k. Causal attention adds, per layer, the products with half of the sequence.
    """
    weights = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or (name.startswith("embedding") and not model.share_embeddings_and_output_weights):
            continue
        active = 1.0
        if ".experts." in name:
            active = config.moe_router_topk * config.expert_model_parallel_size / config.num_moe_experts
        weights += active * parameter.numel()
    attention = config.num_layers * length * config.num_attention_heads * config.kv_channels
    return 6 * (weights + attention)


def is_expert(parameter: Tensor) -> bool:
    """Megatron-Core marks the parameters that are not the same on all data-parallel ranks."""
    return not getattr(parameter, "allreduce", True)


def replicas(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks that hold a copy of ``parameter``."""
    if is_expert(parameter):
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def loss_of(model: GPTModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean loss per token, in nats. ``tokens`` and ``labels``: int64 ``[sequences, length]``."""
    length, device = tokens.shape[1], tokens.device
    positions = torch.arange(length, dtype=torch.int64, device=device).expand_as(tokens)
    future = None
    if not isinstance(model.decoder.layers[0].self_attention.core_attention, FusedAttention):
        future = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
    return model(tokens, positions, future, labels=labels).float().mean()
