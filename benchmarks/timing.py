"""How the benchmarks take time: what lies between two readings of a clock.

All times are microseconds. Ranks start a sample together and a sample is the time of the slowest rank, which
``torch.utils.benchmark`` cannot do: its Timer starts and ends on each rank by itself. When each kernel of a step ran is
read from ``torch.profiler`` (overlap.py).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deepep_moe.tools.world import World

WARMUP = 3
CALLS = 5  # back-to-back calls of one sample of kernel time


def kernel_samples(world: World, call: Callable[[], Any], repeats: int, calls: int = CALLS) -> list[float]:
    """Time of one of ``calls`` back-to-back calls, between two CUDA events (on a CPU: wall clock).

    An untimed call before the first event lets the ranks meet on the device. The GPU spins until the host has
    enqueued everything, so that host time is not in the result, unless a call waits for the device itself.
    """
    samples = []
    for _ in range(WARMUP + repeats):
        world.align()
        if world.on_gpu:
            world.spin()
        call()
        stop = _start_clock(world)
        for _ in range(calls):
            call()
        samples.append(stop() / calls)
    return world.largest(samples[WARMUP:])


def call_samples(world: World, call: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """One call on an idle device until its results are there: by wall clock, and between two CUDA events.

    The second list is empty on a CPU.
    """
    wall, events = [], []
    for _ in range(WARMUP + repeats):
        world.meet()
        began = time.perf_counter()
        stop = _start_clock(world)
        call()
        on_device = stop()
        wall.append((time.perf_counter() - began) * 1e6)
        events.append(on_device)
    return world.largest(wall[WARMUP:]), world.largest(events[WARMUP:]) if world.on_gpu else []


def host_samples(world: World, call: Callable[[], Any], repeats: int, calls: int = 1) -> list[float]:
    """Wall clock of the host in one of ``calls`` calls in a row, from an idle device until the last one returns.

    The device may have work left then. Without NCCL the ranks of GPUs start a sample as the one before has aligned
    them: gloo would let them go tens of microseconds apart.
    """
    world.align()
    samples = []
    for _ in range(WARMUP + repeats):
        if world.can_all_to_all:
            world.meet()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - began) * 1e6 / calls)
        world.synchronize()
    return world.largest(samples[WARMUP:])


@dataclass
class Phases:
    """Times of the named phases of one step; a step calls it at the end of each."""

    world: World
    names: list[str] = field(default_factory=list)
    _stamps: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stamp()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        self._stamp()

    def _stamp(self) -> None:
        if self.world.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append(event)
        else:
            self._stamps.append(time.perf_counter())

    def read(self) -> list[float]:
        """Waits for the device."""
        self.world.synchronize()
        if self.world.on_gpu:
            return [a.elapsed_time(b) * 1e3 for a, b in zip(self._stamps, self._stamps[1:])]
        return [(b - a) * 1e6 for a, b in zip(self._stamps, self._stamps[1:])]


def step_samples(world: World, step: Callable[[Phases], Any], repeats: int, busy_ms: int = 0) -> dict[str, list[float]]:
    """Times of a step's phases and of their sum (``total``), host waits included, each step from an idle device.

    Phases are cut by CUDA events on the current stream, nothing waits between them; on a CPU by wall clock.
    ``busy_ms`` (GPUs only): the clock starts when the GPUs end so many milliseconds of other work, in which the host
    begins the step, as it does in training. Of the host's time only what the GPU waits for is in the times then.
    """
    samples: list[list[float]] = []
    names: list[str] = []
    for _ in range(WARMUP + repeats):
        if busy_ms:
            world.align(busy_ms)
        else:
            world.meet()
        phases = Phases(world)
        step(phases)
        times = phases.read()
        samples.append([*times, sum(times)])
        names = [*phases.names, "total"]
    return {name: world.largest([times[i] for times in samples[WARMUP:]]) for i, name in enumerate(names)}


class MemoryWatch:
    """Bytes of GPU memory that a candidate needs, from here on: in PyTorch's allocator, and outside of it.

    Outside are staging, NCCL's buffers and loaded kernels; what an earlier candidate left there is not counted again.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        gc.collect()
        if world.on_gpu:
            world.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(world.device)
            self._before, self._outside_before = torch.cuda.memory_allocated(world.device), self._outside()

    def _outside(self) -> int:
        free, total = torch.cuda.mem_get_info(self.world.device)
        return total - free - torch.cuda.memory_reserved(self.world.device)

    def peak(self) -> tuple[int, int] | None:
        """(peak in the allocator, growth outside), each that of the rank with the most; None on a CPU. Collective."""
        if not self.world.on_gpu:
            return None
        inside = torch.cuda.max_memory_allocated(self.world.device) - self._before
        outside = max(0, self._outside() - self._outside_before)
        inside_most, outside_most = self.world.largest([inside, outside])
        return int(inside_most), int(outside_most)


def _start_clock(world: World) -> Callable[[], float]:
    """Starts now; what it returns waits for the device and gives the microseconds until its own call."""
    phases = Phases(world)

    def stop() -> float:
        phases("")
        return phases.read()[0]

    return stop
