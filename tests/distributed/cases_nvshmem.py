"""Cases of starting NVSHMEM over groups, with a library that only counts PEs. Own module: each case has a new process
state, as far as deepep_moe keeps one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig, nvshmem
from deepep_moe.errors import CapacityError, PeerTimeoutError, RankMismatchError, UnsupportedError
from tests.distributed.cases_dispatcher import raises
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
            time.sleep(10)
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
