"""Implementations of the Plan protocol, as far as one process can see them."""

from __future__ import annotations

import pytest
import torch

from deepep_moe.backends.nvlink_plan import DevicePlan
from deepep_moe.backends.tensor_plan import PlanBase, TensorPlan, is_plan
from deepep_moe.errors import HandleError


def tensor_plan() -> TensorPlan:
    """Two ranks with two experts each; three tokens, top-2; rank 0 receives two rows."""
    prefix, counts, offsets = [1, 2, 2, 3], [2, 1], [0, 4, 8]
    return TensorPlan(
        num_experts=4,
        alignment=4,
        identity=(7, 3),
        topk_idx=torch.tensor([[0, 1], [2, -1], [3, 0]], dtype=torch.int64),
        send_slot=torch.tensor([[0, -1], [-1, 0], [1, 1]], dtype=torch.int32),
        counted=torch.tensor(prefix + counts + offsets, dtype=torch.int64),
        received=torch.tensor([[0, 0, 1, 0, 4], [2, -1, 0, -1, 1]], dtype=torch.int32),
        row_recv=torch.tensor([0, 1, -1, -1, 0, -1, -1, -1], dtype=torch.int32),
        expert_counts_host=None,
    )


def test_sizes_and_views_follow_from_the_tensors() -> None:
    plan = tensor_plan()
    assert (plan.num_tokens, plan.num_ranks, plan.num_topk, *plan.known_sizes()) == (3, 2, 2, 2, 8)
    assert plan.rank_prefix.tolist() == [[1, 2], [2, 3]]
    assert plan.expert_counts.tolist() == [2, 1]
    assert plan.expert_offsets.tolist() == [0, 4, 8]
    assert plan.recv_src_idx.tolist() == [0, 2]
    assert plan.recv_topk_idx.tolist() == [[0, 1], [-1, 0]]
    assert plan.recv_rows.tolist() == [[0, 4], [-1, 1]]


def test_a_plan_survives_the_way_through_operators() -> None:
    plan = tensor_plan()
    again = TensorPlan.from_tensors(plan.num_experts, plan.alignment, plan.tensors())
    assert (again.owner, again.number, again.alignment, again.num_experts) == (7, 3, 4, 4)
    for name in ("topk_idx", "send_slot", "counted", "received", "row_recv"):
        assert getattr(again, name) is getattr(plan, name), name
    assert again.expert_counts_host is None and again.extra is None


def test_memory_of_a_plan_is_the_tensors_that_it_holds() -> None:
    plan = tensor_plan()
    held = [plan.topk_idx, plan.send_slot, plan.counted, plan.received, plan.row_recv]
    assert all(one is other for one, other in zip(plan.memory(), held, strict=True))
    plan.extra = torch.zeros(3, dtype=torch.int32)
    assert plan.memory()[-1] is plan.extra and len(plan.memory()) == 6


def test_memory_of_a_device_plan_covers_its_tensors_without_creating_them() -> None:
    for again in (False, True):  # rows usually have room in the first allocation
        plan = DevicePlan(4, 1, (7, 3), torch.zeros((3, 2), dtype=torch.int64), 2, inputs=[], sizes=(5, 6))
        plan.allocate(4 if again else 5, 6, stream=0)
        if again:
            plan.allocate(5, 6, stream=0)
        memory = plan.memory()
        assert memory[0] is plan.topk_idx and len(memory) == 2 + again
        assert not {"send_slot", "counted", "received", "row_recv"} & set(vars(plan))
        storages = [tensor.untyped_storage().data_ptr() for tensor in memory]
        for name in ("send_slot", "counted", "received", "row_recv"):
            assert getattr(plan, name).untyped_storage().data_ptr() in storages, name


def device_plan(waits: list[int]) -> DevicePlan:
    def finish(plan: DevicePlan) -> tuple[int, int]:
        waits.append(plan.number)
        if len(waits) == 1:
            raise HandleError("a peer is gone")
        return 5, 6

    topk_idx = torch.zeros((3, 2), dtype=torch.int64)
    return DevicePlan(4, 1, (7, 3), topk_idx, 2, inputs=[], finish=finish)


def test_is_plan_does_not_wait_for_the_sizes() -> None:
    waits: list[int] = []
    assert is_plan(device_plan(waits)) and is_plan(tensor_plan())
    assert waits == []
    for other in (None, 3, torch.zeros(2), TensorPlan, (7, 3)):
        assert not is_plan(other)


def test_a_device_plan_that_failed_says_so_again() -> None:
    plan = device_plan([])
    with pytest.raises(HandleError, match="a peer is gone"):
        plan.known_sizes()
    with pytest.raises(HandleError, match="this plan failed when it was made"):
        _ = plan.num_rows


def test_a_device_plan_waits_once() -> None:
    waits = [0]  # not the first
    plan = device_plan(waits)
    assert (plan.num_recv, plan.num_rows, plan.known_sizes()) == (5, 6, (5, 6))
    assert waits == [0, 3]
    assert isinstance(plan, PlanBase) and (plan.num_tokens, plan.num_topk, plan.num_ranks) == (3, 2, 2)
