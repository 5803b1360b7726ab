"""Rail transports: how rows cross the network between nodes.

A rank exchanges rows only with the ranks that have the same place in the other nodes, its *rail*. The hierarchical
backend packs each token (row, scales, weights) into one row of bytes, gives every rail rank one *block* of rows, and
moves a batch in *chunks*, so that one chunk crosses while the chunk before it is worked on inside the node.

A transport implements :class:`Rail`. :class:`TorchRail` (NCCL on GPUs, gloo on CPUs) is the default: it runs wherever
torch.distributed does.

The host knows the size of every block. In plans of exact size a block holds what crosses and nothing else. Where sizes
are fixed beforehand the host does not wait for counts: blocks have the largest possible size, and the device knows how
many rows of each are used (:attr:`Blocks.used`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import Phase
from deepep_moe.backends.exchange import Exchange, Transfer, given_up
from deepep_moe.config import DispatcherConfig


class Blocks(NamedTuple):
    """The rows for each rank of the rail, or from each: one block of consecutive rows per rank, in rank order."""

    sizes: tuple[int, ...]
    """[N] rows of each block. The block of this rank itself has none."""
    used: Tensor | None = None
    """[N] int32 on the device: how many rows of each block, from its first on, carry data. None: all of them. The
    receiver's numbers are those of the senders. Unused rows may cross or not; they are not read."""


class Rail(Protocol):
    """Moves rows along one rail of N ranks.

    Calls are collective over the rail. Work is enqueued on the current stream and may be captured in a CUDA graph if
    the transport has run once before. No wait is unbounded: failures are raised as
    :class:`~deepep_moe.errors.PeerError` by the call or, where the device finds out later, by :meth:`check`.

    Dispatch and combine are one *operation* each: :meth:`buffers` once, :meth:`start` for chunks 0 to
    ``num_chunks - 1``, and each chunk's ``finish`` once, in the same order. Every chunk is finished before the next
    operation begins. Every operation exchanges with every other rank of the rail, be it blocks without rows.
    """

    name: str
    moves_unused_rows: bool
    """Whether whole blocks cross, used or not. If so, blocks are cut to what they carry in plans of exact size. If
    not, all blocks of a chunk have one size on all ranks, which lets a sender know where they lie at the receiver."""

    @property
    def usable(self) -> bool:
        """False once an operation failed."""
        ...

    def buffers(self, send_rows: int, recv_rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        """Begin an operation: memory for the rows that it sends and for those that it receives.

        ``[rows, row_bytes]`` uint8, uninitialised; valid until the next operation begins. ``row_bytes`` is a multiple
        of 16 on GPUs. Unless the transport moves unused rows, the numbers are equal on all ranks.
        """
        ...

    def start(
        self, phase: Phase, sent: Tensor, received: Tensor, send: Blocks, recv: Blocks, chunk: int, num_chunks: int
    ) -> Callable[[], object]:
        """Start to move one chunk.

        Args:
            sent: [sum(send.sizes), row_bytes] uint8, consecutive rows of the send buffer, already filled.
            received: [sum(recv.sizes), row_bytes] uint8, consecutive rows of the receive buffer.
            send: the blocks of ``sent``.
            recv: the blocks of ``received``.

        Returns:
            ``finish``: makes the current stream wait until the used rows of ``received`` are there.
        """
        ...

    def check(self) -> None:
        """Raise what went wrong in work already enqueued. Local, does not wait for the device."""
        ...

    def break_off(self, phase: Phase, reason: str) -> None:
        """Leave an operation that the rail's other ranks are in: they raise instead of waiting."""
        ...

    def close(self) -> None:
        """Free resources. Collective, idempotent."""
        ...


class TorchRail:
    """:class:`Rail` by the all-to-all of torch.distributed: NCCL on GPUs, gloo on CPUs.

    Args:
        group: the ranks of the rail.
        device: where rows live.
        config: ``timeout_seconds`` applies.
    """

    moves_unused_rows = True

    def __init__(self, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> None:
        self.name, self.group = self.name_on(device), group
        self._exchange = Exchange(group, device, config.timeout_seconds)

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

    def buffers(self, send_rows: int, recv_rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        device = self._exchange.device
        return (
            torch.empty((send_rows, row_bytes), dtype=torch.uint8, device=device),
            torch.empty((recv_rows, row_bytes), dtype=torch.uint8, device=device),
        )

    def start(
        self, phase: Phase, sent: Tensor, received: Tensor, send: Blocks, recv: Blocks, chunk: int, num_chunks: int
    ) -> Callable[[], object]:
        return self._exchange.start(phase, Transfer(sent, send.sizes, recv.sizes, received))

    def check(self) -> None:
        pass  # calls raise what went wrong themselves

    def break_off(self, phase: Phase, reason: str) -> None:
        self._exchange.break_off(phase, reason)

    def close(self) -> None:
        pass
