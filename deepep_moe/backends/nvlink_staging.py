"""Staging memory of the nvlink backend: symmetric memory for rows in flight, grown on demand."""

from __future__ import annotations

import logging

import torch

from deepep_moe.domain import Domain
from deepep_moe.errors import CapacityError
from deepep_moe.extension import _C
from deepep_moe.peer_memory import PeerMemory

_log = logging.getLogger(__name__)


class Staging:
    """Symmetric memory for ``tokens`` tokens of each rank, with ``topk`` places and a row of ``pitch`` bytes each.

    The three sizes are equal on all ranks, and 0 before the first :meth:`grow`.
    """

    def __init__(self, domain: Domain, engine: _C.ThroughputEngine) -> None:
        self._domain, self._engine = domain, engine
        self._memory: PeerMemory | None = None
        self._captured: list[PeerMemory] = []  # replaced, but still used by captured graphs
        self.tokens = self.topk = self.pitch = 0

    def serves(self, tokens: int, topk: int, pitch: int) -> bool:
        """Whether staging is large enough."""
        return tokens <= self.tokens and topk <= self.topk and pitch <= self.pitch

    def grow(self, tokens: int, topk: int, pitch: int, stream: int) -> None:
        """Make staging at least this large. Collective: if ranks pass different sizes, all raise RankMismatchError."""
        domain, engine = self._domain, self._engine
        tokens, topk, pitch = max(tokens, self.tokens, 1), max(topk, self.topk), max(pitch, self.pitch)
        num_bytes = _C.ThroughputEngine.staging_bytes(domain.size, tokens, topk, pitch)
        if torch.cuda.is_current_stream_capturing():
            raise CapacityError(
                f"staging must grow to {num_bytes} bytes ({tokens} tokens per rank, rows of {pitch} bytes), which a "
                "CUDA graph cannot capture: set max_tokens_per_rank and run once before capturing"
            )

        def meet(refused: CapacityError | None) -> None:
            if refused is None:
                engine.meet_to_grow(tokens, topk, pitch, stream)
            else:
                engine.refuse_operation(0, stream)
            torch.cuda.synchronize(domain.device)  # also ends the use of the old memory by kernels
            if refused is None:
                domain.raise_failure()

        # Keep the old memory until the new memory exists: if that fails, calls that fit the old one still work.
        memory = PeerMemory(domain.group, domain.device, num_bytes, meet)
        if domain.captured and self._memory is not None:
            self._captured.append(self._memory)
        self._memory = memory
        engine.set_staging(memory.addresses, tokens, topk, num_bytes, stream)
        self.tokens, self.topk, self.pitch = tokens, topk, pitch
        _log.info(
            "deepep_moe: nvlink staging is %d bytes: %d tokens per rank, rows of %d bytes", num_bytes, tokens, pitch
        )

    def free(self) -> None:
        """Free all memory. No kernel that uses it may be running."""
        self._memory = None
        self._captured.clear()
