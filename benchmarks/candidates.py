"""Candidates: several implementations of the same step, timed one after the other in the same processes.

They start from the same tokens, routing and weights, and that their outputs agree is checked. Nothing is cached: every
step plans anew. Phases are cut by CUDA events on the current stream, so waits of the host are in them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.report import Measurement, Table
from benchmarks.timing import MemoryWatch, Phases, step_samples
from deepep_moe.backends import get_backend
from deepep_moe.config import ENV_PREFIX, DispatcherConfig
from deepep_moe.tools.world import World

AGREEMENT = 0.02  # results may differ by this, relative to the largest: bf16 is rounded in other places

Step = Callable[[Phases], Tensor]


class Candidate(NamedTuple):
    """Something to time: its name in tables, and a function that makes its step, which returns its output."""

    name: str
    build: Callable[[], Step]


def measure(
    world: World,
    table: Table,
    candidates: list[Candidate],
    repeats: int,
    done: Callable[[str], None],
    busy_ms: int = 0,
) -> Table:
    """Fill ``table`` with the phases of each candidate. Collective; the first candidate is the reference.

    Steps start from an idle GPU; with ``busy_ms`` also, in further columns, behind so many milliseconds of other work.
    A CPU has no such steps: what it computes it does in the call.
    """
    reference: Tensor | None = None
    for name, build in candidates:
        watch = MemoryWatch(world)
        step = build()
        samples = step_samples(world, step, repeats)
        memory = watch.peak()
        busy = step_samples(world, step, repeats, busy_ms) if busy_ms and world.on_gpu else {}
        for phase, times in samples.items():
            of_total = memory if phase == "total" else None
            table.rows.append(Measurement(phase, times, name, busy_us=busy.get(phase, []), memory=of_total))
        output = step(Phases(world)).detach().float().cpu()
        if reference is None:
            reference = output
        table.notes += disagreement(world, output, reference, f"outputs of {name} and {candidates[0].name}")
        del step, output
        gc.collect()
        done(name)
    table.reference = candidates[0].name
    table.rows.sort(key=lambda row: list(samples).index(row.name))  # stable: candidates stay in order
    return table


def disagreement(world: World, output: Tensor, reference: Tensor, what: str) -> list[str]:
    """A note where two results differ on any rank by more than :data:`AGREEMENT`. Collective."""
    error = ((output - reference).abs().max() / reference.abs().max()).nan_to_num(nan=torch.inf).item()
    error = world.largest([error])[0]
    return [f"Not the same work: {what} differ by {error:.1%} of the largest."] if error > AGREEMENT else []


def by_budget(world: World, budgets: list[int]) -> list[tuple[str, int]]:
    """(what tables say, SM budget); one in all where nvlink cannot run. Collective."""
    backend = get_backend(dist.group.WORLD, world.device, DispatcherConfig.load()).name
    return [(say_budget(n), n) for n in budgets] if backend == "nvlink" else [(backend, budgets[0])]


def with_settings(build: Callable[[], Step], **settings: float | str) -> Callable[[], Step]:
    """``build`` with these fields of ``DispatcherConfig``: read when a dispatcher is made, and the environment wins."""
    variables = {f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in settings.items()}

    def built() -> Step:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            return build()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    return built


def say_budget(num_sms: int) -> str:
    return f"{num_sms} SMs" if num_sms else "all SMs"
