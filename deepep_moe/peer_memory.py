"""Symmetric memory: memory of this GPU that every rank of the group can write.

Implemented by PyTorch's symmetric memory (``torch.distributed._symmetric_memory``), which exchanges handles over the
group's store. So the group may be gloo and have any members, and several ranks may share a GPU. Between hosts of one
NVLink domain it uses fabric handles where the platform supports them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from deepep_moe.errors import CapacityError, PeerError

# By default PyTorch refuses several ranks on one GPU, which the tests use to run large groups on few GPUs.
_SHARE_GPU = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class PeerMemory:
    """``num_bytes`` of zeroed memory on every rank of ``group``. Collective to create; freed with the object.

    Args:
        group: the ranks.
        device: this rank's GPU.
        num_bytes: size on each rank.
        meet: called between allocation and exchange, with the error if the allocation failed. It must raise on every
            rank unless all ranks succeeded. Without it, the other ranks wait for a rank that failed.

    Attributes:
        addresses: address of each rank's memory in this process, by group rank.
        local: [num_bytes] uint8, this rank's memory.

    Raises:
        CapacityError: this rank has not enough memory.
        PeerError: the memory could not be mapped.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        num_bytes: int,
        meet: Callable[[CapacityError | None], None] | None = None,
    ) -> None:
        os.environ.setdefault(_SHARE_GPU, "1")
        refused: CapacityError | None = None
        try:
            self.local: Tensor = _allocate(num_bytes, device)
        except RuntimeError as error:
            refused = CapacityError(f"no memory for {num_bytes} bytes on {device}: {error}")
            refused.__cause__ = error
        if meet is not None:
            meet(refused)
        if refused is not None:
            raise refused
        try:
            torch.cuda.synchronize(device)  # before the rendezvous, so that peers see zeros
            self._handle = symmetric_memory.rendezvous(self.local, group)
        except RuntimeError as error:
            raise PeerError(
                f"mapping {num_bytes} bytes of peer memory on {device} failed in a group of "
                f"{dist.get_world_size(group)} ranks: {error}"
            ) from error
        self.addresses: list[int] = [int(address) for address in self._handle.buffer_ptrs]


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    def zeros() -> Tensor:
        return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device).zero_()

    try:
        return zeros()
    except RuntimeError:  # not allocated by PyTorch's caching allocator, which may hold the memory that is missing
        torch.cuda.empty_cache()
        return zeros()
