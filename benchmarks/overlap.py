"""``benchmarks overlap``: how much of dispatch and combine overlaps with GEMMs, and the step time that it saves.

One MoE layer with a shared expert, forward and backward with the gradients of all weights, uncached, in several
orders; and Megatron-Core's, with its own overlap of the shared expert. Steps are timed without a profiler; then a
profiled step tells when each kernel ran: communication is hidden while another kernel runs too.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import Step, by_budget, disagreement, with_settings
from benchmarks.megatron_layer import SEED, Layer, layer_step, moe_layer
from benchmarks.ops import Shape, routing
from benchmarks.report import Measurement, Table
from benchmarks.timing import Phases, step_samples
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.nn import GroupedExperts
from deepep_moe.overlap import Overlap
from deepep_moe.tools.world import World

SERIAL, OVERLAPPED = "serial", "shared expert overlapped"

Order = Callable[["MoELayer"], Tensor]
LAYER_NOTE = (
    "Forward and backward with weight gradients, bf16, uncached, host waits included. The shared expert is a gated MLP "
    f"with the FFN size of one expert. {SERIAL}: plan, dispatch, experts, combine, shared expert. {OVERLAPPED}: its "
    "first GEMM while tokens travel to the experts, its second while they travel back. N chunks: Overlap.pipeline, "
    "then the shared expert."
)
MEGATRON_NOTE = (
    "Megatron-Core's MoELayer from its local specification with GroupedExperts, router included, forward and backward. "
    f"{OVERLAPPED}: moe_shared_expert_overlap."
)
GPU_NOTE = (
    "Of one profiled step, mean over the ranks: communication is the time in which a kernel of ours that moves rows or "
    "exchanges counts ran, its waits for the other ranks included; hidden the part of it in which another kernel ran "
    "too; GEMMs the time in which a GEMM ran."
)

_COMMUNICATION = re.compile(r"dispatch_kernel|combine_kernel|exchange|nccl", re.IGNORECASE)
_GEMM = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|matmul", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------- the layer


class MoELayer:
    """Routed experts over ``dispatcher`` and one shared expert, all gated; the same weights on every call."""

    def __init__(self, world: World, shape: Layer, tokens: int, config: DispatcherConfig) -> None:
        self.dispatcher = TokenDispatcher(dist.group.WORLD, shape.experts, config, device=world.device)
        self.overlap = Overlap(self.dispatcher)
        generator = torch.Generator(world.device).manual_seed(SEED + world.rank)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(size, generator=generator, device=world.device, dtype=torch.bfloat16)
            return (values * scale).requires_grad_()

        inner, outer = shape.hidden**-0.5, shape.ffn**-0.5
        torch.manual_seed(SEED + world.rank)
        self.grouped_experts = GroupedExperts(
            self.dispatcher.local_experts, shape.hidden, shape.ffn, device=world.device, dtype=torch.bfloat16
        )
        self.shared_in = draw(2 * shape.ffn, shape.hidden, scale=inner)
        self.shared_out = draw(shape.hidden, shape.ffn, scale=outer)
        self.x, self.gradient = draw(tokens, shape.hidden), draw(tokens, shape.hidden).detach()
        routes = routing(Shape(tokens, shape.hidden, shape.topk, shape.experts), world.rank, imbalanced=False)
        self.routes = routes.to(world.device)
        weights = torch.rand(tokens, shape.topk, generator=generator, device=world.device)
        self.weights = weights.softmax(1).requires_grad_()

    def step(self, order: Order, phase: Phases) -> Tensor:
        """Forward and backward; returns the output."""
        for leaf in (value for value in vars(self).values() if isinstance(value, Tensor)):
            leaf.grad = None
        self.grouped_experts.zero_grad()
        out = order(self)
        phase("forward")
        out.backward(self.gradient)
        phase("backward")
        return out

    def experts(self, arrived: Dispatched) -> Tensor:
        counts = arrived.tokens_per_expert_host
        return self.grouped_experts(arrived.rows, arrived.tokens_per_expert if counts is None else counts)

    def shared_first(self) -> Tensor:
        gate, value = F.linear(self.x, self.shared_in).chunk(2, dim=-1)
        return F.silu(gate) * value

    def shared_second(self, inner: Tensor) -> Tensor:
        return F.linear(inner, self.shared_out)


def serial(layer: MoELayer) -> Tensor:
    arrived = layer.dispatcher.dispatch(layer.x, layer.routes, layer.weights)
    routed = layer.dispatcher.combine(layer.experts(arrived), arrived, weights=arrived.weights)
    return routed + layer.shared_second(layer.shared_first())


def shared_overlapped(layer: MoELayer) -> Tensor:
    plan = layer.dispatcher.plan(layer.routes)
    sent = layer.overlap.begin_dispatch(layer.x, plan, layer.weights)
    inner = layer.shared_first()
    arrived = sent.wait()
    returning = layer.overlap.begin_combine(layer.experts(arrived), arrived, weights=arrived.weights)
    shared = layer.shared_second(inner)
    return returning.wait() + shared


def in_chunks(layer: MoELayer) -> Tensor:
    routed = layer.overlap.pipeline(layer.experts, layer.x, layer.routes, layer.weights)
    return routed + layer.shared_second(layer.shared_first())


class Variant(NamedTuple):
    """One way to run a layer: its row and column in the table, and the function that builds its step."""

    row: str
    setting: str
    build: Callable[[], Step]


def layer_variants(world: World, shape: Layer, tokens: int, budgets: list[int], chunks: Iterable[int]) -> list[Variant]:
    """:class:`MoELayer` in every order, with every SM budget. Collective."""
    orders: dict[str, tuple[Order, int]] = {SERIAL: (serial, 1), OVERLAPPED: (shared_overlapped, 1)}
    orders.update({f"{count} chunks": (in_chunks, count) for count in chunks})

    def builder(order: Order, budget: int, count: int) -> Callable[[], Step]:
        def build() -> Step:
            config = dataclasses.replace(DispatcherConfig.load(), num_sms=budget, num_chunks=count)
            layer = MoELayer(world, shape, tokens, config)
            return lambda phase: layer.step(order, phase)

        return build

    return [
        Variant(label, name, builder(order, budget, count))
        for label, budget in by_budget(world, budgets)
        for name, (order, count) in orders.items()
    ]


def megatron_variants(world: World, shape: Layer, tokens: int, budgets: list[int]) -> list[Variant]:
    """Megatron-Core's MoELayer with its own ``moe_shared_expert_overlap`` off and on. Collective."""

    def builder(kind: str, overlapped: bool) -> Callable[[], Step]:
        def build() -> Step:
            layer = moe_layer(
                world,
                shape,
                kind,
                grouped=True,
                moe_shared_expert_intermediate_size=shape.ffn,
                moe_shared_expert_overlap=overlapped,
            )
            return layer_step(world, layer, lambda x: layer(x)[0], (tokens, 1, shape.hidden), torch.bfloat16)

        return build

    settings = {SERIAL: False, OVERLAPPED: True}
    variants = [Variant("alltoall", name, builder("alltoall", overlapped)) for name, overlapped in settings.items()]
    for label, budget in by_budget(world, budgets):
        for name, overlapped in settings.items():
            variants.append(
                Variant(f"deepep, {label}", name, with_settings(builder("deepep", overlapped), num_sms=budget))
            )
    return variants


# ----------------------------------------------------------------------------------------------- the profile


class Span(NamedTuple):
    """One kernel, copy or fill on the GPU; microseconds."""

    name: str
    stream: int
    start: float
    stop: float

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS.items() if pattern.search(self.name)), "other kernels")


KINDS = {"communication": _COMMUNICATION, "GEMMs": _GEMM}

Interval = tuple[float, float]


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """What ran on the GPU according to a Chrome trace of torch.profiler, by start; times count from the first."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    first = min((event["ts"] for event in events), default=0.0)
    spans = []
    for event in events:
        start = event["ts"] - first
        spans.append(Span(event["name"], int(event["args"]["stream"]), start, start + event["dur"]))
    return sorted(spans, key=lambda span: span.start)


def covered(spans: Iterable[Span]) -> list[Interval]:
    """The time in which at least one of ``spans`` ran, as disjoint intervals."""
    result: list[Interval] = []
    for start, stop in sorted((span.start, span.stop) for span in spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def in_both(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """The time in both of two lists of disjoint, sorted intervals."""
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            result.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return result


def length(intervals: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def hidden_time(spans: list[Span]) -> dict[str, float]:
    """Columns of the table: communication, how much of it other kernels hide, GEMMs; microseconds and per cent."""
    communication = covered(span for span in spans if span.kind == "communication")
    others = covered(span for span in spans if span.kind != "communication")
    whole, hidden = length(communication), length(in_both(communication, others))
    return {
        "communication us": whole,
        "hidden us": hidden,
        "hidden %": 100 * hidden / whole if whole else 0.0,
        "GEMMs us": length(covered(span for span in spans if span.kind == "GEMMs")),
    }


def profiled(world: World, step: Callable[[], Any], save_as: Path | None) -> list[Span]:
    """The spans of one step (none on a CPU); its Chrome trace goes to ``save_as``."""
    world.meet()
    with profile(activities=[ProfilerActivity.CUDA if world.on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        world.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = save_as or Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return spans_of(json.loads(path.read_text(encoding="utf-8")))


# ----------------------------------------------------------------------------------------------- the results


class Timeline(NamedTuple):
    """A profiled step of rank 0."""

    title: str
    spans: list[Span]


def overlap_table(
    world: World,
    title: str,
    note: str,
    case: dict[str, Any],
    variants: list[Variant],
    repeats: int,
    trace: Path | None,
    done: Callable[[str], None],
) -> tuple[Table, list[Timeline]]:
    """Step times of ``variants``, and what hides. Collective. Rank 0 writes a Chrome trace of each into ``trace``."""
    table = Table(title, case, [note], reference=SERIAL)
    if world.on_gpu:
        table.notes.append(GPU_NOTE)
    timelines = []
    reference: Tensor | None = None
    for row, setting, build in variants:
        name = f"{row}, {setting}"
        file = trace / f"{row}-{setting}.json".replace(", ", "-").replace(" ", "_") if trace else None
        samples, spans, output = measure(world, build(), repeats, file if world.rank == 0 else None)
        details = mean_over_ranks(world, hidden_time(spans)) if world.on_gpu else {}
        table.rows.append(Measurement(row, samples, setting, details=details))
        timelines.append(Timeline(name, spans))
        reference = output if reference is None else reference
        table.notes += disagreement(world, output, reference, f"outputs of {name} and the first")
        gc.collect()
        done(name)
    return table, timelines


def measure(world: World, step: Step, repeats: int, save_as: Path | None) -> tuple[list[float], list[Span], Tensor]:
    """Step times, the spans of a profiled step, and the output."""
    samples = step_samples(world, step, repeats)["total"]
    spans = profiled(world, lambda: step(Phases(world)), save_as)
    return samples, spans, step(Phases(world)).detach().float()


def mean_over_ranks(world: World, values: dict[str, float]) -> dict[str, float]:
    every = world.gather(values)
    return {name: sum(one[name] for one in every) / world.size for name in values}


def draw(timelines: list[Timeline], title: str, path: Path) -> None:
    """When each kernel ran, a row per stream, a panel per timeline."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colours = {"communication": "C3", "GEMMs": "C0", "other kernels": "C7"}
    figure, axes = pyplot.subplots(
        len(timelines), 1, figsize=(12, 0.7 + 1.0 * len(timelines)), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, (name, spans) in zip(axes[:, 0], timelines):
        streams = sorted({span.stream for span in spans})
        for row, stream in enumerate(streams):
            for kind, colour in colours.items():
                these = [span for span in spans if (span.stream, span.kind) == (stream, kind)]
                bars = [(span.start / 1e3, (span.stop - span.start) / 1e3) for span in these]
                axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour)
        axis.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams], fontsize=7)
        axis.set_title(name, fontsize=8, loc="left")
    axes[-1, 0].set_xlabel("ms")
    patches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=patches, loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
