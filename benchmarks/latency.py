"""``benchmarks latency``: the low-latency calls at decode-sized batches, beside torch.distributed's all-to-all.

Settings of a table: *graph*: a captured graph of many calls, its time divided by their number, so launch gaps are in it
and host time is not; *eager*: back-to-back calls whose host time is hidden; *host*: the host's time in a dispatch, in a
combine, and in both. The halves of a call with a hook are timed by events around each kernel, with a pause between them
in which the rows arrive, so the receiving half does not wait. Events around an empty kernel are timed as well: subtract
them to get the time of the kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ops import Shape, Traffic, all_to_all, parse_sizes, routing
from benchmarks.report import Measurement, Table
from benchmarks.timing import WARMUP, host_samples, kernel_samples
from deepep_moe.backends import Backend, get_backend
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import InputError
from deepep_moe.events import StreamRunner
from deepep_moe.fp8 import BLOCK
from deepep_moe.low_latency import LowLatency, LowLatencyHandle
from deepep_moe.low_latency_engine import DispatchCall
from deepep_moe.low_latency_nodes import symmetric_bytes
from deepep_moe.tools.world import World

GRAPH_CALLS = 20
HOST_CALLS = 20
_PAUSE_CYCLES = 100_000  # about 50 us: longer than rows take

NOTE = (
    "graph: calls captured in one CUDA graph, launch gaps included, host time not. eager: back-to-back calls, host "
    "time hidden. hook: halves of a call, events around each kernel (and an empty one: subtract it for the kernel's "
    "own time), rows arrive between the two. host: wall clock of the host in the calls. Every sample is that of the "
    "slowest rank. link: bytes between ranks, of the busiest rank and direction: one row per token and rank."
)


class Layer(NamedTuple):
    """What does not change with the number of tokens."""

    hidden: int
    topk: int
    experts: int

    @classmethod
    def parse(cls, text: str) -> Layer:
        """``7168,8,288``: hidden size, top-k, experts of the whole group."""
        rule = "three positive integers hidden,topk,experts with topk <= experts, such as 7168,8,288"
        return parse_sizes(cls, "--layer", text, rule)

    def check(self, ranks: int) -> None:
        """Raise InputError where the ranks cannot serve it."""
        if self.experts % ranks:
            raise InputError("--layer", ",".join(map(str, self)), f"experts must be a multiple of the {ranks} ranks")
        if self.hidden % BLOCK:
            raise InputError("--layer", ",".join(map(str, self)), f"hidden must be a multiple of {BLOCK}, for FP8")


class Case:
    """The tensors of one number of tokens on this rank, and the calls on them."""

    def __init__(self, world: World, backend: Backend, layer: Layer, tokens: int) -> None:
        self.world, self.layer, self.tokens = world, layer, tokens
        device, generator = world.device, torch.Generator(device="cpu").manual_seed(world.rank)
        self.topk_idx = routing(Shape(tokens, *layer), world.rank, False).to(device)
        self.weights = torch.rand(tokens, layer.topk, generator=generator, dtype=torch.float32).to(device)
        self.x = torch.randn(tokens, layer.hidden, generator=generator, dtype=torch.float32).bfloat16().to(device)
        self.calls = LowLatency(backend, backend.config.num_sms, False, StreamRunner(device))
        self.call, self.handle, *_ = self.dispatch(fp8=True)
        self.y = torch.zeros(self.call.rows.shape, dtype=torch.bfloat16, device=device)

    def dispatch(
        self, fp8: bool, hook: bool = False
    ) -> tuple[DispatchCall, LowLatencyHandle, Any, Callable[[], None] | None]:
        switches = (fp8, False, False)
        return self.calls.dispatch(
            self.x, self.topk_idx, self.tokens, self.layer.experts, None, None, switches, False, hook
        )

    def combine(self, handle: LowLatencyHandle, hook: bool = False) -> tuple[Tensor, Any, Callable[[], None] | None]:
        return self.calls.combine(self.y, self.topk_idx, self.weights, handle, False, False, hook, None, None)

    def both(self, hook: bool = False) -> None:
        _, handle, _, receive = self.dispatch(True, hook)
        if receive is not None:
            receive()
        _, _, receive = self.combine(handle, hook)
        if receive is not None:
            receive()

    def traffic(self) -> Traffic:
        """Rows that each rank sends to each."""
        local_experts, ranks = self.layer.experts // self.world.size, range(self.world.size)
        owner = self.topk_idx.cpu() // local_experts
        counts = [int((owner == rank).any(1).sum()) for rank in ranks]
        return Traffic(torch.tensor(self.world.gather(counts), dtype=torch.int64, device="cpu"))


def config_for(layer: Layer, counts: list[int], ranks: int) -> DispatcherConfig:
    """The configuration, with symmetric memory for calls of all ``counts`` of tokens over nodes of one rank."""
    config = DispatcherConfig.load()
    needed = sum(symmetric_bytes(tokens, layer.hidden, ranks) for tokens in counts)
    return replace(config, nvshmem_bytes=max(config.nvshmem_bytes, needed))


def measure_case(
    world: World, config: DispatcherConfig, layer: Layer, tokens: int, repeats: int, done: Callable[[str], None]
) -> Table:
    """The table of one number of tokens. Collective."""
    backend = get_backend(dist.group.WORLD, world.device, config)
    case = Case(world, backend, layer, tokens)
    shape = Shape(tokens, *layer)
    title = f"Low latency: {shape}, {world.size} ranks, engine {case.calls.engine}"
    table = Table(title, {**shape._asdict(), "ranks": world.size, "engine": case.calls.engine}, [NOTE])
    traffic = case.traffic()
    bf16 = 2 * layer.hidden
    fp8 = layer.hidden + 4 * (layer.hidden // BLOCK)

    def add(name: str, samples: list[float], setting: str, row_bytes: int = 0) -> None:
        table.rows.append(Measurement(name, samples, setting, traffic.link * row_bytes, traffic.logical * row_bytes))

    operations: list[tuple[str, int, Callable[[], Any]]] = [
        ("dispatch FP8", fp8, lambda: case.dispatch(True)),
        ("dispatch BF16", bf16, lambda: case.dispatch(False)),
        ("combine BF16", bf16, lambda: case.combine(case.handle)),
        ("dispatch FP8 + combine", fp8 + bf16, case.both),
        ("dispatch FP8 + combine, hooks", fp8 + bf16, lambda: case.both(hook=True)),
    ]
    captures = case.calls.engine != "reference"
    for name, row_bytes, run in operations:
        if captures:
            add(name, graph_samples(world, run, repeats), "graph", row_bytes)
        add(name, kernel_samples(world, run, repeats), "eager", row_bytes)
    if world.on_gpu:
        halves = {
            "dispatch FP8": lambda: case.dispatch(True, hook=True)[3],
            "combine BF16": lambda: case.combine(case.handle, hook=True)[2],
        }
        for name, send in halves.items():
            for half, samples in half_samples(world, send, repeats).items():
                add(f"{name}, {half}", samples, "hook")
    for name, run in (
        ("dispatch FP8 + combine", case.both),
        ("dispatch FP8", lambda: case.dispatch(True)),
        ("combine BF16", lambda: case.combine(case.handle)),
    ):
        add(name, host_samples(world, run, repeats, HOST_CALLS), "host")
    if world.can_all_to_all:
        for kind, row_bytes in (("FP8", fp8), ("BF16", bf16)):
            run = all_to_all(world, traffic, row_bytes)
            add(
                f"{world.collectives} all_to_all_single {kind}", kernel_samples(world, run, repeats), "eager", row_bytes
            )
    else:
        table.notes.append("No all-to-all beside it: ranks share a GPU, which NCCL refuses.")
    case.calls.check()
    world.synchronize()
    dist.barrier()  # a peer may still write to what is given back here
    case.calls.close()
    done(f"{tokens} tokens")
    return table


def graph_samples(world: World, run: Callable[[], Any], repeats: int) -> list[float]:
    """Time of one of :data:`GRAPH_CALLS` calls in a captured graph."""
    run()
    world.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            run()
    return [sample / GRAPH_CALLS for sample in kernel_samples(world, graph.replay, repeats, calls=1)]


def half_samples(world: World, send: Callable[[], Callable[[], None] | None], repeats: int) -> dict[str, list[float]]:
    """Times of the kernel that sends, of the one that receives when all rows are there, and of an empty kernel.

    The last is what the events and the launch alone take.
    """
    samples: dict[str, list[float]] = {"send": [], "receive": [], "an empty kernel": []}
    for _ in range(WARMUP + repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        world.align(busy=True)  # the host is ahead of the GPU
        events[0].record()
        receive = send()
        assert receive is not None
        events[1].record()
        torch.cuda._sleep(_PAUSE_CYCLES)
        events[2].record()
        receive()
        events[3].record()
        torch.cuda._sleep(_PAUSE_CYCLES)
        events[4].record()
        torch.cuda._sleep(0)
        events[5].record()
        world.synchronize()
        for number, times in enumerate(samples.values()):
            times.append(events[2 * number].elapsed_time(events[2 * number + 1]) * 1e3)
    return {name: world.largest(times[WARMUP:]) for name, times in samples.items()}


def draw(tables: list[Table], title: str, path: Path) -> None:
    """Time against tokens, a line for each operation and setting."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for table in tables:
        for row in table.rows:
            lines.setdefault((row.setting, row.name), []).append((table.case["tokens"], row.median))
    settings = list(dict.fromkeys(setting for setting, _ in lines))
    figure, axes = pyplot.subplots(
        1, len(settings), figsize=(5.5 * len(settings), 5.5), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, setting in zip(axes[0], settings):
        for (of, name), points in lines.items():
            if of == setting:
                axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens per rank")
        axis.set_title(setting, fontsize=9)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel("us, median")
    figure.suptitle(title, fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
