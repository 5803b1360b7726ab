"""DeepEP itself, where ``deep_ep`` is installed: the operations of ``benchmarks ops`` through its own interface.

Not run with DeepEP so far; tests run it with :mod:`deepep_moe.compat`, which has the same interface.

Releases 1.x have ``Buffer``, 2.x ``ElasticBuffer``; one that has both is timed with both. Rows are those of
:class:`Layout.BY_SOURCE`: a token once per destination rank, which the framework then permutes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.tools.world import World


class Calls(NamedTuple):
    """DeepEP's operations on the tensors of one rank."""

    dispatch: Callable[[Any, Any], Any]
    """``dispatch(x, handle)`` on a route that is known: the received rows. x: [T, H], or (e4m3, scales)."""
    combine: Callable[[Tensor, Any], Tensor]
    """``combine(rows, handle)``: [T, H]."""
    first: Callable[[Any], tuple[Any, Any]]
    """``first(x)``: route and dispatch, as a training step calls them; gives the received rows and the handle."""
    close: Callable[[], None]


def missing(world: World) -> str | None:
    """Why DeepEP is not timed on these ranks, or None."""
    try:
        module = importlib.import_module("deep_ep")
    except ImportError as error:
        return f"deep_ep is not installed ({error})"
    if not world.on_gpu and getattr(module, "provided_by", None) is None:
        return "deep_ep needs GPUs"
    if world.size == 1:
        return "deep_ep needs several ranks"
    return None


def version() -> str:
    """Of the installed DeepEP, or what stands in for it."""
    module = importlib.import_module("deep_ep")
    if (stand_in := getattr(module, "provided_by", None)) is not None:
        return f"of {stand_in}"
    try:
        return importlib.metadata.version("deep_ep")
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version"))


def interfaces(topk_idx: Tensor, topk_weights: Tensor, hidden: int, experts: int, most_tokens: int) -> dict[str, Calls]:
    """What is installed, by the name in tables. Collective.

    Args:
        topk_idx: [T, K] int64 experts of this rank's tokens.
        topk_weights: [T, K] float32.
        hidden: H.
        experts: of the whole group.
        most_tokens: T of the rank with the most tokens.
    """
    module = importlib.import_module("deep_ep")
    name, found = f"deep_ep {version()}", {}
    if hasattr(module, "Buffer"):
        found[f"{name} Buffer"] = _buffer(module, topk_idx, topk_weights, hidden, experts)
    if hasattr(module, "ElasticBuffer"):
        found[f"{name} ElasticBuffer"] = _elastic(module, topk_idx, topk_weights, hidden, experts, most_tokens)
    return found


def _buffer(module: Any, topk_idx: Tensor, topk_weights: Tensor, hidden: int, experts: int) -> Calls:
    """DeepEP 1.x, sized as its documentation does it."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    configs = (module.Buffer.get_dispatch_config(ranks), module.Buffer.get_combine_config(ranks))
    row_bytes = hidden * 2
    nvl_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
    rdma_bytes = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
    buffer = module.Buffer(group, nvl_bytes, rdma_bytes)
    indices = topk_idx.to(getattr(module, "topk_idx_t", torch.int64))

    def first(x: Any) -> tuple[Any, Any]:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(indices, experts)
        rows, _, _, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=indices,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        return rows, handle

    return Calls(
        dispatch=lambda x, handle: buffer.dispatch(x, handle=handle)[0],
        combine=lambda rows, handle: buffer.combine(rows, handle)[0],
        first=first,
        close=lambda: None,
    )


def _elastic(module: Any, topk_idx: Tensor, topk_weights: Tensor, hidden: int, experts: int, most_tokens: int) -> Calls:
    """DeepEP 2.x."""
    options = {"num_max_tokens_per_rank": most_tokens, "hidden": hidden, "num_topk": topk_idx.shape[1]}
    buffer = module.ElasticBuffer(dist.group.WORLD, **options)

    def first(x: Any) -> tuple[Any, Any]:
        rows, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=topk_weights, num_experts=experts, num_max_tokens_per_rank=most_tokens
        )
        return rows, handle

    return Calls(
        dispatch=lambda x, handle: buffer.dispatch(x, handle=handle)[0],
        combine=lambda rows, handle: buffer.combine(rows, handle)[0],
        first=first,
        close=buffer.destroy,
    )
