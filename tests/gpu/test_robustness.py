"""What goes wrong in long runs: memory that is not given back, ranks that die.

    torchrun --nproc-per-node 2 -m pytest tests/gpu/test_robustness.py
    BUFFER_CYCLES=1000 torchrun --nproc-per-node 2 -m pytest tests/gpu/test_robustness.py -k leaks -s

Ranks that are killed are processes of their own (lost_rank.py), started by rank 0 while the others wait.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep_moe import Buffer
from deepep_moe.backends.base import Layout
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.config import DispatcherConfig
from tests.gpu import lost_rank
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks

ROOT = Path(__file__).resolve().parents[2]
CYCLES = int(os.environ.get("BUFFER_CYCLES", "60"))
END_SECONDS = 90.0  # from the start of two processes to their end: imports, a CUDA context, a few steps, a timeout


# ------------------------------------------------------------------------------------------------ leaks


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    gpu_bytes: int
    host_bytes: int
    files: int
    mappings: int

    @classmethod
    def now(cls, device: torch.device) -> Held:
        gc.collect()
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        mappings = len(Path("/proc/self/maps").read_text().splitlines())
        return cls(total - free, resident, len(os.listdir("/proc/self/fd")), mappings)


def one_backend(ranks: Ranks) -> None:
    config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms)
    backend = NVLinkBackend(ranks.group, ranks.device, config)
    plan = backend.plan(torch.zeros((16, 1), dtype=torch.int64, device=ranks.device), ranks.size)
    backend.dispatch(plan, torch.zeros((16, 64), device=ranks.device), layout=Layout.BY_SOURCE)
    backend.close()


def one_buffer(ranks: Ranks) -> None:
    buffer = Buffer(ranks.group)
    routes = torch.zeros((16, 1), dtype=torch.int64, device=ranks.device)
    *_, per_expert, in_rank, _ = buffer.get_dispatch_layout(routes, ranks.size)
    x = torch.ones((16, 64), device=ranks.device, dtype=torch.bfloat16)
    rows, *_, handle, _ = buffer.dispatch(
        x, topk_idx=routes, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert
    )
    buffer.combine(rows, handle)
    torch.cuda.synchronize()  # a peer may still write here otherwise
    buffer.destroy()


@pytest.mark.timeout(60 + CYCLES)
@pytest.mark.parametrize("cycle", [one_backend, one_buffer])
def test_create_and_destroy_leaks_nothing(
    ranks: Ranks, cycle: Callable[[Ranks], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the GPU and of the host, open files, mappings and shared memory. BUFFER_CYCLES sets how often (60)."""
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
    monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))
    for _ in range(10):  # what is taken once: contexts of peers, caches, thread pools
        cycle(ranks)
    dist.barrier(ranks.group)
    shared = set(os.listdir("/dev/shm"))
    before = Held.now(ranks.device)
    for _ in range(CYCLES):
        cycle(ranks)
    dist.barrier(ranks.group)
    after = Held.now(ranks.device)
    left_over = set(os.listdir("/dev/shm")) - shared
    gpu, host = after.gpu_bytes - before.gpu_bytes, after.host_bytes - before.host_bytes
    print(
        f"\nrank {ranks.rank}, {CYCLES} x {cycle.__name__}: GPU {gpu / 1024:+.0f} KiB, host {host / 1024:+.0f} KiB, "
        f"files {after.files - before.files:+d}, mappings {after.mappings - before.mappings:+d}"
    )
    # Less than the smallest thing a cycle could lose, a page of 64 KiB; the driver takes memory in pieces of 2 MiB for
    # each rank that shares the GPU.
    sharing = -(-ranks.size // torch.cuda.device_count())
    assert gpu < sharing * CYCLES * 64 * 1024
    assert host < 16 * 2**20 + CYCLES * 8 * 1024
    assert after.files <= before.files + 2
    assert after.mappings <= before.mappings + 16
    assert not left_over


# ------------------------------------------------------------------------------------------- lost ranks


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    output: str


def run_ranks(how: str, module: str = "tests.gpu.lost_rank", count: int = 2, *arguments: str) -> list[Ended]:
    """All ranks of ``module``, each on its GPU. The store lives here, so that it outlasts any of them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC_", "DEEPEP_MOE_"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    processes = []
    try:
        for rank in range(count):
            command = [sys.executable, "-m", module, str(store.port), str(rank), how, *arguments]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        outputs = [process.communicate(timeout=END_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [Ended(process.returncode, output) for process, output in zip(processes, outputs)]


def on_first_rank(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """What ``function`` gives on rank 0, on every rank; the others wait meanwhile."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=END_SECONDS + 30))
    told: list[Any] = [None]
    if ranks.rank == 0:
        try:
            told = [function()]
        except Exception as error:
            told = [AssertionError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(told, src=0, group=group)
    dist.destroy_process_group(group)
    if isinstance(told[0], Exception):
        raise told[0]
    return told[0]


def mps_is_running() -> bool:
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


@pytest.fixture
def own_processes(ranks: Ranks) -> Callable[[str], list[Ended]]:
    """:func:`run_ranks`, where that is safe; called on all ranks."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if mps_is_running():
        pytest.skip("must not run under CUDA MPS: a killed client can take the server's other clients with it")
    return lambda how: on_first_rank(ranks, lambda: run_ranks(how))


@pytest.mark.timeout(END_SECONDS + 40)
@pytest.mark.parametrize("how", lost_rank.WAYS)
def test_a_lost_rank_is_named_and_the_other_goes_on(own_processes: Callable[[str], list[Ended]], how: str) -> None:
    """The survivor hears of it within its timeout, in an error that names the rank; it still computes, and it ends."""
    survivor, lost = own_processes(how)
    if how.startswith("killed"):
        assert lost.status == -signal.SIGKILL, lost.output
    else:
        assert lost.status == 1, lost.output  # Python's own exit status, not that of a crash on the way out
        assert "the user's own mistake" in lost.output
    assert survivor.status == 0, survivor.output
    told = json.loads(next(line for line in survivor.output.splitlines() if line.startswith("{")))
    print(f"\n{how}: {told['seconds']:.1f} s: {told['message']}")
    assert told["backend"] == "nvlink"
    assert told["error"] == "PeerTimeoutError" and "for rank 1 in" in told["message"], told
    assert told["steps"] == lost_rank.LAST_STEP
    assert told["seconds"] < lost_rank.TIMEOUT_SECONDS + 5
    assert told["still computes"]


@pytest.mark.timeout(END_SECONDS + 40)
def test_a_program_that_catches_nothing_ends(own_processes: Callable[[str], list[Ended]]) -> None:
    survivor, _ = own_processes(lost_rank.UNCAUGHT)
    assert survivor.status == 1, survivor.output
    assert "PeerTimeoutError: rank 0 waited 3 s for rank 1 in" in survivor.output
