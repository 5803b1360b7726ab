"""GPU tests run on every rank of a torchrun launch at once:

    torchrun --nproc-per-node 2 -m pytest tests/gpu

The process group is gloo for the CPU and NCCL for GPUs. Most tests never call NCCL, so several ranks may share a GPU
(under CUDA MPS); test_hierarchical.py says how to run the others in this way. Results are compared with the collective
backend on the CPU, over the same group. Without a GPU or outside torchrun everything is skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep_moe import Buffer, DispatcherConfig

TIMEOUT_SECONDS = 30.0
if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
    # NVSHMEM between GPUs of one host needs no network card and no NVLink multicast.
    os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")


@dataclass(frozen=True)
class Ranks:
    """This rank and its group."""

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device
    num_sms: int  # small enough that the kernels of all ranks on one GPU fit beside each other


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once: the other ranks may wait for this one until the launch is stopped."""
    if report.failed:
        print(
            f"rank {os.environ.get('RANK', '0')}: {report.nodeid} failed\n{report.longreprtext}",
            file=sys.stderr,
            flush=True,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "needs a CUDA GPU"
    elif "RANK" not in os.environ:
        reason = "needs torchrun: torchrun --nproc-per-node 2 -m pytest tests/gpu"
    else:
        return
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    per_gpu = -(-size // gpus)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    group = dist.group.WORLD
    assert group is not None
    yield Ranks(group, rank, size, device, sms // (2 * per_gpu) if per_gpu > 1 else 0)
    dist.destroy_process_group()


def destroy(ranks: Ranks, buffers: list[Buffer]) -> None:
    """Collective."""
    torch.cuda.synchronize()
    dist.barrier(ranks.group)  # a peer may still write into what is freed here
    for buffer in buffers:
        buffer.destroy()


def over_nodes() -> bool:
    """Whether DEEPEP_MOE_RANKS_PER_NODE cuts the ranks into several nodes."""
    cut = DispatcherConfig.load().ranks_per_node
    return 0 < cut < int(os.environ["WORLD_SIZE"])


@pytest.fixture
def make_buffer(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Buffer]]:
    """Makes Buffers for low-latency calls, which run on kernels: over several nodes where the environment says so."""
    made: list[Buffer] = []

    def make(
        timeout_seconds: float = TIMEOUT_SECONDS, group: dist.ProcessGroup | None = None, **options: Any
    ) -> Buffer:
        monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
        monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(timeout_seconds))
        made.append(Buffer(group or ranks.group, low_latency_mode=True, **options))
        assert made[-1]._opened().engine == ("nodes" if over_nodes() else "cuda")
        return made[-1]

    yield make
    destroy(ranks, made)
