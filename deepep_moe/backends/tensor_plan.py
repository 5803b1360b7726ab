"""A plan that holds its tensors, and the members that plans of all backends derive from their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep_moe.backends.base import Layout, Plan

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class PlanBase:
    """Base of all implementations of :class:`Plan`: the members that follow from the others."""

    @cached_property
    def routes(self) -> dict[Layout, object]:
        """The plan as an argument of kernels, by layout; made when it is needed."""
        return {}

    def addresses(self: Plan) -> tuple[int, int, int, int]:
        parts = (self.send_slot, self.counted, self.received, self.row_recv)
        assert all(part.is_contiguous() for part in parts)  # kernels take addresses, not strides
        send_slot, counted, received, row_recv = (part.data_ptr() for part in parts)
        return send_slot, counted, received, row_recv

    @property
    def owner(self: Plan) -> int:
        return int(self.identity[0])

    @property
    def number(self: Plan) -> int:
        return int(self.identity[1])

    @property
    def rank_prefix(self: Plan) -> Tensor:
        ranks = self.num_ranks
        return self.counted[: ranks * ranks].view(ranks, ranks)

    @property
    def expert_counts(self: Plan) -> Tensor:
        ranks = self.num_ranks
        return self.counted[ranks * ranks :][: self.num_experts // ranks]

    @property
    def expert_offsets(self: Plan) -> Tensor:
        ranks = self.num_ranks
        return self.counted[ranks * ranks + self.num_experts // ranks :]

    @property
    def recv_src_idx(self: Plan) -> Tensor:
        return self.received[:, 0]

    @property
    def recv_topk_idx(self: Plan) -> Tensor:
        return self.received[:, 1 : 1 + self.num_topk]

    @property
    def recv_rows(self: Plan) -> Tensor:
        return self.received[:, 1 + self.num_topk :]

    def tensors(self: Plan) -> list[Tensor | None]:
        identity = self.identity
        if not isinstance(identity, Tensor):
            identity = torch.tensor(identity, dtype=torch.int64, device="cpu")
        return [
            self.topk_idx,
            identity,
            self.send_slot,
            self.counted,
            self.received,
            self.row_recv,
            self.expert_counts_host,
            self.extra,
        ]

    def memory(self: Plan) -> list[Tensor]:
        parts = (self.topk_idx, self.send_slot, self.counted, self.received, self.row_recv, self.extra)
        return [part for part in parts if part is not None]


@dataclass(eq=False)
class TensorPlan(PlanBase):
    """A :class:`Plan` that holds its tensors, and takes its sizes from their shapes; see there for each field."""

    num_experts: int
    alignment: int
    identity: tuple[int, int] | Tensor
    topk_idx: Tensor
    send_slot: Tensor
    counted: Tensor
    received: Tensor
    row_recv: Tensor
    expert_counts_host: Tensor | None
    extra: Tensor | None = None

    @classmethod
    def from_tensors(cls, num_experts: int, alignment: int, tensors: list[Tensor | None]) -> TensorPlan:
        """Inverse of :meth:`Plan.tensors`."""
        topk_idx, identity, *others = tensors
        return cls(num_experts, alignment, identity, topk_idx, *others)  # type: ignore[arg-type]

    @property
    def num_tokens(self) -> int:
        return self.topk_idx.shape[0]

    @property
    def num_ranks(self) -> int:
        return self.send_slot.shape[1]

    @property
    def num_topk(self) -> int:
        return self.topk_idx.shape[1]

    @property
    def num_recv(self) -> int:
        return self.received.shape[0]

    @property
    def num_rows(self) -> int:
        return self.row_recv.shape[0]

    def known_sizes(self) -> tuple[int, int]:
        return self.num_recv, self.num_rows


def is_plan(value: object) -> TypeIs[Plan]:
    """Whether ``value`` is a plan. (``isinstance`` with a protocol would read its properties, some of which wait.)"""
    return isinstance(value, PlanBase)
