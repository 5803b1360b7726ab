"""The rail transport ``nvshmem``: kernels write rows and signals directly into the memory of GPUs in other nodes.

The host takes no part in a transfer. Row counts stay on the device (:attr:`Blocks.used`), so a layer over several nodes
can be captured in a CUDA graph after one eager run. The protocol is described in csrc/nvshmem/rail.cu.

Rows are sent from and received in symmetric memory. It has two regions, between which operations alternate. They grow
when a batch needs more, except during graph capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import extension, nvshmem
from deepep_moe.backends.base import Phase
from deepep_moe.backends.rail import Blocks
from deepep_moe.config import DispatcherConfig
from deepep_moe.domain import enter_stream
from deepep_moe.errors import CapacityError, HandleError, PeerError, PeerTimeoutError

_LEAST_BYTES = 64 << 10  # of a region
_WORD_BYTES = 8
_kept_alive: list[Tensor] = []  # of rails that were dropped while a CUDA graph or a pending kernel may still use them


@dataclass
class _Region:
    """Symmetric memory, used by one operation at a time."""

    part: nvshmem.Part | None = None
    captured: bool = False
    """Whether a CUDA graph uses ``part``."""
    kept: list[nvshmem.Part] = field(default_factory=list)
    """Replaced parts that a CUDA graph still uses."""


class NvshmemRail:
    """:class:`~deepep_moe.backends.rail.Rail` by NVSHMEM. Collective to create, over ``group``.

    Args:
        rail: the ranks of the rail.
        device: this rank's GPU.
        config: ``nvshmem_bytes`` and ``timeout_seconds`` apply.
        group: all ranks of the backend. NVSHMEM is initialised over it unless that was done before.
    """

    name = "nvshmem"
    moves_unused_rows = False

    def __init__(
        self, rail: dist.ProcessGroup, device: torch.device, config: DispatcherConfig, group: dist.ProcessGroup
    ) -> None:
        self.device = device
        self._closed = True  # until it is complete
        self._module = nvshmem.module()
        self._timeout_seconds = config.timeout_seconds
        self._peers = nvshmem.initialize(group, device, config).of(rail)
        self._rank, self._ranks = dist.get_rank(rail), dist.get_world_size(rail)
        self._names = [dist.get_group_rank(group, dist.get_global_rank(rail, one)) for one in range(self._ranks)]
        """[N] ranks in ``group``, for error messages."""
        self._failure: Exception | None = None
        self._regions = [_Region() for _ in range(self._module.RAIL_REGIONS)]
        self._turn = 0  # the region of the current operation
        if self._ranks == 1:
            self._closed = False
            return
        self._signals = self._peers.take(self._module.rail_signal_bytes(self._ranks))
        self._record = torch.zeros(self._module.RAIL_FAILURE_WORDS, dtype=torch.int64, device="cpu", pin_memory=True)
        self._state = torch.zeros(self._module.RAIL_STATE_BYTES // _WORD_BYTES, dtype=torch.int64, device=device)
        self._pes = torch.tensor(self._peers.pes, dtype=torch.int32, device="cpu").to(device)
        self._args = [
            self._module.RailArgs(
                record=self._record.data_ptr(),
                state=self._state.data_ptr(),
                signals=self._signals.address,
                pes=self._pes.data_ptr(),
                rank=self._rank,
                num_ranks=self._ranks,
                region=region,
                timeout_seconds=config.timeout_seconds,
            )
            for region in range(self._module.RAIL_REGIONS)
        ]
        torch.cuda.synchronize(device)
        self._closed = False

    @staticmethod
    def supports(device: torch.device) -> str | None:
        """The reason why this transport cannot serve ``device``, or None. Local."""
        return nvshmem.why_not_on(device)

    @property
    def usable(self) -> bool:
        return self._failure is None and not self._closed

    # -- operations ----------------------------------------------------------------------------------------------

    def buffers(self, send_rows: int, recv_rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        self._check_open()
        sent_bytes, received_bytes = send_rows * row_bytes, recv_rows * row_bytes
        half = -(-sent_bytes // nvshmem.PART_ALIGNMENT) * nvshmem.PART_ALIGNMENT
        if self._ranks == 1:
            memory = torch.empty(half + received_bytes, dtype=torch.uint8, device=self.device)
        else:
            self._turn ^= 1
            memory = self._memory(self._turn, half + received_bytes)
            self._module.rail_begin(self._args[self._turn], enter_stream(self._index))
        sent, received = memory[:sent_bytes], memory[half : half + received_bytes]
        return sent.view(send_rows, row_bytes), received.view(recv_rows, row_bytes)

    def start(
        self, phase: Phase, sent: Tensor, received: Tensor, send: Blocks, recv: Blocks, chunk: int, num_chunks: int
    ) -> Callable[[], object]:
        self._check_open()
        if self._ranks == 1:
            return lambda: None
        if num_chunks > self._module.MAX_CHUNKS:
            raise ValueError(f"num_chunks = {num_chunks}: at most {self._module.MAX_CHUNKS}")
        args, module = self._args[self._turn], self._module
        used = None if send.used is None else send.used.contiguous()  # a slice of a table of all chunks
        described = module.RailChunk(
            chunk=chunk,
            last=chunk == num_chunks - 1,
            block_rows=sent.shape[0] // (self._ranks - 1),
            row_bytes=sent.shape[1],
            used=extension.address(used),
            sent=sent.data_ptr(),
            received=received.data_ptr(),
        )
        module.rail_put(args, described, enter_stream(self._index))
        return lambda: module.rail_wait(args, described, enter_stream(self._index))

    # -- memory --------------------------------------------------------------------------------------------------

    @property
    def _index(self) -> int:
        index: int = self.device.index
        return index

    def _memory(self, number: int, num_bytes: int) -> Tensor:
        """The memory of a region, grown to ``num_bytes`` if necessary. ``num_bytes`` is equal on all ranks."""
        region, capturing = self._regions[number], torch.cuda.is_current_stream_capturing()
        if region.part is None or region.part.num_bytes < num_bytes:
            if capturing:
                raise CapacityError(
                    f"{num_bytes} bytes of symmetric memory are needed, and memory cannot grow during CUDA graph "
                    "capture: run the layer once before the capture, with the same number of tokens"
                )
            self._grow(num_bytes)
        region.captured = region.captured or capturing
        assert region.part is not None
        return region.part.memory

    def _grow(self, num_bytes: int) -> None:
        """Replace the memory of all regions. They are idle between operations."""
        torch.cuda.synchronize(self.device)
        for region in self._regions:
            if region.part is not None and region.captured:
                region.kept.append(region.part)
            elif region.part is not None:
                region.part.free()
            region.part, region.captured = None, False
        for region in self._regions:
            region.part = self._peers.take(max(_LEAST_BYTES, num_bytes * 9 // 8))

    # -- failure and end -----------------------------------------------------------------------------------------

    def check(self) -> None:
        if self._failure is None and self._ranks > 1 and int(self._record[0]):
            _, phase, peer, expected, seen = self._record.tolist()
            self._fail(self._error(phase, self._names[peer], expected, seen))
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _error(self, phase: int, peer: int, expected: int, seen: int) -> PeerError:
        own, kind = self._names[self._rank], self._module.RailPhase
        if phase == kind.GIVEN_UP:
            return PeerError(
                f"rank {peer} gave up between nodes while rank {own} waited for it; its own error says why. "
                "Destroy this buffer or dispatcher."
            )
        what = "to begin the next operation" if phase == kind.START else "for its rows"
        return PeerTimeoutError(
            f"rank {own} waited {self._timeout_seconds:g} s for rank {peer} {what} between nodes (nvshmem): "
            f"it is at operation {seen}, {expected} was expected. Destroy this buffer or dispatcher."
        )

    def _fail(self, error: Exception) -> None:
        self._failure = error
        nvshmem.do_not_finalize()

    def break_off(self, phase: Phase, reason: str) -> None:
        if self._failure is None and not self._closed and self._ranks > 1:
            self._fail(PeerError(f"{phase}: this rank broke off: {reason}"))
            if not torch.cuda.is_current_stream_capturing():
                self._module.rail_give_up(self._args[0], enter_stream(self._index))

    def _check_open(self) -> None:
        if self._closed:
            raise HandleError("this backend was closed; make a new dispatcher or Buffer")
        self.check()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._failure is not None or self._ranks == 1:
            return  # after a failure transfers may be pending, so the memory is not reused
        torch.cuda.synchronize(self.device)
        for part in self._parts():
            part.free()

    def __del__(self) -> None:
        if self._closed or self._ranks == 1:
            return
        tensors = [self._record, self._state, self._pes]
        if self._failure is not None or any(region.captured or region.kept for region in self._regions):
            _kept_alive.extend(tensors)
        else:
            nvshmem.release(self._parts(), tensors)

    def _parts(self) -> list[nvshmem.Part]:
        """The memory of all regions. Signals are not reused: one of the last operation may arrive after its rows."""
        current = [region.part for region in self._regions if region.part is not None]
        return current + [part for region in self._regions for part in region.kept]
