"""What Megatron-Core's options mean to the ``deepep`` dispatcher: which are refused, which become settings."""

from __future__ import annotations

import math
from typing import Any

import torch

from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import ConfigError
from deepep_moe.fp8 import BLOCK

registered: dict[str, Any] = {}
"""Fields of DispatcherConfig that :func:`~deepep_moe.integrations.megatron.register` was given."""

_DEFAULT_NUM_SMS = 20  # of moe_deepep_num_sms; a user who sets nothing has it too

# Options of other dispatchers. They are refused when set, because ignoring them would train something else than asked.
_FOREIGN = {
    "moe_enable_deepep": "it selects the flex dispatcher's DeepEP backend",
    "moe_expert_rank_capacity_factor": "only the flex dispatcher drops tokens per rank",
    "moe_paged_stash": "only the flex dispatcher's hybridep backend offers it",
    "moe_permute_fusion_into_hybridep": "only the flex dispatcher's hybridep backend offers it",
    "moe_hybridep_pad_uneven_dispatch_inputs": "only the flex dispatcher's hybridep backend offers it",
    "moe_ncclep_static_shape": "only the flex dispatcher's ncclep backend offers it",
    "moe_ncclep_zero_copy": "only the flex dispatcher's ncclep backend offers it",
    "moe_pad_experts_for_cuda_graph_inference": "decoding under CUDA graphs needs the alltoall dispatcher",
}


def check_foreign_options(config: Any) -> None:
    """Raise :class:`~deepep_moe.errors.ConfigError` for options that belong to another dispatcher.

    Comes before Megatron-Core's own validation, which would tell the user to set another type.
    """
    for name, reason in _FOREIGN.items():
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise _refused(config, name, f"{reason}; leave it unset")
    if getattr(config, "transformer_impl", None) == "inference_optimized":
        raise _refused(config, "transformer_impl", "inference-optimized layers bring their own token dispatcher")


def check_options(config: Any) -> None:
    """Raise :class:`~deepep_moe.errors.ConfigError` if a validated ``TransformerConfig`` cannot work here."""
    check_foreign_options(config)
    if not config.num_moe_experts:
        return
    settings = dispatcher_config(config)
    width = "moe_latent_size" if getattr(config, "moe_latent_size", None) else "hidden_size"
    if (settings.fp8_dispatch or settings.fp8_dispatch_grad) and config.params_dtype == torch.bfloat16:
        if getattr(config, width) % BLOCK:
            raise _refused(config, width, f"to be sent as FP8 (fp8_dispatch, fp8_dispatch_grad) a multiple of {BLOCK}")
    if _graph_covers_dispatch(config) and settings.capacity_factor == 0:
        raise _refused(
            config,
            "cuda_graph_impl",
            "the host learns the number of received tokens inside the captured part; capture moe_router and "
            "moe_preprocess only, or set DEEPEP_MOE_CAPACITY_FACTOR above 0 so that nothing waits for the host",
        )


def dispatcher_config(config: Any) -> DispatcherConfig:
    """The dispatcher's settings for one ``TransformerConfig``.

    From Megatron-Core come ``num_sms`` (``moe_flex_dispatcher_num_sms``, else ``moe_deepep_num_sms``; its default of 20
    counts only where communication runs beside computation, which would otherwise wait for SMs) and, with
    ``moe_router_padding_for_quantization``, the alignment that the quantisation recipe wants. What :func:`register` was
    given, the YAML file and the environment override the first; alignments are combined, because experts need both.
    """
    overrides: dict[str, Any] = {}
    for name in ("moe_flex_dispatcher_num_sms", "moe_deepep_num_sms"):
        value = getattr(config, name, None)
        if value is not None:
            if value != _DEFAULT_NUM_SMS or _overlaps(config):
                overrides["num_sms"] = value
            break
    settings = DispatcherConfig.load({**overrides, **registered}, source="TransformerConfig or register()")
    if not config.moe_router_padding_for_quantization:
        return settings
    from dataclasses import replace

    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

    alignment = max(1, get_align_size_for_quantization(config))
    return replace(settings, expert_alignment=math.lcm(settings.expert_alignment, alignment))


def _overlaps(config: Any) -> bool:
    return bool(config.moe_shared_expert_overlap or getattr(config, "overlap_moe_expert_parallel_comm", False))


def _graph_covers_dispatch(config: Any) -> bool:
    """Whether a CUDA graph would capture the communication itself (and not just routing and preprocessing)."""
    implementation = getattr(config, "cuda_graph_impl", "none")
    if implementation == "none":
        return False
    # Named cuda_graph_scope before 0.18; empty means whole layers.
    modules = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None) or []
    names = {getattr(module, "name", str(module)) for module in modules}
    return implementation == "full_iteration" or not names or bool(names & {"moe", "full_iteration"})


def _refused(config: Any, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{name} = {getattr(config, name)!r} with moe_token_dispatcher_type = 'deepep' (TransformerConfig): {reason}"
    )
