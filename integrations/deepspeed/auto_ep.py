"""AutoEP on this library: what its ``deep_ep`` backend imports.

AutoEP reaches the package through one function, ``auto_ep_comm._import_deep_ep``. With the block in ds_config that
function returns a namespace with our ElasticBuffer, and ``import deep_ep`` elsewhere in the process finds what it did
before. (To serve the name itself is the opt-in of :mod:`deepep_moe.compat`.)

One function more is replaced: the one that multiplies rows by their routing weights, by one that gives the same numbers
in one pass over memory, without fp32 copies of the rows.
"""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import deepspeed.module_inject.auto_ep_comm as auto_ep_comm
import deepspeed.module_inject.auto_ep_layer as auto_ep_layer
from torch import Tensor

import deepep_moe
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import ConfigError

_log = logging.getLogger(__name__)
_stock_row_weights: Any = getattr(auto_ep_layer, "apply_deepep_row_weights", None)  # missing() reports None


def missing() -> list[str]:
    """What is extended here and not there in the installed DeepSpeed."""
    places = ((auto_ep_comm, "_import_deep_ep"), (auto_ep_layer, "apply_deepep_row_weights"))
    return [f"{module.__name__}.{name}" for module, name in places if not hasattr(module, name)]


def check(settings: DispatcherConfig, expert_parallel: Any, bf16: bool, tensor_parallel: int) -> None:
    """Raise :class:`~deepep_moe.errors.ConfigError` for what AutoEP would only stumble over later.

    Args:
        expert_parallel: DeepSpeed's ``AutoEPConfig``; enabled, with ``comm_backend: deepep`` and more than one rank.
        tensor_parallel: ``tensor_parallel.autotp_size``.
    """
    if not bf16:
        raise _refused('comm_backend = "deepep"', "it moves bfloat16 only: set bf16.enabled to true")
    for key, size in (
        ("tensor_parallel.autotp_size", tensor_parallel),
        ("expert_parallel.expert_tensor_parallel_size", expert_parallel.expert_tensor_parallel_size),
    ):
        if size > 1:
            raise ConfigError(
                f"{key} = {size} (ds_config): AutoEP cannot fold tensor parallelism into a DeepEP backend: set it to "
                '1, or expert_parallel.comm_backend to "comm"'
            )
    tokens = expert_parallel.comm_max_tokens_per_rank
    if not isinstance(tokens, int) or tokens < 1:
        raise _refused(
            f"comm_max_tokens_per_rank = {tokens!r}",
            "set it to the largest number of tokens of one rank, train_micro_batch_size_per_gpu times the longest "
            "sequence",
        )
    if settings.max_tokens_per_rank not in (0, tokens):
        raise ConfigError(
            f"deepep_moe.max_tokens_per_rank = {settings.max_tokens_per_rank} (ds_config): AutoEP's buffer is sized by "
            f"expert_parallel.comm_max_tokens_per_rank = {tokens}; set that one only"
        )
    for key in ("fp8_dispatch", "fp8_dispatch_grad", "capacity_factor", "expert_alignment", "num_chunks"):
        value = getattr(settings, key)
        if value != getattr(DispatcherConfig(), key):
            raise ConfigError(
                f"deepep_moe.{key} = {value!r} (ds_config): AutoEP decides this itself; it applies to native MoE only"
            )


def install(settings: DispatcherConfig) -> None:
    """Make AutoEP's DeepEP backend use this library, with ``settings``, from here on in this process."""
    namespace = SimpleNamespace(
        ElasticBuffer=functools.partial(deepep_moe.ElasticBuffer, settings=settings), topk_idx_t=deepep_moe.topk_idx_t
    )
    auto_ep_comm._import_deep_ep = lambda: namespace
    auto_ep_layer.apply_deepep_row_weights = _row_weights
    _log.info("deepep_moe: AutoEP's DeepEP backend is deepep_moe.ElasticBuffer")


def _row_weights(rows: Tensor, weights: Tensor, row_weighting_impl: str) -> Tensor:
    """``rows [M, H]`` times ``weights [M, 1]`` fp32; what is not AutoEP's default way stays AutoEP's."""
    if row_weighting_impl == "eager":
        return deepep_moe.scale_rows(rows, weights.reshape(-1))
    weighed: Tensor = _stock_row_weights(rows, weights, row_weighting_impl)
    return weighed


def _refused(setting: str, reason: str) -> ConfigError:
    return ConfigError(f"expert_parallel.{setting} (ds_config): {reason}")
