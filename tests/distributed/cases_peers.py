"""Cases of peers that do not answer. Own module: a group that timed out is of no further use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig, ElasticBuffer
from deepep_moe.backends import Layout, get_backend
from deepep_moe.errors import PeerTimeoutError
from tests.distributed.cases_dispatcher import raises
from tests.launch import case


def silence(group: dist.ProcessGroup, phase: str) -> None:
    """The last rank leaves before ``phase``; the others must be told within the configured second."""
    config = DispatcherConfig(timeout_seconds=1)
    backend = get_backend(group, torch.device("cpu"), config)
    topk_idx = torch.arange(2 * backend.world_size).unsqueeze(1)  # a token for every rank
    steps: dict[str, Callable[[], object]] = {}
    if phase != "plan":
        plan = backend.plan(topk_idx, 2 * backend.world_size)
        rows = torch.ones(plan.num_tokens, 4)
        steps["dispatch"] = lambda: backend.dispatch(plan, rows, layout=Layout.BY_EXPERT)
        steps["combine"] = lambda: backend.combine(plan, torch.ones(plan.num_rows, 4), layout=Layout.BY_EXPERT)
    steps["plan"] = lambda: backend.plan(topk_idx, 2 * backend.world_size)
    silent = backend.world_size - 1
    if backend.rank != silent:
        with raises(
            PeerTimeoutError,
            f"{phase}: rank {backend.rank} of {backend.world_size}: no answer from rank {silent} within 1 s",
        ):
            steps[phase]()
    dist.barrier()  # of the default group: the silent rank waits here


@case(ranks=(2, 3))
def silence_in_plan_is_a_timeout(group: dist.ProcessGroup) -> None:
    silence(group, "plan")


@case(ranks=(2, 3))
def silence_in_dispatch_is_a_timeout(group: dist.ProcessGroup) -> None:
    silence(group, "dispatch")


@case(ranks=(2, 3))
def silence_in_combine_is_a_timeout(group: dist.ProcessGroup) -> None:
    silence(group, "combine")


@case(ranks=(2, 3))
def silence_in_a_barrier_is_a_timeout(group: dist.ProcessGroup) -> None:
    buffer = ElasticBuffer(group, num_gpu_timeout_secs=1)
    buffer.barrier()
    silent = buffer.num_ranks - 1
    if buffer.rank_idx != silent:
        with raises(PeerTimeoutError, f"barrier: rank {buffer.rank_idx}", f"no answer from rank {silent} within 1 s"):
            buffer.barrier()
    dist.barrier()  # of the default group: the silent rank waits here
