"""Shares of tokens under tensor parallelism: all ranks of the group hold the same tokens, each dispatches its part.

A gradient on such tokens is the same on every rank of the group and already whole, as in DeepSpeed's own layer: taking
a share is gathering backwards, and gathering is taking a share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size
from torch import Tensor


def size() -> int:
    """Ranks that hold the same tokens."""
    return int(bwc_tensor_model_parallel_world_size(groups.mpu))


def experts_are_sliced() -> bool:
    """Whether the experts are cut over the tensor-parallel group too."""
    return int(groups._get_expert_model_parallel_world_size()) > 1


def own_share(tensor: Tensor, fill: int = 0) -> Tensor:
    """This rank's rows of ``tensor [T, ...]``, which is filled up with rows of ``fill`` to equal shares."""
    return _OwnShare.apply(F.pad(tensor, (0, 0, 0, -len(tensor) % size()), value=fill))


def gather_shares(share: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of all ranks' shares."""
    return _GatherShares.apply(share)[:count]


class _OwnShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _take(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _gather(gradient)


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        return _gather(share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _take(gradient)


def _take(tensor: Tensor) -> Tensor:
    rank = dist.get_rank(bwc_tensor_model_parallel_group(groups.mpu))
    return tensor.chunk(size())[rank].clone(memory_format=torch.contiguous_format) if len(tensor) else tensor.clone()


def _gather(share: Tensor) -> Tensor:
    whole = share.new_empty(size() * share.shape[0], *share.shape[1:])
    dist.all_gather_into_tensor(whole, share.contiguous(), group=bwc_tensor_model_parallel_group(groups.mpu))
    return whole
