"""From a routing map, as Megatron-Core's routers give it, to the expert indices that a plan wants."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe.ops import watched


def routes(routing_map: Tensor, topk: int) -> Tensor:
    """``routing_map [T, E]`` bool -> ``[T, topk]`` int64 experts in ascending order, -1 where a row has fewer.

    Never waits for the device. A row with n > ``topk`` routes gets the index E + n, which a plan refuses by name.
    """
    if watched(routing_map):
        return _routes_op(routing_map, topk)
    return _by_kernel(routing_map, topk) if routing_map.is_cuda else _by_sorting(routing_map, topk)


@torch.library.custom_op("deepep_moe::routes", mutates_args=())
def _routes_op(routing_map: Tensor, topk: int) -> Tensor:
    return _by_sorting(routing_map, topk)


def _by_sorting(routing_map: Tensor, topk: int) -> Tensor:
    experts = routing_map.shape[1]
    # Number the routes so that topk lists them in expert order: its result has a fixed shape, and no ties matter.
    number = torch.arange(experts, 0, -1, dtype=torch.int32, device=routing_map.device)
    width = min(topk, experts)
    found = (routing_map * number).topk(width, dim=1).values
    index = torch.where(found > 0, experts - found, -1).long()
    count = routing_map.sum(dim=1)
    index[:, 0] = torch.where(count > topk, experts + count, index[:, 0])
    return index if width == topk else torch.nn.functional.pad(index, (0, topk - width), value=-1)


@_routes_op.register_kernel("cuda")
def _by_kernel(routing_map: Tensor, topk: int) -> Tensor:
    try:
        from deepep_moe import _C
    except ImportError:
        return _by_sorting(routing_map, topk)
    tokens, experts = routing_map.shape
    index = torch.empty((tokens, topk), dtype=torch.int64, device=routing_map.device)
    stream = torch.cuda.current_stream(routing_map.device).cuda_stream
    with torch.cuda.device(routing_map.device):
        _C.routes(routing_map.contiguous().data_ptr(), tokens, experts, topk, index.data_ptr(), stream)
    return index


@_routes_op.register_fake
def _(routing_map: Tensor, topk: int) -> Tensor:
    return routing_map.new_empty((routing_map.shape[0], topk), dtype=torch.int64)
