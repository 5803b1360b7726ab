"""``hierarchical`` over gloo with the plan kernels of csrc/nodes, compiled for the CPU: cases of cases_nodes.py."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.distributed import cases_nodes
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
