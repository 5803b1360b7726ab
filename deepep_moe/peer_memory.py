"""Memory of this GPU that every rank of the group can write: allocate, exchange, map, free.

PyTorch's symmetric memory does the work (``torch.distributed._symmetric_memory``): it exchanges handles over the
group's store, so the group may be gloo, need not be contiguous, and several ranks may share a GPU. Between hosts of
one NVLink domain it uses fabric handles where the platform has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from deepep_moe.errors import CapacityError, PeerError

# torch refuses several ranks on one GPU, which is how larger groups are tested on few, unless told otherwise.
_SHARE_GPU = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class PeerMemory:
    """``num_bytes`` of zeroed memory on every rank of ``group``. Collective to create; dropping it frees it.

    Args:
        meet: called once the memory is allocated here, or could not be (then with the reason), before it is exchanged:
            raises on every rank unless all have come so far. Without it a rank that fails leaves the others waiting.

    Attributes:
        addresses: of each rank's memory, by group rank, as mapped in this process.
        local: [num_bytes] uint8, this rank's memory.
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
            torch.cuda.synchronize(device)  # the rendezvous is also the barrier: nobody sees memory not yet zero
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
    except RuntimeError:  # it does not come from PyTorch's allocator, which may sit on free memory
        torch.cuda.empty_cache()
        return zeros()
