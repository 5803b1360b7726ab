"""``benchmarks ops``: the backend's operations alone, beside torch.distributed's all-to-all and the link itself.

Rows of a table, and what is in their time:

* kernels: one dispatch or combine on a plan that is ready, five in a row, host time hidden;
* calls: an uncached plan and the operations on it, from an idle device until the results are there, host included;
* plan and host: what the host spends until it knows the counts, and to launch one dispatch and one combine;
* the same remote bytes by ``all_to_all_single``, whose rows are already sorted by destination and stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import peers
from benchmarks.candidates import disagreement, say_budget
from benchmarks.report import Measurement, Table
from benchmarks.timing import call_samples, host_samples, kernel_samples
from deepep_moe.backends import Backend, Layout, Plan, Wire, get_backend, why_not
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import InputError
from deepep_moe.extension import _C
from deepep_moe.fp8 import BLOCK, quantize_e4m3
from deepep_moe.peer_memory import PeerMemory
from deepep_moe.tools.world import World

LINK_BYTES = 256 * 2**20
HOST_CALLS = 20
HOT = 4  # times the load of the other experts, in imbalanced routing

NOTES = [
    "dispatch and combine: kernel time, back-to-back calls on a ready plan between CUDA events, ranks aligned (wall "
    "clock on CPUs). call: from an idle device until the results are there, host included, nothing cached; a combine "
    "alone uses the plan of its dispatch, as a training step does. plan: until the host knows the counts, which size "
    "the outputs; the rest of it is enqueued by then. Every sample is that of the slowest rank.",
    "link: bytes between ranks only, of the busiest rank and direction; logical: all rows it receives, its own too. "
    "Bytes are tokens with their scales and weights.",
]


T = TypeVar("T", bound=tuple)


def parse_sizes(kind: type[T], option: str, text: str, rule: str) -> T:
    """A named tuple of positive integers with a ``topk`` and ``experts``, from ``text`` such as ``4096,7168,8,256``.

    Raises:
        InputError: with ``option`` and ``rule``, where it is none or asks for more experts than there are.
    """
    try:
        sizes: Any = kind(*map(int, text.split(",")))  # type: ignore[arg-type]  # of a named tuple
    except (TypeError, ValueError):
        raise InputError(option, text, rule) from None
    if min(sizes) < 1 or sizes.topk > sizes.experts:
        raise InputError(option, text, rule)
    return sizes  # type: ignore[no-any-return]


class Shape(NamedTuple):
    """What every rank brings: its tokens, and where they may go."""

    tokens: int
    hidden: int
    topk: int
    experts: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``4096,7168,8,256``: tokens, hidden size, top-k, experts of the whole group."""
        rule = "four positive integers tokens,hidden,topk,experts with topk <= experts, such as 4096,7168,8,256"
        return parse_sizes(cls, "--shape", text, rule)

    def check(self, ranks: int) -> None:
        """Raise InputError unless every rank gets the same number of experts."""
        if self.experts % ranks:
            raise InputError("--shape", ",".join(map(str, self)), f"experts must be a multiple of the {ranks} ranks")

    def __str__(self) -> str:
        return f"{self.tokens} tokens per rank, hidden {self.hidden}, top-{self.topk} of {self.experts} experts"


def routing(shape: Shape, rank: int, imbalanced: bool) -> Tensor:
    """``[T, K]`` int64 experts, drawn at random; the first eighth of them is ``HOT`` times as likely if imbalanced.

    These experts are neighbours, so that ranks are imbalanced too.
    """
    likely = torch.ones(shape.experts, dtype=torch.float32, device="cpu")
    if imbalanced:
        likely[: max(1, shape.experts // 8)] = HOT
    generator = torch.Generator().manual_seed(rank)
    return torch.multinomial(likely.expand(shape.tokens, -1), shape.topk, generator=generator)


@dataclass(frozen=True)
class Traffic:
    """Rows of one dispatch: ``rows[s][d]`` go from rank s to rank d. A combine sends them back."""

    rows: Tensor  # [R, R] int64

    @classmethod
    def of(cls, world: World, plan: Plan) -> Traffic:
        sent = (plan.send_slot >= 0).sum(0).tolist()
        return cls(torch.tensor(world.gather(sent), dtype=torch.int64, device="cpu"))

    @property
    def link(self) -> int:
        """Rows over the busiest rank's link, in its busier direction."""
        between = self.rows - self.rows.diag().diag()
        return int(torch.maximum(between.sum(0), between.sum(1)).max())

    @property
    def logical(self) -> int:
        """Rows that the busiest rank receives, from itself too."""
        return int(self.rows.sum(0).max())


class Operation(NamedTuple):
    """Something to time; ``row_bytes`` cross the link for every row."""

    name: str
    row_bytes: int
    run: Callable[[], Any]


class Case:
    """The tensors of one shape and routing on this rank, and the operations on them."""

    def __init__(self, world: World, shape: Shape, imbalanced: bool) -> None:
        self.world, self.shape, self.imbalanced = world, shape, imbalanced
        device, generator = world.device, torch.Generator().manual_seed(world.rank)
        self.topk_idx = routing(shape, world.rank, imbalanced).to(device)
        self.weights = torch.rand(shape.tokens, shape.topk, generator=generator).to(device)
        self.x = torch.randn(shape.tokens, shape.hidden, generator=generator).bfloat16().to(device)
        self.fp8 = quantize_e4m3(self.x) if shape.hidden % BLOCK == 0 else None
        self.bf16_bytes, self.weights_bytes = 2 * shape.hidden, 4 * shape.topk
        self.fp8_bytes = shape.hidden + 4 * (shape.hidden // BLOCK)

    def describe(self) -> dict[str, Any]:
        """For a program that reads the results."""
        return {**self.shape._asdict(), "imbalanced": self.imbalanced, "ranks": self.world.size}

    def plan(self, backend: Backend) -> Plan:
        return backend.plan(self.topk_idx, self.shape.experts)

    def kernels(self, backend: Backend, plan: Plan) -> Iterator[Operation]:
        """Operations on a plan that is ready."""
        x, weights, bf16 = self.x, self.weights, self.bf16_bytes
        by_source, by_expert = Layout.BY_SOURCE, Layout.BY_EXPERT
        yield Operation("dispatch BF16", bf16, lambda: backend.dispatch(plan, x, layout=by_source))
        if self.fp8 is not None:
            e4m3, scales = self.fp8
            yield Operation(
                "dispatch FP8", self.fp8_bytes, lambda: backend.dispatch(plan, e4m3, layout=by_source, scales=scales)
            )
        rows = backend.dispatch(plan, x, layout=by_source).x
        yield Operation("combine BF16", bf16, lambda: backend.combine(plan, rows, layout=by_source))

        def grouped(**options: Any) -> Any:
            return backend.dispatch(plan, options.pop("x", x), layout=by_expert, **options)

        yield Operation("grouped dispatch BF16 + weights", bf16 + self.weights_bytes, lambda: grouped(weights=weights))
        if self.fp8 is not None:
            yield Operation("grouped dispatch FP8", self.fp8_bytes, lambda: grouped(x=e4m3, scales=scales))
            yield Operation("grouped dispatch BF16, sent as FP8", self.fp8_bytes, lambda: grouped(wire=Wire.E4M3))
            yield Operation(
                "grouped dispatch BF16, through FP8", self.fp8_bytes, lambda: grouped(wire=Wire.E4M3_TO_BF16)
            )
        expert_rows = grouped().x
        yield Operation("grouped combine BF16", bf16, lambda: backend.combine(plan, expert_rows, layout=by_expert))

    def calls(self, backend: Backend, plan: Plan) -> Iterator[Operation]:
        """What a user calls, with a new plan each time; ``plan`` serves the combines that stand alone."""
        x, weights, bf16 = self.x, self.weights, self.bf16_bytes

        def dispatch(layout: Layout, **options: Any) -> Any:
            return backend.dispatch(self.plan(backend), options.pop("x", x), layout=layout, **options)

        def round_trip(layout: Layout) -> None:
            made = self.plan(backend)
            backend.combine(made, backend.dispatch(made, x, layout=layout).x, layout=layout)

        by_source, by_expert = Layout.BY_SOURCE, Layout.BY_EXPERT
        yield Operation("call: plan + dispatch BF16", bf16, lambda: dispatch(by_source))
        if self.fp8 is not None:
            e4m3, scales = self.fp8
            yield Operation(
                "call: plan + dispatch FP8", self.fp8_bytes, lambda: dispatch(by_source, x=e4m3, scales=scales)
            )
        name = "call: plan + grouped dispatch BF16 + weights"
        yield Operation(name, bf16 + self.weights_bytes, lambda: dispatch(by_expert, weights=weights))
        for layout, kind in ((by_source, ""), (by_expert, "grouped ")):
            rows = backend.dispatch(plan, x, layout=layout).x
            yield Operation(
                f"call: {kind}combine BF16 (plan of its dispatch)",
                bf16,
                lambda rows=rows, layout=layout: backend.combine(plan, rows, layout=layout),  # type: ignore[misc]
            )
            name = f"call: plan + {kind}dispatch + {kind}combine BF16"
            yield Operation(name, 2 * bf16, lambda layout=layout: round_trip(layout))  # type: ignore[misc]

    def peer_kernels(self, calls: peers.Calls) -> Iterator[Operation]:
        """:meth:`kernels` of DeepEP, as far as it has them."""
        rows, handle = calls.first(self.x)
        yield Operation("dispatch BF16", self.bf16_bytes, lambda: calls.dispatch(self.x, handle))
        if self.fp8 is not None:
            yield Operation("dispatch FP8", self.fp8_bytes, lambda: calls.dispatch(self.fp8, handle))
        yield Operation("combine BF16", self.bf16_bytes, lambda: calls.combine(rows, handle))

    def peer_results(self, calls: peers.Calls) -> tuple[Tensor, Tensor]:
        """The result of a dispatch and a combine of DeepEP, and what it must be: a token times the ranks it goes to."""
        owners = self.topk_idx // (self.shape.experts // self.world.size)
        ranks = torch.stack([(owners == rank).any(1) for rank in range(self.world.size)]).sum(0)
        return calls.combine(*calls.first(self.x)).float(), self.x.float() * ranks.unsqueeze(1)

    def peer_calls(self, calls: peers.Calls) -> Iterator[Operation]:
        """:meth:`calls` of DeepEP, as far as it has them."""
        yield Operation("call: plan + dispatch BF16", self.bf16_bytes, lambda: calls.first(self.x))
        if self.fp8 is not None:
            yield Operation("call: plan + dispatch FP8", self.fp8_bytes, lambda: calls.first(self.fp8))
        name = "call: plan + dispatch + combine BF16"
        yield Operation(name, 2 * self.bf16_bytes, lambda: calls.combine(*calls.first(self.x)))

    def all_to_alls(self, traffic: Traffic) -> Iterator[Operation]:
        """``all_to_all_single`` of the rows of one dispatch, with and without those that stay on their rank."""
        for kind, row_bytes in (("BF16", self.bf16_bytes), ("FP8", self.fp8_bytes if self.fp8 else 0)):
            for own in ("excluded", "included") if row_bytes else ():
                name = f"{self.world.collectives} all_to_all_single {kind}, own rows {own}"
                yield Operation(name, row_bytes, all_to_all(self.world, traffic, row_bytes, own == "included"))


def all_to_all(world: World, traffic: Traffic, row_bytes: int, own_rows: bool = False) -> Callable[[], Any]:
    """``all_to_all_single`` of as many rows, sorted by destination already; ``own_rows``: with those that stay."""
    sent, received = traffic.rows[world.rank].clone(), traffic.rows[:, world.rank].clone()
    if not own_rows:
        sent[world.rank] = received[world.rank] = 0
    source = torch.zeros(int(sent.sum()), row_bytes, dtype=torch.uint8, device=world.device)
    target = torch.empty(int(received.sum()), row_bytes, dtype=torch.uint8, device=world.device)
    splits = (received.tolist(), sent.tolist())
    return lambda: dist.all_to_all_single(target, source, *splits)


def make_backends(world: World, budgets: list[int]) -> dict[str, Backend]:
    """One backend per SM budget (0: all), by what tables call it; one in all where nvlink cannot run. Collective."""
    backends: dict[str, Backend] = {}
    for num_sms in budgets:
        backend = get_backend(dist.group.WORLD, world.device, replace(DispatcherConfig.load(), num_sms=num_sms))
        if backend.name != "nvlink":
            return {backend.name: backend}  # its kernels are torch.distributed's, on which the budget has no hold
        backends[say_budget(num_sms)] = backend
    return backends


def measure_case(
    world: World,
    backends: dict[str, Backend],
    shape: Shape,
    imbalanced: bool,
    repeats: int,
    ceiling: float,
    done: Callable[[str], None],
) -> Table:
    """One table: every backend, then torch.distributed. Collective; calls ``done`` after each of these."""
    case = Case(world, shape, imbalanced)
    load = "imbalanced" if imbalanced else "balanced"
    table = Table(f"Operations: {shape}, {load} routing, {world.size} ranks", case.describe(), list(NOTES))
    table.ceiling = ceiling
    plan = case.plan(next(iter(backends.values())))
    traffic, most_rows = Traffic.of(world, plan), max(world.gather(plan.num_rows))

    def add(name: str, samples: list[float], setting: str, row_bytes: int = 0) -> None:
        link, logical = traffic.link * row_bytes, traffic.logical * row_bytes
        table.rows.append(Measurement(name, samples, setting, link, logical))

    def add_operations(setting: str, kernels: Iterator[Operation], calls: Iterator[Operation]) -> None:
        for name, row_bytes, run in kernels:
            add(name, kernel_samples(world, run, repeats), setting, row_bytes)
        for name, row_bytes, run in calls:
            wall, events = call_samples(world, run, repeats)
            add(f"{name}, wall clock", wall, setting, row_bytes)
            if events:
                add(f"{name}, events", events, setting, row_bytes)

    for setting, backend in backends.items():
        plan = case.plan(backend)  # makes this backend's staging large enough, too
        add_operations(setting, case.kernels(backend, plan), case.calls(backend, plan))
        for name, samples in _host_times(world, case, backend, plan, repeats):
            add(name, samples, setting)
        backend.check()
        done(f"{shape}, {load}: {setting}")

    if (missing := peers.missing(world)) is None:
        sizes = (shape.hidden, shape.experts, shape.tokens)
        for setting, calls in peers.interfaces(case.topk_idx, case.weights, *sizes).items():
            add_operations(setting, case.peer_kernels(calls), case.peer_calls(calls))
            table.notes += disagreement(world, *case.peer_results(calls), f"tokens through {setting} and their copies")
            calls.close()
    else:
        table.notes.append(f"DeepEP is not timed: {missing}.")
    hot = max(1, shape.experts // 8)
    spread = f" makes experts 0 to {hot - 1} {HOT} times as likely as others" if imbalanced else " is uniform at random"
    share = traffic.logical / (traffic.rows.sum().item() / world.size)
    table.notes.append(
        f"Routing{spread}: the busiest rank receives {traffic.logical} rows ({share:.2f} of the mean), a rank has at "
        f"most {most_rows} expert rows, and the busiest link carries {traffic.link} rows."
    )
    if world.can_all_to_all:
        for name, row_bytes, run in case.all_to_alls(traffic):
            add(name, kernel_samples(world, run, repeats), "", row_bytes)
    else:
        table.notes.append("No all-to-all beside it: ranks share a GPU, which NCCL refuses.")
    done(f"{shape}, {load}: all-to-all")
    return table


def _host_times(
    world: World, case: Case, backend: Backend, plan: Plan, repeats: int
) -> Iterator[tuple[str, list[float]]]:
    by_source, by_expert = Layout.BY_SOURCE, Layout.BY_EXPERT
    rows = backend.dispatch(plan, case.x, layout=by_source).x
    grouped_rows = backend.dispatch(plan, case.x, layout=by_expert).x

    def pair() -> None:
        backend.dispatch(plan, case.x, layout=by_source)
        backend.combine(plan, rows, layout=by_source)

    def grouped_pair() -> None:
        backend.dispatch(plan, case.x, layout=by_expert, weights=case.weights)
        backend.combine(plan, grouped_rows, layout=by_expert)

    def make_plan() -> None:
        case.plan(backend).known_sizes()

    yield "plan: until the host knows the counts", host_samples(world, make_plan, repeats, HOST_CALLS)
    yield "plan: the same, a single call", host_samples(world, make_plan, repeats)
    yield "host time of dispatch + combine", host_samples(world, pair, repeats, HOST_CALLS)
    yield "host time of grouped dispatch + combine", host_samples(world, grouped_pair, repeats, HOST_CALLS)


def link_ceiling(world: World, repeats: int) -> list[float]:
    """Microseconds in which kernels store ``sent_bytes`` from every rank to all others, all at once.

    They store an equal part to each peer, to all of them at the same time, and do nothing else. Empty on a CPU, on one
    rank, where ranks share a GPU, and where the backend nvlink cannot run.
    """
    if world.collectives != "nccl" or world.size == 1:
        return []
    group = dist.group.WORLD
    assert group is not None
    if why_not("nvlink", group, world.device) is not None:
        return []
    memory = PeerMemory(group, world.device, sent_bytes(world.size))
    targets = link_targets(world.rank, memory.addresses)
    blocks = torch.cuda.get_device_properties(world.device).multi_processor_count
    stream = torch.cuda.current_stream(world.device).cuda_stream
    part = sent_bytes(world.size) // len(targets)
    return kernel_samples(world, lambda: _C.fill_peers(targets, part, blocks, stream), repeats, calls=2)


def sent_bytes(ranks: int) -> int:
    """What a rank sends in :func:`link_ceiling`: ``LINK_BYTES``, cut to equal parts of whole cache lines."""
    return LINK_BYTES // (ranks - 1) // 128 * 128 * (ranks - 1)


def link_targets(rank: int, addresses: list[int]) -> list[int]:
    """Where ``rank`` stores its part for each peer: in that peer's memory, and nobody else does.

    The first one is the next rank's, and so on, so that ranks do not all begin with the same peer.
    """
    ranks = len(addresses)
    part = sent_bytes(ranks) // (ranks - 1)
    return [addresses[(rank + step) % ranks] + (step - 1) * part for step in range(1, ranks)]


def ceiling_table(world: World, samples: list[float]) -> Table:
    """What :func:`link_ceiling` gave, as a table of its own."""
    sent = sent_bytes(world.size)
    row = Measurement("stores to all peers at once", samples, link_bytes=sent)
    note = (
        f"{sent / 2**20:.0f} MiB from each rank, an equal part to each peer, all ranks at once: a kernel on all SMs, "
        "whose threads store 16 bytes to each peer in turn, read nothing and wait for nobody."
    )
    return Table(f"Link ceiling, {world.size} ranks", {"ranks": world.size, "bytes": sent}, [note], [row])
