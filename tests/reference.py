"""What the library must compute, in plain PyTorch and Python: no communication, no layouts, no cleverness."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_moe(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, expert_matrices: Tensor) -> Tensor:
    """``out[t] = sum_k weights[t, k] * tanh(x[t] @ matrices[topk_idx[t, k]])`` in fp32; routes of -1 add nothing."""
    out = torch.zeros(x.shape[0], expert_matrices.shape[2])
    for k in range(topk_idx.shape[1]):
        matrices = expert_matrices[topk_idx[:, k].clamp(min=0)].float()
        expert_out = torch.tanh(torch.einsum("th,tho->to", x.float(), matrices))
        out = out + torch.where(topk_idx[:, k : k + 1] >= 0, topk_weights[:, k : k + 1].float() * expert_out, 0.0)
    return out


def rank_rows(topk_idx_of_ranks: list[Tensor], rank: int, experts_per_rank: int) -> list[tuple[int, int]]:
    """(source rank, token) of every row that ``rank`` receives in rank layout."""
    first, last = rank * experts_per_rank, (rank + 1) * experts_per_rank - 1
    return [
        (source, token)
        for source, topk_idx in enumerate(topk_idx_of_ranks)
        for token, experts in enumerate(topk_idx.tolist())
        if any(first <= expert <= last for expert in experts)
    ]


def expert_rows(
    topk_idx_of_ranks: list[Tensor], rank: int, experts_per_rank: int, alignment: int
) -> list[list[tuple[int, int, int] | None]]:
    """(source rank, token, top-k position) of every row of each local expert's group; None is padding."""
    groups: list[list[tuple[int, int, int] | None]] = []
    for expert in range(rank * experts_per_rank, (rank + 1) * experts_per_rank):
        group: list[tuple[int, int, int] | None] = [
            (source, token, k)
            for source, topk_idx in enumerate(topk_idx_of_ranks)
            for token, chosen in enumerate(topk_idx.tolist())
            for k, chosen_expert in enumerate(chosen)
            if chosen_expert == expert
        ]
        groups.append(group + [None] * (-len(group) % alignment))
    return groups
