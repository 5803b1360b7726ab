"""The rail transport nvshmem by itself, over all ranks as one rail: values, memory, streams, CUDA graphs, failures.

Puts between GPUs of one host are stores over NVLink or PCIe: this proves order, signals, places and failures, not RDMA.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepep_moe import DispatcherConfig, nvshmem
from deepep_moe.backends.rail import Blocks
from deepep_moe.backends.rail_nvshmem import NvshmemRail
from deepep_moe.errors import CapacityError, HandleError, PeerError, PeerTimeoutError
from tests.gpu import lost_rank
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks
from tests.gpu.test_robustness import END_SECONDS, mps_is_running, on_first_rank, run_ranks

pytestmark = [
    pytest.mark.skipif(int(os.environ.get("WORLD_SIZE", "1")) < 2, reason="needs two ranks or more"),
    pytest.mark.skipif(nvshmem.why_missing() is not None, reason=str(nvshmem.why_missing())),
]
CONFIG = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, nvshmem_bytes=512 << 20)


def new_rail(ranks: Ranks, timeout_seconds: float = TIMEOUT_SECONDS) -> NvshmemRail:
    config = DispatcherConfig(timeout_seconds=timeout_seconds, nvshmem_bytes=CONFIG.nvshmem_bytes)
    return NvshmemRail(ranks.group, ranks.device, config, ranks.group)


@pytest.fixture(scope="module")
def rail(ranks: Ranks) -> Iterator[NvshmemRail]:
    made = new_rail(ranks)
    yield made
    made.close()


def pattern(
    sender: int, receiver: int, operation: int, chunk: int, rows: int, row_bytes: int, device: object
) -> Tensor:
    """[rows, row_bytes] uint8 that no other transfer has."""
    first = ((sender * 37 + receiver) * 1009 + operation) * 11 + chunk
    words = torch.arange(rows * row_bytes // 4, dtype=torch.int64, device=device) * 2654435761 + first * 40503
    return (words & 0x7FFFFFFF).to(torch.int32).view(torch.uint8).view(rows, row_bytes)


def used_rows(sender: int, receiver: int, operation: int, chunk: int, size: int) -> int:
    return (sender * 31 + receiver * 17 + operation * 7 + chunk * 3) % (size + 1)


def operation(
    ranks: Ranks, rail: NvshmemRail, number: int, sizes: list[int], row_bytes: int, partly: bool, before: int = 0
) -> None:
    """One operation of a chunk per size; everything that arrives is compared.

    ``before``: rows of the receive buffer that are not received.
    """
    me, device = ranks.rank, ranks.device
    others = [rank for rank in range(ranks.size) if rank != me]
    total = sum(sizes) * len(others)
    packed, arriving = rail.buffers(total, before + total, row_bytes)
    assert packed.shape == (total, row_bytes) and arriving.shape == (before + total, row_bytes)
    arriving[:before] = 77
    finishes: list[Callable[[], object]] = []
    places: list[slice] = []
    for chunk, size in enumerate(sizes):
        place = slice(sum(sizes[:chunk]) * len(others), sum(sizes[: chunk + 1]) * len(others))
        rows = packed[place]
        sent, came = [0] * ranks.size, [0] * ranks.size
        for index, peer in enumerate(others):
            sent[peer] = used_rows(me, peer, number, chunk, size) if partly else size
            came[peer] = used_rows(peer, me, number, chunk, size) if partly else size
            rows[index * size : (index + 1) * size] = pattern(me, peer, number, chunk, size, row_bytes, device)
        blocks = tuple(size * (rank != me) for rank in range(ranks.size))
        tables = [torch.tensor([one, one], dtype=torch.int32, device="cpu").t().contiguous() for one in (sent, came)]
        used = [table.to(device)[:, 1] for table in tables]  # not contiguous, like a slice of a table of all chunks
        send, recv = (Blocks(blocks, one if partly else None) for one in used)
        finishes.append(rail.start("dispatch", rows, arriving[before:][place], send, recv, chunk, len(sizes)))
        places.append(place)
    for chunk, (size, place, finish) in enumerate(zip(sizes, places, finishes)):
        finish()
        rows = arriving[before:][place]
        for index, peer in enumerate(others):
            count = used_rows(peer, me, number, chunk, size) if partly else size
            got = rows[index * size : index * size + count]
            wanted = pattern(peer, me, number, chunk, size, row_bytes, device)[:count]
            assert torch.equal(got, wanted), f"operation {number}, chunk {chunk}, rows of rank {peer}"
    assert (arriving[:before] == 77).all()
    rail.check()


def test_rows_arrive_as_they_were_sent(ranks: Ranks, rail: NvshmemRail) -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(60):
        draw = torch.randint(0, 1000, (4,), generator=generator).tolist()
        chunks = 1 + draw[0] % 8
        sizes = [(draw[1] % 150) // chunks + (chunk % 2) for chunk in range(chunks)]
        operation(ranks, rail, number, sizes, 16 * (1 + draw[2] % 100), bool(draw[3] % 2), before=draw[3] % 5)
    operation(ranks, rail, 1000, [0], 16, partly=False)
    operation(ranks, rail, 1001, [600, 1, 0, 599], 14336, partly=True)  # memory grows
    operation(ranks, rail, 1002, [5], 16, partly=False)


def test_streams_may_change_between_operations(ranks: Ranks, rail: NvshmemRail) -> None:
    streams = [torch.cuda.Stream(ranks.device) for _ in range(2)]
    slow = torch.empty(64 << 20, dtype=torch.uint8, device=ranks.device)
    for number in range(20):
        with torch.cuda.stream(streams[number % 2]):
            operation(ranks, rail, 3000 + number, [40, 40], 4096, partly=True)
            slow.fill_(number)
    torch.cuda.synchronize()


@pytest.mark.parametrize("moves", [1, 2])  # regions of consecutive replays: the same one, and both in turn
def test_a_captured_operation_is_replayed(ranks: Ranks, rail: NvshmemRail, moves: int) -> None:
    rows, row_bytes, replays = 200, 2048, 1000
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    x = torch.zeros((rows * len(others), row_bytes // 4), dtype=torch.int32, device=ranks.device)
    step = torch.zeros(1, dtype=torch.int32, device=ranks.device)
    wrong = torch.zeros(1, dtype=torch.int64, device=ranks.device)
    blocks = Blocks(tuple(rows * (rank != ranks.rank) for rank in range(ranks.size)))
    senders = (
        torch.tensor(others, dtype=torch.int32, device="cpu").to(ranks.device).repeat_interleave(rows).unsqueeze(1)
    )

    def layer() -> None:
        for move in range(moves):
            sent, received = rail.buffers(rows * len(others), rows * len(others), row_bytes)
            sent.copy_((x + step * 7 + move + ranks.rank).view(torch.uint8))
            rail.start("dispatch", sent, received, blocks, blocks, 0, 1)()
            wrong.add_((received.view(torch.int32) != step * 7 + move + senders).sum())
        step.add_(1)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for replay in range(replays):
        graph.replay()
        if replay % 333 == 0:  # other operations in between
            operation(ranks, rail, 4000 + replay, [3], 64, partly=False)
    torch.cuda.synchronize()
    rail.check()
    assert int(step.item()) == replays + 1
    assert int(wrong.item()) == 0


def test_memory_is_not_taken_while_a_graph_captures(ranks: Ranks) -> None:
    fresh = new_rail(ranks)
    with pytest.raises(CapacityError, match="run the layer once before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            fresh.buffers(1000, 1000, 1024)
    operation(ranks, fresh, 1, [7], 64, partly=False)
    fresh.close()
    with pytest.raises(HandleError, match="closed"):
        fresh.buffers(1, 1, 16)


def test_too_little_memory_is_an_error_on_all_ranks(ranks: Ranks) -> None:
    fresh = new_rail(ranks)
    with pytest.raises(CapacityError, match=r"bytes of symmetric memory are needed, and of \d+ at most"):
        fresh.buffers(1 << 20, 1 << 20, 1024)
    operation(ranks, fresh, 1, [7], 64, partly=False)
    fresh.close()


def test_a_dropped_rail_gives_its_memory_back(ranks: Ranks) -> None:
    def free_bytes() -> int:
        assert nvshmem._world is not None
        return sum(size for _, size in nvshmem._world.free)

    fresh = new_rail(ranks)
    operation(ranks, fresh, 1, [100], 4096, partly=False)
    del fresh
    gc.collect()
    torch.distributed.barrier(ranks.group)
    new_rail(ranks).close()  # takes memory, which is when released memory becomes free
    before = free_bytes()
    for number in range(3):
        fresh = new_rail(ranks)
        operation(ranks, fresh, number, [100], 4096, partly=False)
        del fresh
        gc.collect()
    new_rail(ranks).close()
    assert before - free_bytes() < 1 << 20  # signals are kept


@pytest.fixture
def own_group(ranks: Ranks) -> Iterator[Ranks]:
    """The same ranks as a group of their own, which may be given up."""
    group = torch.distributed.new_group(list(range(ranks.size)))
    yield replace(ranks, group=group)
    torch.distributed.barrier(ranks.group)


def test_a_rank_that_does_not_come_is_named(own_group: Ranks) -> None:
    ranks, fresh = own_group, new_rail(own_group, timeout_seconds=2)
    operation(ranks, fresh, 1, [7], 64, partly=False)  # memory is there now: the host takes no part in what follows
    torch.distributed.barrier(ranks.group)
    silent = ranks.size - 1
    began = time.monotonic()
    if ranks.rank != silent:
        blocks = Blocks(tuple(4 * (rank != ranks.rank) for rank in range(ranks.size)))
        rows, came = fresh.buffers(4 * (ranks.size - 1), 4 * (ranks.size - 1), 64)
        fresh.start("dispatch", rows, came, blocks, blocks, 0, 1)()
        torch.cuda.synchronize()
        assert time.monotonic() - began < 10
        assert (came == 255).all()  # NaN, in every format
        with pytest.raises(PeerError) as caught:
            fresh.check()
        if isinstance(caught.value, PeerTimeoutError):
            assert f"rank {ranks.rank} waited 2 s for rank {silent} for its rows" in str(caught.value)
        else:  # another rank's wait ended first
            assert "gave up between nodes" in str(caught.value)
        assert not fresh.usable
        with pytest.raises(PeerError):
            fresh.buffers(4, 4, 64)
    torch.distributed.barrier(ranks.group)
    fresh.close()


def test_a_rank_that_breaks_off_tells_the_others(own_group: Ranks) -> None:
    ranks, fresh = own_group, new_rail(own_group)
    operation(ranks, fresh, 1, [7], 64, partly=False)
    torch.distributed.barrier(ranks.group)
    if ranks.rank == 0:
        fresh.break_off("dispatch", "for a test")
        with pytest.raises(PeerError, match="this rank broke off: for a test"):
            fresh.check()
    else:
        began = time.monotonic()
        blocks = Blocks(tuple(4 * (rank != ranks.rank) for rank in range(ranks.size)))
        rows, came = fresh.buffers(4 * (ranks.size - 1), 4 * (ranks.size - 1), 64)
        fresh.start("dispatch", rows, came, blocks, blocks, 0, 1)()
        torch.cuda.synchronize()
        assert time.monotonic() - began < TIMEOUT_SECONDS / 2
        with pytest.raises(PeerError, match=r"rank \d gave up between nodes"):
            fresh.check()
    torch.distributed.barrier(ranks.group)
    fresh.close()


@pytest.mark.timeout(END_SECONDS + 40)
@pytest.mark.parametrize("how", ["killed inside a step", "failed inside a step"])
def test_a_process_that_ends_is_named_and_the_other_goes_on(ranks: Ranks, how: str) -> None:
    """Two nodes of one rank. The survivor hears of it within its timeout, still computes, and its process ends."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if mps_is_running():
        pytest.skip("must not run under CUDA MPS: a killed client can take the server's other clients with it")
    settings = json.dumps({"backend": "hierarchical", "ranks_per_node": 1, "rail": "nvshmem"})
    survivor, lost = on_first_rank(ranks, lambda: run_ranks(how, "tests.gpu.lost_rank", 2, settings))
    assert lost.status == (-signal.SIGKILL if how.startswith("killed") else 1), lost.output
    assert survivor.status == 0, survivor.output
    told = json.loads(next(line for line in survivor.output.splitlines() if line.startswith("{")))
    print(f"\n{how}: {told['seconds']:.1f} s: {told['message']}")
    assert told["backend"] == "hierarchical"
    assert "rank 1" in told["message"], told
    assert told["steps"] == lost_rank.LAST_STEP
    assert told["seconds"] < lost_rank.TIMEOUT_SECONDS + 7
    assert told["still computes"]
