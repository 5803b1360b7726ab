"""``hierarchical`` over gloo with the plan kernels of csrc/nodes, compiled for the CPU: cases of cases_nodes.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deepep_moe.backends.tensor_plan import TensorPlan
from tests.distributed import cases_nodes
from tests.distributed.cases_dispatcher import random_batch
from tests.emulation import kernels
from tests.launch import case


@case(ranks=(2, 4))
def kernels_make_the_plans_of_the_reference(group: dist.ProcessGroup) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        kernels.install(monkeypatch)
        for seed in range(3):
            cut = 1 if seed == 0 else dist.get_world_size(group) // 2
            cases_nodes.random_case(group, cut, seed, chunk_bytes=900 * (seed % 2))
        if dist.get_world_size(group) == 4:
            cases_nodes.ranks_in_any_order_over_the_hosts(group)
            cases_nodes.what_a_plan_without_a_host_wait_finds_out_is_raised_by_the_next(group)
            cases_nodes.a_mistake_of_one_rank_reaches_every_node(group)
        else:
            cases_nodes.fixed_sizes_without_a_host_wait_are_the_same(group)
    assert set(kernels.launched) == {"summarize", "digest", "batch", "place", "parts"}, kernels.launched


@case(ranks=(2, 4))
def a_plan_that_went_through_operators_moves_the_same_rows(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    with pytest.MonkeyPatch.context() as monkeypatch:
        kernels.install(monkeypatch)
        reference, nodes = cases_nodes.both(group, ranks // 2, rail_chunk_bytes=900)
        x, topk_idx, weights = random_batch(rank, 40 - rank, 128, 3, 2 * ranks, torch.bfloat16, dropped=0.3)
        for limits in ({}, {"max_recv": 40 * ranks, "max_rows": 200 * ranks}):
            wanted, plan = (b.plan(topk_idx, 2 * ranks, alignment=4, **limits) for b in (reference, nodes))
            again = TensorPlan.from_tensors(plan.num_experts, plan.alignment, plan.tensors())
            cases_nodes.compare(reference, nodes, (wanted, again), x.detach(), weights.detach())
