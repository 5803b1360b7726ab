"""``python -m benchmarks NAME``: how long operations, dispatchers and whole MoE layers take, and what else takes.

``ops`` times the backend (ops.py), ``latency`` the low-latency calls (latency.py), ``dispatcher`` what a training step
pays for dispatch and combine (dispatcher.py), ``megatron`` and ``deepspeed`` whole MoE layers (megatron_layer.py,
deepspeed_layer.py), ``overlap`` how much communication overlaps with GEMMs (overlap.py), ``nodes`` dispatchers and
layers over several nodes (nodes.py), and ``model`` predicts several nodes (node_model.py). timing.py defines what a
time includes; report.py prints and saves it.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import benchmarks.deepspeed_layer as bench_deepspeed
import benchmarks.dispatcher as bench_dispatcher
import benchmarks.latency as bench_latency
import benchmarks.megatron_layer as bench_megatron
import benchmarks.nodes as bench_nodes
import benchmarks.ops as bench_ops
import benchmarks.overlap as bench_overlap
from benchmarks import node_model
from benchmarks.candidates import by_budget
from benchmarks.report import Report, need_matplotlib
from deepep_moe.errors import DeepEPMoEError, InputError, UnsupportedError
from deepep_moe.tools.world import World, ranks_of_this_run

RUN = "torchrun --nproc-per-node"

# -------------------------------------------------------------------------------------------------- options


class Option(NamedTuple):
    """One command-line option, as ``argparse`` takes it."""

    flag: str
    keywords: dict[str, Any]


class Repeated(argparse.Action):
    """An option that may be given several times; the first time replaces the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: Namespace, value: Any, flag: str | None = None
    ) -> None:
        given = getattr(options, self.dest)
        setattr(options, self.dest, [value] if given is self.default else [*given, value])


_PICTURES = (".png", ".svg", ".pdf")


def at_least(least: int) -> Callable[[str], int]:
    """A type of integers, for ``argparse``."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    return integer


def picture(text: str) -> Path:
    """A type of files to draw in, for ``argparse``: a wrong one should not be found after the measurement."""
    path = Path(text)
    if path.suffix not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text} does not end with one of {', '.join(_PICTURES)}")
    return path


def option(flag: str, default: Any, text: str, **keywords: Any) -> Option:
    """An option whose help shows its default."""
    shown = " ".join(default) if isinstance(default, list) else default
    help_text = text if default in (None, True) else f"{text} Default: {shown}."
    return Option(flag, {"default": default, "help": help_text, **keywords})


def shapes(*default: str) -> Option:
    text = "Tokens per rank, hidden size, top-k, experts of the group; may be repeated."
    return option("--shape", list(default), text, action=Repeated, metavar="T,H,K,E")


def budgets(default: str = "0") -> Option:
    return option("--num-sms", default, "SMs that communication kernels may use, comma-separated; 0: all.")


LAYERS = option(
    "--layer",
    list(bench_megatron.LAYERS),
    "deepseek, mixtral, or hidden,ffn,experts,topk; may be repeated.",
    action=Repeated,
)
TOKENS = option("--tokens", 4096, "Tokens of each rank.", type=at_least(1))
OF_EVERY_RUN = (
    option("--repeats", 20, "Samples of each time; tables show their median.", type=at_least(1)),
    option("--json", None, "Write every sample, the command and versions here.", type=Path),
    option("--markdown", None, "Write tables for a document here.", type=Path),
    option("--plot", None, f"Draw a picture here ({', '.join(_PICTURES)}).", type=picture),
    option("--commit", None, "Commit to show where this is no git checkout."),
)


class Command(NamedTuple):
    """One subcommand: its function, whose docstring is its help, its options, and examples."""

    run: Callable[[Namespace], None]
    options: tuple[Option, ...]
    examples: tuple[str, ...]


COMMANDS: dict[str, Command] = {}


def command(*options: Option, examples: tuple[str, ...]) -> Callable[[Callable[[Namespace], None]], Callable]:
    """Register a function as the subcommand of its name."""

    def register(run: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
        COMMANDS[run.__name__] = Command(run, options, examples)
        return run

    return register


# -------------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What a subcommand works with: the ranks, the report, and a progress bar on rank 0."""

    world: World
    report: Report
    progress: Progress
    repeats: int

    def steps(self, total: int) -> Callable[[str], None]:
        """A function to call after each of ``total`` steps, with what was done."""
        task = self.progress.add_task("", total=total)
        return lambda name: self.progress.update(task, advance=1, description=name)


@contextmanager
def run_on_all_ranks(options: Namespace, plot: bool = True) -> Iterator[Run]:
    """Ranks, report and progress bar. ``plot``: the report draws what ``--plot`` asks for."""
    files = {"json": options.json, "markdown": options.markdown, "plot": options.plot if plot else None}
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ranks_of_this_run() as world:
        console = Console(stderr=True)
        with Progress(*bar, console=console, transient=True, disable=world.rank != 0) as progress:
            shown = Console()
            if not shown.is_terminal:  # a log has no width: 80 columns would cut the tables
                shown = Console(width=200)
            yield Run(world, Report.start(world, files, options.commit, shown), progress, options.repeats)


# --------------------------------------------------------------------------------------------- subcommands


@command(
    shapes("4096,7168,8,256"),
    option("--routing", "balanced", "imbalanced: 4x load on an eighth.", choices=("balanced", "imbalanced", "both")),
    budgets(),
    examples=(
        f"{RUN} 2 -m benchmarks ops",
        f"{RUN} 8 -m benchmarks ops --shape 4096,7168,8,256 --shape 8192,4096,2,8 --num-sms 0,24 --routing both",
        f"{RUN} 2 -m benchmarks ops --shape 64,256,2,8      (also runs on CPUs)",
    ),
)
def ops(options: Namespace) -> None:
    """Dispatch, combine and plan of the backend; NCCL's all-to-all of the same rows; the link's ceiling."""
    with run_on_all_ranks(options) as run:
        world = run.world
        cases = parse_shapes(options.shape, world)
        loads = {"balanced": [False], "imbalanced": [True], "both": [False, True]}[options.routing]
        backends = bench_ops.make_backends(world, parse_budgets(options.num_sms))
        done = run.steps(1 + len(cases) * len(loads) * (len(backends) + 1))
        ceiling = 0.0
        copies = bench_ops.link_ceiling(world, run.repeats)
        if copies:
            table = bench_ops.ceiling_table(world, copies)
            ceiling = table.rows[0].gigabytes_per_second(table.rows[0].link_bytes)
            run.report.add(table)
        done("link ceiling")
        for case in cases:
            for imbalanced in loads:
                table = bench_ops.measure_case(world, backends, case, imbalanced, run.repeats, ceiling, done)
                run.report.add(table)
        for backend in backends.values():
            backend.close()


@command(
    option("--layer", "7168,8,288", "Hidden size, top-k, experts of the group."),
    option("--tokens", "1,8,32,64,128,256,512", "Tokens per rank, comma-separated."),
    examples=(
        f"{RUN} 4 -m benchmarks latency --json latency.json --plot latency.png",
        f"{RUN} 2 -m benchmarks latency --layer 256,2,8 --tokens 1,16      (also runs on CPUs)",
    ),
)
def latency(options: Namespace) -> None:
    """The low-latency calls of DeepEP: dispatch, combine, hooks, in graphs and eager; NCCL's all-to-all of the same."""
    if options.plot:
        need_matplotlib("--plot")
    with run_on_all_ranks(options, plot=False) as run:
        shape, counts = bench_latency.Layer.parse(options.layer), parse_counts("--tokens", options.tokens, 1)
        shape.check(run.world.size)
        done = run.steps(len(counts))
        config = bench_latency.config_for(shape, counts, run.world.size)
        for count in counts:
            run.report.add(bench_latency.measure_case(run.world, config, shape, count, run.repeats, done))
            if options.plot and run.world.rank == 0:
                bench_latency.draw(run.report.tables, run.report.caption(), options.plot)


@command(
    shapes("4096,7168,8,256", "4096,7168,8,16"),
    budgets(),
    examples=(
        f"{RUN} 2 -m benchmarks dispatcher --num-sms 0,24 --json dispatcher.json",
        f"{RUN} 2 -m benchmarks dispatcher --shape 64,256,2,8      (also runs on CPUs)",
    ),
)
def dispatcher(options: Namespace) -> None:
    """Tokens to expert rows, back, and the backward of both: TokenDispatcher, and Megatron-Core's dispatchers."""
    with run_on_all_ranks(options) as run:
        sizes = parse_budgets(options.num_sms)
        cases = [
            (shape, bench_dispatcher.candidates(run.world, shape, sizes))
            for shape in parse_shapes(options.shape, run.world)
        ]
        done = run.steps(sum(len(candidates) for _, candidates in cases))
        for shape, candidates in cases:
            run.report.add(bench_dispatcher.dispatcher_table(run.world, shape, candidates, run.repeats, done))


@command(
    LAYERS,
    TOKENS,
    budgets(),
    examples=(
        f"{RUN} 2 -m benchmarks megatron --json megatron.json --markdown megatron.md",
        f"{RUN} 8 -m benchmarks megatron --layer mixtral --num-sms 0,24",
        f"{RUN} 2 -m benchmarks megatron --layer 64,32,4,2 --tokens 32      (also runs on CPUs)",
    ),
)
def megatron(options: Namespace) -> None:
    """Megatron-Core's MoELayer, forward and backward, with our dispatcher and with its own alltoall."""
    with run_on_all_ranks(options) as run:
        layers, sizes = parse_layers(options.layer, run.world), parse_budgets(options.num_sms)
        done = run.steps(len(layers) * 2 * (1 + len(by_budget(run.world, sizes))))
        for layer in layers:
            run.report.add(bench_megatron.layer_table(run.world, layer, options.tokens, sizes, run.repeats, done))


@command(
    LAYERS,
    TOKENS,
    budgets(),
    examples=(
        f"{RUN} 2 -m benchmarks deepspeed --json deepspeed.json --markdown deepspeed.md",
        f"{RUN} 8 -m benchmarks deepspeed --layer mixtral --num-sms 0,24",
        f"{RUN} 2 -m benchmarks deepspeed --layer 64,32,4,2 --tokens 32      (also runs on CPUs)",
    ),
)
def deepspeed(options: Namespace) -> None:
    """DeepSpeed's MoE layers (native without capacity, and AutoEP's), forward and backward, with and without us."""
    with run_on_all_ranks(options) as run:
        layers, sizes = parse_layers(options.layer, run.world), parse_budgets(options.num_sms)
        bench_deepspeed.start(run.world)
        done = run.steps(len(layers) * 2 * (1 + len(by_budget(run.world, sizes))))
        for table in (bench_deepspeed.layer_table, bench_deepspeed.autoep_table):
            for layer in layers:
                run.report.add(table(run.world, layer, options.tokens, sizes, run.repeats, done))


@command(
    option("--layer", "deepseek", "deepseek, mixtral, or hidden,ffn,experts,topk."),
    TOKENS,
    option("--chunks", "2,4", "Numbers of chunks to cut the tokens in, comma-separated."),
    budgets("0,24,48"),
    option("--megatron", True, "Megatron-Core's layer too, if installed.", action=argparse.BooleanOptionalAction),
    option("--trace", None, "Folder for a Chrome trace of one step of each (chrome://tracing, Perfetto).", type=Path),
    option("--timeline", None, "Draw when each kernel of a step ran, by stream. GPUs only.", type=picture),
    examples=(
        f"{RUN} 2 -m benchmarks overlap --num-sms 0,24,48 --timeline overlap.png",
        f"{RUN} 8 -m benchmarks overlap --layer mixtral --chunks 2,4,8 --trace traces/",
        f"{RUN} 2 -m benchmarks overlap --layer 64,32,4,2 --tokens 32      (also runs on CPUs)",
    ),
)
def overlap(options: Namespace) -> None:
    """A MoE layer with a shared expert, forward and backward: how much communication hides, and what a step gains."""
    with run_on_all_ranks(options) as run:
        world, tokens = run.world, options.tokens
        (shape,) = parse_layers([options.layer], world)
        counts, sizes = parse_counts("--chunks", options.chunks, 1), parse_budgets(options.num_sms)
        if options.timeline:
            need_matplotlib("--timeline")
            if not world.on_gpu:
                raise UnsupportedError("--timeline shows kernels, and there is no GPU; --plot draws the step times")
        case = f"{shape}, {tokens} tokens per rank, {world.size} ranks"
        values = {**shape._asdict(), "tokens": tokens, "ranks": world.size}
        variants = bench_overlap.layer_variants(world, shape, tokens, sizes, counts)
        tables = [(f"Overlap: {case}", bench_overlap.LAYER_NOTE, variants)]
        if options.megatron and bench_megatron.megatron_missing(world) is None:
            variants = bench_overlap.megatron_variants(world, shape, tokens, sizes)
            tables.append((f"Overlap in Megatron-Core: {case}", bench_overlap.MEGATRON_NOTE, variants))
        done = run.steps(sum(len(variants) for _, _, variants in tables))
        timelines = []
        for title, note, variants in tables:
            table, spans = bench_overlap.overlap_table(
                world, title, note, values, variants, run.repeats, options.trace, done
            )
            run.report.add(table)
            timelines += spans
        if options.timeline and world.rank == 0:
            bench_overlap.draw(timelines, run.report.caption(), options.timeline)


@command(
    shapes("4096,7168,8,256"),
    LAYERS,
    TOKENS,
    option("--ranks-per-node", 0, "Cut the host into nodes; 0: one node for each torchrun.", type=at_least(0)),
    examples=(
        f"{RUN} 4 -m benchmarks nodes --ranks-per-node 2      (cuts one host; NCCL over sockets)",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m benchmarks nodes",
        f"{RUN} 4 -m benchmarks nodes --ranks-per-node 2 --shape 64,256,2,8 --layer 64,32,4,2 --tokens 32      "
        "(also runs on CPUs)",
    ),
)
def nodes(options: Namespace) -> None:
    """Dispatchers and MoE layers over several nodes, and the rows that cross: alltoall, collective, hierarchical."""
    if options.ranks_per_node:
        bench_nodes.cut_host(options.ranks_per_node)
    with run_on_all_ranks(options) as run:
        world, size = run.world, bench_nodes.ranks_per_node(run.world, options.ranks_per_node)
        cases = [(shape, bench_nodes.candidates(world, shape)) for shape in parse_shapes(options.shape, world)]
        layers = parse_layers(options.layer if bench_megatron.megatron_missing(world) is None else [], world)
        in_layers = len(layers) * (1 + len(bench_nodes.BACKENDS))
        in_tables = sum(len(candidates) + 2 for _, candidates in cases)
        done = run.steps(len(bench_nodes.NETWORK_MEBIBYTES) + in_tables + in_layers)
        run.report.add(bench_nodes.network_table(world, size, run.repeats, done))
        for shape, candidates in cases:
            run.report.add(bench_nodes.dispatcher_table(world, shape, size, candidates, run.repeats, done))
            run.report.add(bench_nodes.own_cost_table(world, shape, size, run.repeats, done))
        for layer in layers:
            run.report.add(bench_nodes.layer_table(world, layer, size, options.tokens, run.repeats, done))


# -------------------------------------------------------------------------------------------- command line


def parse_shapes(texts: list[str], world: World) -> list[bench_ops.Shape]:
    """Shapes that work on these ranks."""
    shapes = [bench_ops.Shape.parse(text) for text in texts]
    for shape in shapes:
        shape.check(world.size)
    return shapes


def parse_layers(texts: list[str], world: World) -> list[bench_megatron.Layer]:
    """Layers that work on these ranks."""
    layers = [bench_megatron.Layer.parse(text) for text in texts]
    for layer in layers:
        layer.check(world.size)
    return layers


def parse_budgets(text: str) -> list[int]:
    """``0,24``: numbers of SMs."""
    return parse_counts("--num-sms", text, 0)


def parse_counts(flag: str, text: str, least: int) -> list[int]:
    """Comma-separated integers of at least ``least``."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [least - 1]
    if min(counts) < least:
        meaning = "numbers of SMs, 0 for all, such as 0,24" if least == 0 else "positive integers, such as 2,4"
        raise InputError(flag, text, f"comma-separated {meaning}")
    return counts


def make_parser() -> argparse.ArgumentParser:
    """The command line of all subcommands."""
    of_every_run = argparse.ArgumentParser(add_help=False)
    for flag, keywords in OF_EVERY_RUN:
        of_every_run.add_argument(flag, **keywords)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time operations, dispatchers and MoE layers on all ranks of torchrun.",
        epilog="python -m benchmarks NAME --help shows options and examples.",
    )
    subparsers = parser.add_subparsers(metavar="NAME", required=True)
    for name, (run, options, examples) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            epilog="examples:\n  " + "\n  ".join(examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[of_every_run],
        )
        for flag, keywords in options:
            subparser.add_argument(flag, **keywords)
        subparser.set_defaults(run=run)
    prediction = subparsers.add_parser("model", help=node_model.model.__doc__, description=node_model.model.__doc__)
    prediction.add_argument("--shape", default="4096,7168,8,256", help="Tokens per rank, hidden size, top-k, experts.")
    prediction.add_argument("--size", type=at_least(1), default=8, help="Ranks of a node.")
    prediction.add_argument("--network", type=float, default=50.0, help="GB/s of a rank's network, each direction.")
    prediction.add_argument("--nodes", default="1,2,4,8,16,32", help="Numbers of nodes, comma-separated.")
    prediction.set_defaults(run=lambda given: node_model.model(given.shape, given.size, given.network, given.nodes))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the exit status: 1 after an error that the user can fix, which is told in a line."""
    options = make_parser().parse_args(arguments)
    try:
        options.run(options)
    except DeepEPMoEError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
