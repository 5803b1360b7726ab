"""``python -m benchmarks``: how long operations, dispatchers and whole MoE layers take, beside what else does the same.

``ops`` times the backend (ops.py), ``latency`` the low-latency calls (latency.py), ``dispatcher`` what a
training step pays for dispatch and combine (dispatcher.py), ``megatron`` and ``deepspeed`` whole MoE layers
(megatron_layer.py, deepspeed_layer.py), ``overlap`` how much communication hides behind GEMMs (overlap.py),
``nodes`` dispatchers and layers over several nodes (nodes.py). What is in a time is said in timing.py;
report.py shows and saves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
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
from benchmarks.report import Report, need_matplotlib
from deepep_moe.errors import DeepEPMoEError, InputError, UnsupportedError
from deepep_moe.tools.world import World, ranks_of_this_run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Time operations, dispatchers and MoE layers on all ranks of torchrun: `benchmarks ops --help` says more.",
)

Repeats = Annotated[int, typer.Option(min=1, help="Samples of each time; tables show their median.")]
Shapes = Annotated[
    list[str], typer.Option(help="Tokens per rank, hidden size, top-k, experts of the group; may be repeated.")
]
Layers = Annotated[list[str], typer.Option(help="deepseek, mixtral, or hidden,ffn,experts,topk; may be repeated.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of each rank.")]
Budgets = Annotated[str, typer.Option(help="SMs that communication kernels may use, comma-separated; 0: all.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every sample, command and versions here.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write tables for a document here.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw a picture here (.png, .svg, .pdf).")]
Commit = Annotated[str | None, typer.Option(help="Commit to show where this is no git checkout.")]


@dataclass
class Run:
    """What a subcommand works with: the ranks, the report, and a progress bar on rank 0."""

    world: World
    report: Report
    progress: Progress

    def steps(self, total: int) -> Callable[[str], None]:
        """A function to call after each of ``total`` steps, with what was done."""
        task = self.progress.add_task("", total=total)
        return lambda name: self.progress.update(task, advance=1, description=name)


@contextmanager
def run_on_all_ranks(files: dict[str, Path | None], commit: str | None) -> Iterator[Run]:
    """Ranks, report and progress bar. An error that a user can mend is told in a line, without a stack trace."""
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with ranks_of_this_run() as world:
            console = Console(stderr=True)
            with Progress(*bar, console=console, transient=True, disable=world.rank != 0) as progress:
                shown = Console()
                if not shown.is_terminal:  # a log has no width: 80 columns would cut the tables
                    shown = Console(width=200)
                yield Run(world, Report.start(world, files, commit, shown), progress)
    except DeepEPMoEError as error:
        typer.echo(f"benchmarks: {error}", err=True)
        raise typer.Exit(1) from error


OPS_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 2 -m benchmarks ops

    torchrun --nproc-per-node 8 -m benchmarks ops --shape 4096,7168,8,256 --shape 8192,4096,2,8
    --num-sms 0,24 --routing both --json ops.json --markdown ops.md --plot ops.png

    torchrun --nproc-per-node 2 -m benchmarks ops --shape 64,256,2,8      (also runs on CPUs)
"""


@app.command(epilog=OPS_EXAMPLES)
def ops(
    shape: Shapes = ["4096,7168,8,256"],  # noqa: B006 (typer copies it)
    routing: Annotated[str, typer.Option(help="balanced, imbalanced (4x load on an eighth), or both.")] = "balanced",
    num_sms: Budgets = "0",
    repeats: Repeats = 20,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """Dispatch, combine and plan of the backend; NCCL's all-to-all of the same rows; the link's ceiling."""
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": plot}, commit) as run:
        world = run.world
        shapes = parse_shapes(shape, world)
        loads = {"balanced": [False], "imbalanced": [True], "both": [False, True]}.get(routing)
        if loads is None:
            raise InputError("--routing", routing, "must be balanced, imbalanced or both")
        budgets = parse_budgets(num_sms)
        backends = bench_ops.make_backends(world, budgets)
        done = run.steps(1 + len(shapes) * len(loads) * (len(backends) + 1))
        ceiling = 0.0
        copies = bench_ops.link_ceiling(world, repeats)
        if copies:
            table = bench_ops.ceiling_table(world, copies)
            ceiling = table.rows[0].gigabytes_per_second(table.rows[0].link_bytes)
            run.report.add(table)
        done("link ceiling")
        for one in shapes:
            for imbalanced in loads:
                table = bench_ops.measure_case(world, backends, one, imbalanced, repeats, ceiling, done)
                run.report.add(table)
        for backend in backends.values():
            backend.close()


LATENCY_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 4 -m benchmarks latency --json latency.json --plot latency.png

    torchrun --nproc-per-node 2 -m benchmarks latency --layer 256,2,8 --tokens 1,16      (also runs on CPUs)
"""


@app.command(epilog=LATENCY_EXAMPLES)
def latency(
    layer: Annotated[str, typer.Option(help="Hidden size, top-k, experts of the group.")] = "7168,8,288",
    tokens: Annotated[str, typer.Option(help="Tokens per rank, comma-separated.")] = "1,8,32,64,128,256,512",
    repeats: Repeats = 20,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """The low-latency calls of DeepEP: dispatch, combine, hooks, in graphs and eager; NCCL's all-to-all of the same."""
    if plot:
        need_matplotlib("--plot")
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": None}, commit) as run:
        shape, counts = bench_latency.Layer.parse(layer), parse_counts("--tokens", tokens, 1)
        shape.check(run.world.size)
        done = run.steps(len(counts))
        for count in counts:
            run.report.add(bench_latency.measure_case(run.world, shape, count, repeats, done))
            if plot and run.world.rank == 0:
                title = f"{run.report.command}\n{run.report.heading()}"
                bench_latency.draw(run.report.tables, title, plot)


DISPATCHER_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 2 -m benchmarks dispatcher --num-sms 0,24 --json dispatcher.json

    torchrun --nproc-per-node 2 -m benchmarks dispatcher --shape 64,256,2,8      (also runs on CPUs)
"""


@app.command(epilog=DISPATCHER_EXAMPLES)
def dispatcher(
    shape: Shapes = ["4096,7168,8,256", "4096,7168,8,16"],  # noqa: B006
    num_sms: Budgets = "0",
    repeats: Repeats = 20,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """Tokens to expert rows, back, and the backward of both: TokenDispatcher, and Megatron-Core's dispatchers."""
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": plot}, commit) as run:
        shapes, budgets = parse_shapes(shape, run.world), parse_budgets(num_sms)
        cases = [(one, bench_dispatcher.candidates(run.world, one, budgets)) for one in shapes]
        done = run.steps(sum(len(candidates) for _, candidates in cases))
        for one, candidates in cases:
            run.report.add(bench_dispatcher.dispatcher_table(run.world, one, candidates, repeats, done))


MEGATRON_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 2 -m benchmarks megatron --json megatron.json --markdown megatron.md

    torchrun --nproc-per-node 8 -m benchmarks megatron --layer mixtral --num-sms 0,24

    torchrun --nproc-per-node 2 -m benchmarks megatron --layer 64,32,4,2 --tokens 32      (also runs on CPUs)
"""


@app.command(epilog=MEGATRON_EXAMPLES)
def megatron(
    layer: Layers = list(bench_megatron.LAYERS),  # noqa: B006
    tokens: Tokens = 4096,
    num_sms: Budgets = "0",
    repeats: Repeats = 20,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """Megatron-Core's MoELayer, forward and backward, with our dispatcher and with its own alltoall."""
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": plot}, commit) as run:
        layers, budgets = [bench_megatron.Layer.parse(text) for text in layer], parse_budgets(num_sms)
        for one in layers:
            one.check(run.world.size)
        budgets_here = len(bench_megatron.by_budget(run.world, budgets))
        done = run.steps(len(layers) * 2 * (1 + budgets_here))
        for one in layers:
            run.report.add(bench_megatron.layer_table(run.world, one, tokens, budgets, repeats, done))


DEEPSPEED_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 2 -m benchmarks deepspeed --json deepspeed.json --markdown deepspeed.md

    torchrun --nproc-per-node 8 -m benchmarks deepspeed --layer mixtral --num-sms 0,24

    torchrun --nproc-per-node 2 -m benchmarks deepspeed --layer 64,32,4,2 --tokens 32      (also runs on CPUs)
"""


@app.command(epilog=DEEPSPEED_EXAMPLES)
def deepspeed(
    layer: Layers = list(bench_megatron.LAYERS),  # noqa: B006
    tokens: Tokens = 4096,
    num_sms: Budgets = "0",
    repeats: Repeats = 20,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """DeepSpeed's MoE layers (native without capacity, and AutoEP's), forward and backward, with and without us."""
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": plot}, commit) as run:
        layers, budgets = [bench_megatron.Layer.parse(text) for text in layer], parse_budgets(num_sms)
        for one in layers:
            one.check(run.world.size)
        bench_deepspeed.start(run.world)
        done = run.steps(len(layers) * 2 * (1 + len(bench_megatron.by_budget(run.world, budgets))))
        for table in (bench_deepspeed.layer_table, bench_deepspeed.autoep_table):
            for one in layers:
                run.report.add(table(run.world, one, tokens, budgets, repeats, done))


OVERLAP_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 2 -m benchmarks overlap --num-sms 0,24,48 --timeline overlap.png

    torchrun --nproc-per-node 8 -m benchmarks overlap --layer mixtral --chunks 2,4,8 --trace traces/

    torchrun --nproc-per-node 2 -m benchmarks overlap --layer 64,32,4,2 --tokens 32      (also runs on CPUs)
"""


@app.command(epilog=OVERLAP_EXAMPLES)
def overlap(
    layer: Annotated[str, typer.Option(help="deepseek, mixtral, or hidden,ffn,experts,topk.")] = "deepseek",
    tokens: Tokens = 4096,
    chunks: Annotated[str, typer.Option(help="Numbers of chunks to cut the tokens in, comma-separated.")] = "2,4",
    num_sms: Budgets = "0,24,48",
    megatron: Annotated[bool, typer.Option(help="Megatron-Core's layer too, where it is installed.")] = True,
    repeats: Repeats = 20,
    trace: Annotated[
        Path | None, typer.Option(help="Folder for a Chrome trace of one step of each (chrome://tracing, Perfetto).")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Draw when each kernel of a step ran, by stream (.png, .svg, .pdf). GPUs only.")
    ] = None,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """A MoE layer with a shared expert, forward and backward: how much communication hides, and what a step gains."""
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": plot}, commit) as run:
        world, shape = run.world, bench_megatron.Layer.parse(layer)
        shape.check(world.size)
        counts, budgets = parse_counts("--chunks", chunks, 1), parse_budgets(num_sms)
        if timeline:
            need_matplotlib("--timeline")
            if not world.on_gpu:
                raise UnsupportedError("--timeline shows kernels, and there is no GPU; --plot draws the step times")
        case = f"{shape}, {tokens} tokens per rank, {world.size} ranks"
        values = {**shape._asdict(), "tokens": tokens, "ranks": world.size}
        variants = bench_overlap.layer_variants(world, shape, tokens, budgets, counts)
        tables = [(f"Overlap: {case}", bench_overlap.LAYER_NOTE, variants)]
        if megatron and bench_megatron.megatron_missing(world) is None:
            variants = bench_overlap.megatron_variants(world, shape, tokens, budgets)
            tables.append((f"Overlap in Megatron-Core: {case}", bench_overlap.MEGATRON_NOTE, variants))
        done = run.steps(sum(len(variants) for _, _, variants in tables))
        timelines = []
        for title, note, variants in tables:
            table, spans = bench_overlap.overlap_table(world, title, note, values, variants, repeats, trace, done)
            run.report.add(table)
            timelines += spans
        if timeline and world.rank == 0:
            bench_overlap.draw(timelines, f"{run.report.command}\n{run.report.heading()}", timeline)


NODES_EXAMPLES = """[bold]Examples[/bold]

    torchrun --nproc-per-node 4 -m benchmarks nodes --ranks-per-node 2      (cuts one host; NCCL over sockets)

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m benchmarks nodes

    torchrun --nproc-per-node 4 -m benchmarks nodes --ranks-per-node 2 --shape 64,256,2,8 --layer 64,32,4,2
    --tokens 32      (also runs on CPUs)
"""


@app.command(epilog=NODES_EXAMPLES)
def nodes(
    shape: Shapes = ["4096,7168,8,256"],  # noqa: B006
    layer: Layers = list(bench_megatron.LAYERS),  # noqa: B006
    tokens: Tokens = 4096,
    ranks_per_node: Annotated[int, typer.Option(min=0, help="Cut the host; 0: one node for each torchrun.")] = 0,
    repeats: Repeats = 20,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    plot: PlotFile = None,
    commit: Commit = None,
) -> None:
    """Dispatchers and MoE layers over several nodes, and the rows that cross: alltoall, collective, hierarchical."""
    if ranks_per_node:
        bench_nodes.cut_host(ranks_per_node)
    with run_on_all_ranks({"json": json, "markdown": markdown, "plot": plot}, commit) as run:
        world, size = run.world, bench_nodes.ranks_per_node(run.world, ranks_per_node)
        cases = [(one, bench_nodes.candidates(world, one)) for one in parse_shapes(shape, world)]
        layers = [bench_megatron.Layer.parse(text) for text in layer if bench_megatron.megatron_missing(world) is None]
        for one in layers:
            one.check(world.size)
        done = run.steps(
            sum(len(candidates) + 2 for _, candidates in cases) + len(layers) * (1 + len(bench_nodes.BACKENDS))
        )
        for case, candidates in cases:
            run.report.add(bench_nodes.dispatcher_table(world, case, size, candidates, repeats, done))
            run.report.add(bench_nodes.own_cost_table(world, case, size, repeats, done))
        for one in layers:
            run.report.add(bench_nodes.layer_table(world, one, size, tokens, repeats, done))


app.command(name="model")(node_model.model)


def parse_shapes(texts: list[str], world: World) -> list[bench_ops.Shape]:
    """Shapes that work on these ranks."""
    shapes = [bench_ops.Shape.parse(text) for text in texts]
    for shape in shapes:
        shape.check(world.size)
    return shapes


def parse_budgets(text: str) -> list[int]:
    """``0,24``: numbers of SMs."""
    return parse_counts("--num-sms", text, 0)


def parse_counts(option: str, text: str, least: int) -> list[int]:
    """Comma-separated integers of at least ``least``."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [least - 1]
    if min(counts) < least:
        meaning = "numbers of SMs, 0 for all, such as 0,24" if least == 0 else "positive integers, such as 2,4"
        raise InputError(option, text, f"comma-separated {meaning}")
    return counts


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
