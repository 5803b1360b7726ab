"""Rows between nodes: what the hierarchical backend asks of a network, and the one transport that every cluster has.

A rank exchanges rows with the ranks that have its place in the other nodes, its *rail*. A transport moves contiguous
blocks of rows, one per rail rank; what they mean is the backend's business. Rows of a chunk are sent while the chunk
before is worked on, so a transfer begins and ends in two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import Phase
from deepep_moe.backends.exchange import Exchange, given_up


class Rail(Protocol):
    """Moves rows along one rail. Calls are collective over it and bounded; work is enqueued on the current stream."""

    name: str
    needs_host: bool
    """Whether the host must know how many rows come. Then nothing can be captured in a CUDA graph."""

    @property
    def usable(self) -> bool:
        """False once an operation failed."""
        ...

    def start(
        self, phase: Phase, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Begin to send ``send_counts[r]`` consecutive ``rows [n, ...]``, of any dtype, to each rail rank r.

        Returns what gives the received rows, in order of the rail's ranks, for use on the current stream.
        """
        ...

    def break_off(self, phase: Phase, reason: str) -> None:
        """Leave an operation that the rail's other ranks are in: they raise instead of waiting."""
        ...


class TorchRail:
    """:class:`Rail` by the all-to-all of torch.distributed: NCCL on GPUs, gloo on CPUs."""

    needs_host = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_seconds: float) -> None:
        self.name = self.name_on(device)
        self._exchange = Exchange(group, device, timeout_seconds)

    @staticmethod
    def name_on(device: torch.device) -> str:
        return "nccl" if device.type == "cuda" else "gloo"

    @staticmethod
    def supports(group: dist.ProcessGroup, device: torch.device) -> str | None:
        """The reason why ``group`` cannot be used, or None. Local."""
        return given_up(group, device)

    @property
    def usable(self) -> bool:
        return self._exchange.usable

    def start(
        self, phase: Phase, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Callable[[], Tensor]:
        return self._exchange.start_all_to_all(phase, rows, send_counts, recv_counts)

    def break_off(self, phase: Phase, reason: str) -> None:
        self._exchange.break_off(phase, reason)
