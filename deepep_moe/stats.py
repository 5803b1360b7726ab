"""What a dispatcher moved, as numbers for a trainer's logs: counted on the device, read when the trainer wants to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_moe.backends.base import Plan


class Statistics:
    """Sums over the calls of one dispatcher on rank ``rank`` of its group."""

    def __init__(self, rank: int, num_local_experts: int, device: torch.device) -> None:
        self.rank = rank
        self._load = torch.zeros(num_local_experts, dtype=torch.int64, device=device)
        self._sent = torch.zeros(2, dtype=torch.int64, device=device)  # rows to other ranks, their bytes
        self._dispatches = self._tokens = 0

    @torch.no_grad()
    def count(self, plan: Plan, row_bytes: int) -> None:
        """Add a dispatch by ``plan`` of rows of ``row_bytes``. A few operations on small tensors; no host wait."""
        self._dispatches += 1
        self._tokens += plan.num_tokens
        self._load += plan.expert_counts
        rows = plan.rank_prefix.diff(dim=0, prepend=plan.rank_prefix.new_zeros((1, plan.num_ranks)))[self.rank]
        others = (rows.sum() - rows[self.rank]).clamp(min=0)  # a plan that overflowed has -1
        self._sent += torch.stack([others, others * row_bytes])

    def take(self) -> dict[str, Any]:
        """The sums, which begin again at 0."""
        taken: dict[str, int | Tensor] = {
            "dispatches": self._dispatches,
            "tokens": self._tokens,
            "load": self._load,
            "sent_rows": self._sent[0],
            "sent_bytes": self._sent[1],
        }
        self._dispatches = self._tokens = 0
        self._load, self._sent = torch.zeros_like(self._load), torch.zeros_like(self._sent)
        return taken
