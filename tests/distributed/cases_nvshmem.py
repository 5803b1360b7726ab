"""Cases of NVSHMEM over groups without NVSHMEM: a stand-in for deepep_moe._nvshmem that numbers PEs, and one whose puts
are messages between processes, so that everything but the kernels runs on CPUs."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import Buffer, DispatcherConfig, nvshmem
from deepep_moe.backends import rail_nvshmem
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.errors import CapacityError, PeerTimeoutError, RankMismatchError, UnsupportedError
from tests.distributed.cases_dispatcher import raises, random_batch
from tests.distributed.cases_nodes import CUTS, both, compare
from tests.launch import case

MIB = 1 << 20
CONFIG = DispatcherConfig(timeout_seconds=20, nvshmem_bytes=4 * MIB)
CPU = torch.device("cpu")


class Library:
    """deepep_moe._nvshmem without NVSHMEM."""

    ARCHITECTURES = "9.0"

    def __init__(self, pe: int | None = None, num_pes: int = 0) -> None:
        self.pe, self.pes, self.key, self.silent, self.room = pe, num_pes, b"", False, 64 * MIB
        self.allocations: list[int] = []

    def is_started(self) -> bool:
        return self.pe is not None

    def loaded_version(self) -> list[int]:
        return [3, 4, 5]

    def new_unique_id(self) -> bytes:
        return bytes(torch.randint(256, (128,), dtype=torch.uint8, device="cpu").tolist())

    def start(self, rank: int, num_ranks: int, key: bytes, device: int) -> None:
        if self.silent:
            time.sleep(3)
        if self.pe is None:
            self.pe, self.pes, self.key = rank, num_ranks, key

    def this_pe(self) -> int:
        assert self.pe is not None
        return self.pe

    def num_pes(self) -> int:
        return self.pes

    def allocate(self, num_bytes: int) -> int:
        self.allocations.append(num_bytes)
        return 1 << 30 if num_bytes <= self.room else 0

    def finish(self) -> None:
        raise AssertionError("nobody ends in a case")


@contextmanager
def process(library: Library, reason: str | None = None) -> Iterator[None]:
    """This process as if nothing had used NVSHMEM but ``library``."""
    state = {"_world": None, "_hung": None, "_finalize_at_exit": False, "_unused": []}
    calls = {
        "module": lambda: library,
        "why_not_on": lambda device: reason,
        "tensor_at": lambda address, num_bytes, device: torch.ones(num_bytes, dtype=torch.uint8, device=device),
    }
    with mock.patch.multiple(nvshmem, **state, **calls), mock.patch.object(torch.cuda, "synchronize"):
        yield


@case(ranks=(2,))
def without_a_gpu_all_ranks_get_the_reason(group: dist.ProcessGroup) -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False), raises(UnsupportedError, "rank 0, 1: "):
        nvshmem.initialize(group)


@case(ranks=(2, 3))
def starts_once_and_parts_are_at_the_same_place(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    library = Library()
    with process(library):
        peers = nvshmem.initialize(group, CPU, CONFIG)
        assert peers.pes == tuple(range(ranks)) and library.allocations == [4 * MIB]
        assert peers.take(MIB).first == 0
        part = peers.take(MIB + 1)
        assert (part.first, part.num_bytes) == (MIB, MIB + nvshmem.PART_ALIGNMENT)
        assert part.address == (1 << 30) + MIB and not part.memory.any()

        # Another group of the same processes in another order, and one of some of them.
        again = nvshmem.initialize(dist.new_group(list(range(ranks))), CPU, CONFIG)
        assert again.pes == peers.pes and library.allocations == [4 * MIB]
        pair = dist.new_group([0, ranks - 1])
        if rank in (0, ranks - 1):
            assert nvshmem.initialize(pair, CPU, CONFIG).pes == peers.of(pair).pes == (0, ranks - 1)
            peers.of(pair).take(MIB // 2)
        # Rank 1 of three has room where the pair has not: the group takes what is free on all.
        dist.barrier(group)
        nvshmem.release([part], [])
        assert peers.take(MIB).first == MIB
        with raises(CapacityError, "4194304 bytes of symmetric memory are needed, and of 4194304 at most"):
            peers.take(4 * MIB)
        assert peers.take(MIB // 4).first > MIB


@case(ranks=(3,))
def another_library_has_started_it_first(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    pe = (rank + 1) % ranks
    with process(Library(pe, ranks)):  # over the same processes, in another order
        assert nvshmem.initialize(group, CPU, CONFIG).pes == (1, 2, 0)
    with process(Library(pe, ranks + 1)):  # over more: all would have to allocate
        with raises(UnsupportedError, "another library initialised NVSHMEM over 4 processes, this group has 3"):
            nvshmem.initialize(group, CPU, CONFIG)
    with process(Library(None if rank == 1 else pe, 2)):  # over fewer
        with raises(UnsupportedError, "was initialised before, without rank 1 of this group"):
            nvshmem.initialize(group, CPU, CONFIG)
    with process(Library(0, 1)):  # every process by itself
        with raises(UnsupportedError, "another library initialised NVSHMEM over 1 processes"):
            nvshmem.initialize(group, CPU, CONFIG)


@case(ranks=(3,))
def groups_of_two_starts_do_not_mix(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    with process(Library()):
        nvshmem.initialize(pairs[rank // 2], CPU, CONFIG)
        with raises(UnsupportedError, "different NVSHMEM jobs (their PEs are [0, 1, 0])"):
            nvshmem.initialize(group, CPU, CONFIG)


@case(ranks=(2,))
def every_rank_hears_of_what_one_lacks(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    with process(Library(), "built without NVSHMEM" if rank == 1 else None):
        with raises(UnsupportedError, "rank 1: built without NVSHMEM"):
            nvshmem.initialize(group, CPU, CONFIG)
    library = Library()
    library.room = MIB if rank == 0 else 64 * MIB
    with process(library):
        with raises(CapacityError, "could not allocate 4194304 bytes of symmetric memory"):
            nvshmem.initialize(group, CPU, CONFIG)
    with process(Library()):
        config = DispatcherConfig(timeout_seconds=20, nvshmem_bytes=(4 + rank) * MIB)
        with raises(RankMismatchError, "nvshmem_bytes differs", "4194304 on rank 0; 5242880 on rank 1"):
            nvshmem.initialize(group, CPU, config)


@case(ranks=(2,))
def a_start_that_does_not_return_is_a_timeout(group: dist.ProcessGroup) -> None:
    library = Library()
    library.silent = True
    with process(library):
        config = DispatcherConfig(timeout_seconds=1, nvshmem_bytes=4 * MIB)
        began = time.monotonic()
        with raises(PeerTimeoutError, "initialising NVSHMEM did not end within 1 s"):
            nvshmem.initialize(group, CPU, config)
        assert time.monotonic() - began < 8
        with raises(UnsupportedError, "rank 0, 1: initialising NVSHMEM did not end"):
            nvshmem.initialize(group, CPU, config)


def memory_at(address: int, num_bytes: int) -> Tensor:
    """``[num_bytes]`` uint8."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


class Messages(Library):
    """Puts as messages over the rail's group: what csrc/nvshmem/rail.cu does, without signals."""

    MAX_CHUNKS, RAIL_REGIONS, RAIL_STATE_BYTES, RAIL_FAILURE_WORDS = 8, 2, 64, 5
    RailPhase = IntEnum("RailPhase", ["START", "ROWS", "GIVEN_UP"], start=0)
    RailArgs = RailChunk = SimpleNamespace

    def __init__(self) -> None:
        super().__init__()
        self.group: dist.ProcessGroup | None = None
        self.memory = torch.zeros(0, dtype=torch.uint8, device="cpu")
        self.begun: list[int] = []
        self.on_the_way: list[Any] = []

    def allocate(self, num_bytes: int) -> int:
        self.memory = torch.full((num_bytes,), 77, dtype=torch.uint8, device="cpu")
        return self.memory.data_ptr()

    def rail_signal_bytes(self, num_ranks: int) -> int:
        return 64 * num_ranks

    def rail_begin(self, args: Any, stream: int) -> None:
        assert not self.on_the_way
        self.begun.append(args.region)

    def rail_put(self, args: Any, chunk: Any, stream: int) -> None:
        block = chunk.block_rows * chunk.row_bytes
        for number, rank in enumerate(self.peers(args)):
            rows = memory_at(chunk.sent + number * block, block).clone()
            used = chunk.block_rows
            if chunk.used:
                used = int(memory_at(chunk.used + 4 * rank, 4).view(torch.int32))
                assert 0 <= used <= chunk.block_rows
            rows[used * chunk.row_bytes :] = 255  # what nobody may read
            assert self.group is not None
            self.on_the_way.append((self.group.send([rows], rank, self.tag(args, chunk)), rows))

    def rail_wait(self, args: Any, chunk: Any, stream: int) -> None:
        block = chunk.block_rows * chunk.row_bytes
        for number, rank in enumerate(self.peers(args)):
            assert self.group is not None
            self.group.recv([memory_at(chunk.received + number * block, block)], rank, self.tag(args, chunk)).wait()
        if chunk.last:  # peers receive all chunks before they go on, so this cannot block; unsent rows must stay alive
            for work, _ in self.on_the_way:
                work.wait()
            self.on_the_way.clear()

    def rail_give_up(self, args: Any, stream: int) -> None:
        raise AssertionError("nobody gives up in these cases")

    @staticmethod
    def tag(args: Any, chunk: Any) -> int:
        return int(args.region) * 8 + int(chunk.chunk) + 1000

    @staticmethod
    def peers(args: Any) -> list[int]:
        return [rank for rank in range(args.num_ranks) if rank != args.rank]


@contextmanager
def nodes_by_messages(library: Messages) -> Iterator[None]:
    def zeros(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return torch.empty(*sizes, **options).zero_()  # no GPU, no pinned memory

    with (
        process(library),
        mock.patch.object(nvshmem, "tensor_at", lambda address, num_bytes, device: memory_at(address, num_bytes)),
        mock.patch.object(rail_nvshmem, "enter_stream", return_value=0),
        mock.patch.object(torch, "zeros", zeros),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield


@case(ranks=(2, 4))
def rows_cross_as_over_other_transports(group: dist.ProcessGroup) -> None:
    for cut in CUTS[dist.get_world_size(group)]:
        library = Messages()
        with nodes_by_messages(library):
            config = {"rail_chunk_bytes": 700, "rail": "nvshmem", "nvshmem_bytes": 16 * MIB, "timeout_seconds": 30}
            reference, nodes = both(group, cut, **config)
            assert isinstance(nodes, HierarchicalBackend) and nodes.rail.name == "nvshmem"
            library.group = nodes.rail._peers.group  # type: ignore[attr-defined]
            nodes._planner.defers = True  # as on GPUs
            for step, tokens in enumerate((0, 9, 23)):  # memory grows
                own = tokens * (1 + nodes.rank) // nodes.world_size
                experts = 2 * nodes.world_size
                seed = 100 * step + nodes.rank
                x, topk_idx, weights = random_batch(seed, own, 128, 3, experts, torch.bfloat16, dropped=0.2)
                limits = {"max_recv": 23 * nodes.world_size, "max_rows": 69 * nodes.world_size + 30}
                for sizes in ({}, limits) if tokens == 23 else ({},):
                    plans = tuple(b.plan(topk_idx, experts, alignment=4, **sizes) for b in (reference, nodes))
                    compare(reference, nodes, plans, x.detach(), weights.detach())
            assert all(one != other for one, other in pairwise(library.begun))  # operations alternate between regions
            nodes.close()
            assert nvshmem._world is not None
            signals = 64 * nodes.nodes.count
            assert sum(size for _, size in nvshmem._world.free) == 16 * MIB - max(signals, nvshmem.PART_ALIGNMENT)
            with pytest.raises(Exception, match="closed"):
                nodes.plan(topk_idx, experts)


@case(ranks=(2,))
def programs_for_deepep_size_the_memory(group: dist.ProcessGroup) -> None:
    """num_rdma_bytes of Buffer is symmetric memory, and the calls for several nodes use it."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    settings = {"BACKEND": "hierarchical", "RAIL": "nvshmem", "RANKS_PER_NODE": "1", "NVSHMEM_BYTES": str(MIB)}
    library = Messages()
    with (
        nodes_by_messages(library),
        mock.patch.dict(os.environ, {f"DEEPEP_MOE_{name}": value for name, value in settings.items()}),
    ):
        buffer = Buffer(group, num_rdma_bytes=3 * MIB)
        assert library.memory.numel() == 3 * MIB
        nodes = buffer._backend
        assert isinstance(nodes, HierarchicalBackend)
        library.group = nodes.rail._peers.group  # type: ignore[attr-defined]
        x, topk_idx, weights = random_batch(rank, 17, 64, 2, 2 * ranks, torch.bfloat16)
        x, weights = x.detach(), weights.detach()
        *_, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2 * ranks)
        assert torch.equal(per_node, in_rank.sum(0, dtype=torch.int32))
        rows, _, row_weights, _, handle, _ = buffer.internode_dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        back, back_weights, _ = buffer.internode_combine(rows, handle, row_weights)
        torch.testing.assert_close(back, x * in_rank.sum(1, keepdim=True))
        torch.testing.assert_close(back_weights, weights)
        nodes.close()
        buffer.destroy()
