"""NVSHMEM: loading the library, initialising it over a process group, and sharing its symmetric memory.

NVSHMEM is initialised once per process, over a fixed set of processes, its PEs. A process group may contain only some
of the PEs, in a different order, and another library (PyTorch, for example) may have initialised NVSHMEM before. Each
group therefore has a table from its ranks to PE numbers (:class:`Peers`).

Symmetric memory is allocated once, by all PEs together. Groups take ranges of it (:meth:`Peers.take`) at offsets that
are equal on all of their ranks.

A program that uses several groups, none of which contains all processes, must call :func:`initialize` once on all
processes before it creates the first dispatcher.

The library is loaded on first use (``rail="nvshmem"``). Importing this module loads nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.exchange import gather
from deepep_moe.backends.headers import compare
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, PeerError, PeerTimeoutError, UnsupportedError
from deepep_moe.extension import runs_on

PART_ALIGNMENT = 256
_FINALIZE_SECONDS = 5.0  # at exit, the longest wait for nvshmem_finalize


def _library_directory() -> Path | None:
    """Directory of libnvshmem_host.so.3: in $NVSHMEM_DIR or the nvidia-nvshmem wheel. None: use the loader's path."""
    places = []
    if home := os.environ.get("NVSHMEM_DIR"):
        places += [Path(home) / "lib", Path(home) / "lib64"]
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        spec = None
    if spec is not None:
        places += [Path(place) / "lib" for place in spec.submodule_search_locations or []]
    return next((place for place in places if (place / "libnvshmem_host.so.3").exists()), None)


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension module ``deepep_moe._nvshmem``, or the reason why it cannot be loaded."""
    if importlib.util.find_spec("deepep_moe._nvshmem") is None:
        return None, (
            "deepep_moe was built without NVSHMEM; install nvidia-nvshmem-cu13 (or set NVSHMEM_DIR) and build again"
        )
    directory = _library_directory()
    try:
        if directory is not None:  # loaded first, it satisfies the module's dependency by its soname
            ctypes.CDLL(str(directory / "libnvshmem_host.so.3"))
        from deepep_moe import _nvshmem
    except (ImportError, OSError) as error:
        return None, f"deepep_moe._nvshmem cannot be loaded ({error}); install nvidia-nvshmem-cu13, or set NVSHMEM_DIR"
    return _nvshmem, ""


def why_missing() -> str | None:
    """The reason why NVSHMEM cannot be used in this process, or None. Loads the library without initialising it."""
    return _load()[1] or None


def module() -> Any:
    """``deepep_moe._nvshmem``.

    Raises:
        UnsupportedError: it cannot be loaded; the message says why.
    """
    loaded, reason = _load()
    if loaded is None:
        raise UnsupportedError(reason)
    return loaded


@cache
def why_not_on(device: torch.device) -> str | None:
    """The reason why NVSHMEM cannot serve ``device``, or None. The answer is remembered."""
    if (reason := why_missing()) is not None:
        return reason
    if device.type != "cuda":
        return f"NVSHMEM needs a CUDA device, not {device}"
    capability = torch.cuda.get_device_capability(device)
    built = module().ARCHITECTURES.split(";")
    if any(runs_on(architecture, capability) for architecture in built):
        return None
    return f"deepep_moe._nvshmem was built for {', '.join(built)}, {device} is {capability[0]}.{capability[1]}"


@dataclass
class _World:
    """The state of NVSHMEM in this process after its initialisation."""

    pe: int
    num_pes: int
    identity: str
    """Identifies the set of PEs: equal on processes that were initialised together, different otherwise."""
    arena: int = 0
    """Address of the symmetric memory that groups share, or 0 before it is allocated."""
    arena_bytes: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)
    """Free ranges of the arena: offset and size in bytes, ascending."""


_world: _World | None = None
_hung: str | None = None
"""Describes the NVSHMEM call that did not return. No other call can be made in this process."""
_finalize_at_exit = True


def do_not_finalize() -> None:
    """Skip nvshmem_finalize at exit: it is collective, and a peer may be lost."""
    global _finalize_at_exit
    _finalize_at_exit = False


class Part:
    """A range of symmetric memory that one group owns. Its offset is equal on all ranks. Zeroed when taken.

    Attributes:
        address: address on this GPU. NVSHMEM calls take it also as the address on a peer.
        num_bytes: size; 0 after :meth:`free`.
        memory: [num_bytes] uint8.
    """

    def __init__(self, first: int, num_bytes: int, device: torch.device) -> None:
        assert _world is not None
        self.first, self.num_bytes = first, num_bytes
        self.address = _world.arena + first
        self.memory = tensor_at(self.address, num_bytes, device)
        self.memory.zero_()

    def free(self) -> None:
        """Return the memory. No transfer to it may be pending. Local, idempotent."""
        if self.num_bytes and _world is not None:
            _world.free = _merged([*_world.free, (self.first, self.num_bytes)])
        self.num_bytes = 0


_unused: list[tuple[list[Part], list[Tensor]]] = []
"""What :func:`release` was given since the last :meth:`Peers.take`."""


def release(parts: list[Part], tensors: list[Tensor]) -> None:
    """Free ``parts`` and drop ``tensors`` when no kernel can use them any more. Local; does not wait for the device.

    For finalisers: the garbage collector may run them while kernels use the memory.
    """
    _unused.append((parts, tensors))


@dataclass(frozen=True)
class Peers:
    """The PE numbers of a group's ranks."""

    group: dist.ProcessGroup
    device: torch.device
    timeout_seconds: float
    pes: tuple[int, ...]
    """[R] PE of each rank."""

    def of(self, part: dist.ProcessGroup) -> Peers:
        """The same table for a subgroup. Local."""
        ranks = [dist.get_group_rank(self.group, one) for one in dist.get_process_group_ranks(part)]
        return Peers(part, self.device, self.timeout_seconds, tuple(self.pes[rank] for rank in ranks))

    def take(self, num_bytes: int) -> Part:
        """Take a range of the symmetric memory. Collective over the group.

        Raises:
            CapacityError: on every rank: no free range is large enough.
        """
        assert _world is not None
        num_bytes = -(-num_bytes // PART_ALIGNMENT) * PART_ALIGNMENT
        torch.cuda.synchronize(self.device)
        for parts, _ in _unused:
            for part in parts:
                part.free()
        _unused.clear()
        told = gather("set-up", self.group, self.device, self.timeout_seconds, [num_bytes, _world.free])
        if len({wanted for wanted, _ in told}) > 1:
            raise PeerError(f"ranks ask for different amounts of symmetric memory: {[wanted for wanted, _ in told]}")
        common = _common_ranges([[(first, size) for first, size in free] for _, free in told])
        fitting = [first for first, size in common if size >= num_bytes]
        if not fitting:
            raise CapacityError(
                f"{num_bytes} bytes of symmetric memory are needed, and of {_world.arena_bytes} at most "
                f"{max((size for _, size in common), default=0)} are free in one piece on all ranks: set nvshmem_bytes "
                f"to {_world.arena_bytes + num_bytes} or more (DEEPEP_MOE_NVSHMEM_BYTES, or num_rdma_bytes of Buffer), "
                "or send fewer tokens or fewer bytes at once"
            )
        first = fitting[0]
        _world.free = _without(_world.free, first, num_bytes)
        part = Part(first, num_bytes, self.device)
        torch.cuda.synchronize(self.device)
        # A barrier: no rank may put before all have zeroed their memory.
        gather("set-up", self.group, self.device, self.timeout_seconds, 0)
        return part


def initialize(
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    config: DispatcherConfig | None = None,
) -> Peers:
    """Initialise NVSHMEM over ``group`` unless this was done before, and get its PE numbers. Collective over the group.

    A dispatcher or Buffer with ``rail="nvshmem"`` calls this with its own group. A program with several such groups
    calls it first with a group that contains all of their processes.

    Args:
        group: default: all processes of torch.distributed.
        device: this rank's GPU; default: the current one.
        config: ``nvshmem_bytes`` of symmetric memory per GPU and ``timeout_seconds``; default: from the environment.

    Raises:
        UnsupportedError: on every rank: NVSHMEM cannot be loaded on some rank, or was initialised over other processes.
        CapacityError: on every rank: the symmetric memory could not be allocated.
        PeerTimeoutError: another process did not come.
    """
    config = config or DispatcherConfig.load()
    chosen = group if group is not None else dist.group.WORLD
    assert chosen is not None
    if device is None:
        on_gpu = torch.cuda.is_available()  # otherwise every rank is told below
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    timeout = config.timeout_seconds

    def everyone(mine: object) -> list[Any]:
        return gather("set-up", chosen, device, timeout, mine)

    rank, ranks = dist.get_rank(chosen), dist.get_world_size(chosen)
    _raise_for_all(everyone(_hung or why_not_on(device)))
    nvshmem = module()
    started = everyone([nvshmem.is_started(), nvshmem.loaded_version(), "" if _world is None else _world.identity])
    _compare_versions([version for _, version, _ in started])
    outside = [str(one) for one, (runs, _, _) in enumerate(started) if not runs]
    if 0 < len(outside) < ranks:
        raise UnsupportedError(
            f"NVSHMEM was initialised before, without rank {', '.join(outside)} of this group: call "
            "deepep_moe.nvshmem.initialize() on all processes before any other library or group initialises NVSHMEM"
        )
    identity = everyone(nvshmem.new_unique_id().hex() if rank == 0 else None)[0]
    _start(nvshmem, rank, ranks, identity, device, config, everyone, initialised=not outside)
    assert _world is not None
    told = everyone([_world.pe, _world.identity])
    pes = [pe for pe, _ in told]
    if len({one for _, one in told}) > 1 or len(set(pes)) < ranks:
        raise UnsupportedError(
            f"the ranks of this group are in different NVSHMEM jobs (their PEs are {pes}): call "
            "deepep_moe.nvshmem.initialize() on all processes before any other library or group initialises NVSHMEM"
        )
    return Peers(chosen, device, timeout, tuple(pes))


def _start(
    nvshmem: Any,
    rank: int,
    ranks: int,
    identity: str,
    device: torch.device,
    config: DispatcherConfig,
    everyone: Callable[[object], list[Any]],
    initialised: bool,
) -> None:
    """Initialise NVSHMEM (only this module's part where it is ``initialised`` already) and allocate the arena."""
    global _world
    if _world is None:
        # The margin is for NVSHMEM's own use.
        os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(config.nvshmem_bytes + (256 << 20)))
        index = 0 if device.index is None else device.index
        problem = _caller().problem_of(
            lambda: nvshmem.start(rank, ranks, bytes.fromhex(identity), index),
            "initialising NVSHMEM",
            config.timeout_seconds,
        )
        _raise_for_all(everyone(problem))
        _world = _World(nvshmem.this_pe(), nvshmem.num_pes(), "" if initialised else identity)
        atexit.register(_finish)
    size = -(-config.nvshmem_bytes // PART_ALIGNMENT) * PART_ALIGNMENT
    arenas = everyone([_world.arena != 0, _world.num_pes, size])
    there = [arena for arena, _, _ in arenas]
    if all(there):
        return
    if any(there) or any(pes != ranks for _, pes, _ in arenas):
        raise UnsupportedError(
            f"another library initialised NVSHMEM over {_world.num_pes} processes, this group has {ranks}: call "
            "deepep_moe.nvshmem.initialize() on all of those processes first"
        )
    compare({"nvshmem_bytes": [str(one) for _, _, one in arenas]})
    addresses: list[int] = []
    problem = _caller().problem_of(
        lambda: addresses.append(nvshmem.allocate(size)), "allocating symmetric memory", config.timeout_seconds
    )
    _raise_for_all(everyone(problem))
    if any(everyone(addresses[0] == 0)):
        raise CapacityError(
            f"NVSHMEM could not allocate {size} bytes of symmetric memory on every GPU: set nvshmem_bytes lower, or "
            f"NVSHMEM_SYMMETRIC_SIZE (now {os.environ.get('NVSHMEM_SYMMETRIC_SIZE')}) higher"
        )
    _world.identity = _world.identity or identity
    _world.arena, _world.arena_bytes, _world.free = addresses[0], size, [(0, size)]


class _Caller:
    """A thread for NVSHMEM calls that wait for other processes without a time limit.

    The caller waits for the thread with a limit. The thread is started before the first call and kept, because Python
    starts no thread at exit.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="deepep_moe NVSHMEM", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._calls.get()()

    def problem_of(self, call: Callable[[], object], what: str, timeout_seconds: float) -> str | None:
        """Run ``call`` on the thread. Returns its error as text, or None.

        Raises:
            PeerTimeoutError: it did not return in time. NVSHMEM cannot be used in this process any more.
        """
        problems: list[str] = []
        returned = threading.Event()

        def run() -> None:
            try:
                call()
            except Exception as error:
                problems.append(f"{what}: {error}")
            returned.set()

        self._calls.put(run)
        if not returned.wait(timeout_seconds):
            global _hung
            _hung = f"{what} did not end within {timeout_seconds:g} s: another process did not come"
            raise PeerTimeoutError(_hung)
        return problems[0] if problems else None


@cache
def _caller() -> _Caller:
    return _Caller()


def _raise_for_all(reasons: list[str | None]) -> None:
    """Raise UnsupportedError on every rank if any rank has a reason."""
    told: dict[str, list[str]] = {}
    for rank, reason in enumerate(reasons):
        if reason is not None:
            told.setdefault(reason, []).append(str(rank))
    if told:
        raise UnsupportedError("; ".join(f"rank {', '.join(ranks)}: {reason}" for reason, ranks in told.items()))


def _compare_versions(versions: list[list[int]]) -> None:
    if len({tuple(version) for version in versions}) > 1:
        told = "; ".join(f"rank {rank}: {'.'.join(map(str, one))}" for rank, one in enumerate(versions))
        raise UnsupportedError(f"ranks have different versions of NVSHMEM: {told}")


def _finish() -> None:
    """Finalise NVSHMEM at exit. The wait is limited: other processes may exit much later.

    After an uncaught exception the others are probably still running.
    """
    uncaught = getattr(sys, "last_type", None) is not None
    if _world is not None and _hung is None and _finalize_at_exit and not uncaught:
        with suppress(PeerTimeoutError):
            _caller().problem_of(module().finish, "finalising NVSHMEM", _FINALIZE_SECONDS)


# -- memory -----------------------------------------------------------------------------------------------------------


class _Memory:
    """Describes memory that PyTorch did not allocate, for ``torch.as_tensor``."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """A tensor ``[num_bytes]`` uint8 on ``device`` at ``address``. The caller keeps the memory allocated."""
    return torch.as_tensor(_Memory(address, num_bytes), dtype=torch.uint8, device=device)


Ranges = list[tuple[int, int]]


def _merged(ranges: Ranges) -> Ranges:
    """``ranges`` in ascending order, with adjacent ones joined."""
    out: Ranges = []
    for first, size in sorted(ranges):
        if out and sum(out[-1]) == first:
            out[-1] = (out[-1][0], out[-1][1] + size)
        else:
            out.append((first, size))
    return out


def _without(ranges: Ranges, first: int, num_bytes: int) -> Ranges:
    """``ranges`` without a range that lies in one of them."""
    out: Ranges = []
    end = first + num_bytes
    for start, size in ranges:
        if start <= first and end <= start + size:
            out += [(start, first - start), (end, start + size - end)]
        else:
            out.append((start, size))
    return [(start, size) for start, size in out if size]


def _common_ranges(free_of_ranks: list[Ranges]) -> Ranges:
    """The ranges that are free on all ranks."""
    common = free_of_ranks[0]
    for free in free_of_ranks[1:]:
        both: Ranges = []
        for first, size in common:
            for other, other_size in free:
                start, end = max(first, other), min(first + size, other + other_size)
                if start < end:
                    both.append((start, end - start))
        common = _merged(both)
    return common
