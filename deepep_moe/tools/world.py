"""The ranks of one run of a tool, benchmark or recipe: started by torchrun, or one rank alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepep_moe.backends.exchange import gather

_SPIN_CYCLES = 2_000_000  # about 1 ms
_TIMEOUT_SECONDS = 300.0  # longest wait for another rank


@dataclass(frozen=True)
class World:
    """This rank, and all ranks of the run."""

    rank: int
    size: int
    device: torch.device
    collectives: str = "gloo"
    """The torch.distributed backend for tensors of ``device``: ``nccl``; ``gloo`` on CPUs and for ranks on one GPU."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def can_all_to_all(self) -> bool:
        """Whether torch.distributed has an all-to-all for tensors of ``device``."""
        return self.collectives == "nccl" or not self.on_gpu

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def align(self, busy: int = 0) -> None:
        """Let all ranks start together. With NCCL the devices meet, and what is enqueued next starts on all at once.

        ``busy``: for about so many milliseconds the GPUs spin before, and the host goes on meanwhile.
        """
        self.synchronize()
        if busy:
            self.spin(busy)
        meeting = self.device if self.collectives == "nccl" else torch.device("cpu")
        dist.all_reduce(torch.zeros(1, dtype=torch.float32, device=meeting))

    def spin(self, milliseconds: int = 1) -> None:
        """Keep this rank's GPU busy for about so long, while the host can enqueue more work."""
        torch.cuda._sleep(milliseconds * _SPIN_CYCLES)

    def meet(self) -> None:
        """:meth:`align`, and go on when the device is idle again."""
        self.align()
        self.synchronize()

    def largest(self, values: list[float]) -> list[float]:
        """Each value's maximum over the ranks."""
        result = torch.tensor(values, dtype=torch.float64, device="cpu")
        if values:
            dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return list(result.tolist())

    def mean(self, value: float) -> float:
        """Mean of one number over the ranks."""
        total = torch.tensor([value], dtype=torch.float32, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.size

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on this rank's device; the host does not wait for the copy to a GPU."""
        if self.on_gpu:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank: what JSON can hold (torch's own gather of objects needs NumPy)."""
        group = dist.group.WORLD
        assert group is not None  # made by ranks_of_this_run
        return gather("gather", group, self.device, _TIMEOUT_SECONDS, value)


@contextmanager
def ranks_of_this_run() -> Iterator[World]:
    """Join torchrun's ranks (without torchrun: one rank alone) on their GPUs, or on the CPU where there are none."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # NCCL refuses two ranks on one GPU; gloo serves CPU tensors in any case.
    own_gpu = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    groups = "cpu:gloo,cuda:nccl" if own_gpu else "gloo"
    timeout = timedelta(seconds=_TIMEOUT_SECONDS)
    if "RANK" in os.environ:
        dist.init_process_group(groups, timeout=timeout)
    else:
        dist.init_process_group(groups, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, "nccl" if own_gpu else "gloo")
    finally:
        dist.destroy_process_group()
