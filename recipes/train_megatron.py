"""Train a mixture-of-experts GPT with Megatron-Core, its tokens moved by deepep_moe.

The model is Megatron-Core's own GPTModel and MoELayer; what this project adds is one value in the YAML file:
``moe_token_dispatcher_type: deepep``. The same script and files run on CPUs (gloo, fp32) and GPUs (NCCL, bf16).

Read it from top to bottom: settings, one step, measuring, the run. The model is in gpt.py, AdamW in optimizer.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import common
import reports
import sections
import timing
import torch
import torch.distributed as dist
import typer
from common import World
from gpt import Gpt, build_model, flops_per_token, loss_of, replicas, transformer_config
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_all_rng_states
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from optimizer import Adam
from sections import Positive, RecipeError
from torch import Tensor

import deepep_moe.integrations.megatron  # makes the type "deepep" known to Megatron-Core
from deepep_moe.config import DispatcherConfig
from deepep_moe.integrations.megatron import cpu
from deepep_moe.integrations.megatron.replay import replay_on_overflow
from deepep_moe.overflow import replay_of

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Data:
    """Section ``data``."""

    text: str = "python-docs"  # python-docs, python-source, a file or a directory
    sequence_length: Positive = 128
    held_out_windows: Positive = 64


@dataclass(frozen=True)
class Train:
    """Section ``train``. A step trains ``sequences * accumulate`` sequences on every rank."""

    steps: Positive
    sequences: Positive = 8
    accumulate: Positive = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip_gradient: float = 1.0  # 0: not clipped
    log_every: Positive = 10
    evaluate_every: Positive = 50
    save_every: int = 100  # and at the end; 0: never
    trackers: str = ""  # tensorboard, wandb, or both: they get what metrics.jsonl gets
    seed: int = 1234
    expert_parallel: int = 0  # ranks that share one set of experts; 0: all of them
    cuda_graph: bool = False  # on GPUs, a step as CUDA graphs
    profile_step: int = 0  # this step under torch.profiler: profile.txt and trace.json; 0: none
    precision: str = "auto"  # of weights and activations: bf16 or fp32; auto: bf16 on GPUs, fp32 on CPUs


# ---------------------------------------------------------------------------------------------- one step


def forward_backward(model: GPTModel, tokens: Tensor, labels: Tensor, world_size: int) -> Tensor:
    """Gradients of one step, and this rank's mean loss, from int64 ``[parts, sequences, length]`` tokens and labels.

    The loss of a step is the mean over all tokens of all ranks, so each backward is scaled by the ranks and parts.
    """
    parts = tokens.shape[0]
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for part in range(parts):
        loss = loss_of(model, tokens[part], labels[part])
        (loss / (parts * world_size)).backward()
        total += loss.detach() / parts
    return total


def check_capturable(config: TransformerConfig, gpt: Gpt, replay: object) -> None:
    """That ``train.cuda_graph`` can be used."""
    if config.moe_token_dispatcher_type != "deepep" or not gpt.grouped_experts or replay is None:
        raise RecipeError(
            "train.cuda_graph = true needs model.moe_token_dispatcher_type=deepep, gpt.grouped_experts=true, "
            "dispatcher.capacity_factor above 0 and dispatcher.replay_on_overflow=true: no host wait fits into a graph"
        )


class GraphedStep:
    """A training step as two CUDA graphs, each of which takes the host a single launch: gradients, then update.

    Nothing in a graph may wait for the host, so the outputs of dispatch have a fixed size (``capacity_factor``).
    Between the two the host looks for an overflow: then all ranks capture again with more room, and repeat the batch.
    """

    def __init__(
        self, model: GPTModel, optimizer: Adam, meter: DispatcherMeter, shape: tuple[int, int, int], world: World
    ) -> None:
        replay = replay_of(model)
        assert replay is not None
        self.model, self.optimizer, self.meter, self.world, self.replay = model, optimizer, meter, world, replay
        self.tokens, self.labels = (torch.zeros(shape, dtype=torch.int64, device=world.device) for _ in range(2))
        self.stream = torch.cuda.Stream(world.device)
        self.loss = torch.zeros((), dtype=torch.float32, device=world.device)
        self.gradients: torch.cuda.CUDAGraph | None = None  # writes them to the same place each time
        self.update: torch.cuda.CUDAGraph | None = None
        self.replays = -1  # of ``replay`` when the graph was captured; each one has given the dispatchers more room
        self.captures = 0
        self.updated = False

    def __call__(self, tokens: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss, as from :func:`forward_backward`, after updating the parameters."""
        self.tokens.copy_(tokens, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        loss = self.replay.run(self.model, self._compute_gradients).clone()
        if not self.updated:  # compiles kernels and connects the ranks of each group
            self.optimizer.step(step)
            self.updated = True
            return loss
        self.optimizer.prepare(step)
        if self.update is None:
            with self._capturing() as self.update:
                self.optimizer.update()
        self.update.replay()
        return loss

    def close(self) -> None:
        """Free the graphs, which must be gone before the process group."""
        self.gradients = self.update = None

    def _compute_gradients(self) -> Tensor:
        if self.gradients is None or self.replays != self.replay.replays:
            self.close()
            with self.meter.recording(), torch.cuda.stream(self.stream):
                for _ in range(2):  # compiles what torch.compile compiles, and finds the room that this batch needs
                    self.model.zero_grad(set_to_none=True)
                    forward_backward(self.model, self.tokens, self.labels, self.world.size)
                self.model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with self.meter.recording(), self._capturing() as self.gradients:
                self.loss = forward_backward(self.model, self.tokens, self.labels, self.world.size)
            self.replays = self.replay.replays
            self.captures += 1
        assert self.gradients is not None
        self.gradients.replay()
        torch.cuda.synchronize()  # an overflow is known from here on
        return self.loss

    @contextmanager
    def _capturing(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        for generator in get_all_rng_states().values():
            graph.register_generator_state(generator)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            yield graph


def train_step(
    model: GPTModel,
    optimizer: Adam,
    text: common.ByteText,
    train: Train,
    world: World,
    step: int,
    graphed: GraphedStep | None = None,
) -> Tensor:
    """One update. Returns this rank's loss, not yet averaged (a GPU does not wait for it)."""
    parts = range(step * train.accumulate, (step + 1) * train.accumulate)
    batches = zip(*(text.batch(part, world.rank, train.sequences) for part in parts))
    tokens, labels = (world.to_device(torch.stack(batch)) for batch in batches)
    if graphed is not None:
        return graphed(tokens, labels, step)
    loss = forward_backward(model, tokens, labels, world.size)
    optimizer.step(step)
    model.zero_grad(set_to_none=True)
    return loss


@torch.no_grad()
def held_out_loss(model: GPTModel, text: common.ByteText, data: Data, train: Train, world: World) -> float:
    """Mean loss on the held-out windows, over all ranks."""
    model.eval()
    batches = text.held_out_batches(world, data.held_out_windows, train.sequences)
    losses = [loss_of(model, world.to_device(tokens), world.to_device(labels)) for tokens, labels in batches]
    model.train()
    return world.mean(torch.stack(losses).mean().item())


# --------------------------------------------------------------------------------------------- measuring


class DispatcherMeter:
    """Time in dispatch and combine, and how evenly the experts are loaded, for any of Megatron-Core's dispatchers.

    ``dispatch`` is the way from routed tokens to the experts' rows, ``combine`` the way back, both with their
    backward; permutation and padding count, since some dispatchers do in it what others do in the transfer.
    """

    PHASES: ClassVar = {
        "dispatch": ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"),
        "combine": ("combine_preprocess", "token_combine", "combine_postprocess"),
    }

    def __init__(self, model: GPTModel, world: World) -> None:
        self.timer = timing.PhaseTimer(world.device)
        self.timer.active = False
        self.world, self.elapsed = world, 1.0
        self.loads: list[Tensor] = []  # one [local experts] per MoE layer: tokens since the last report
        for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
            dispatcher = layer.token_dispatcher
            dispatcher.dispatch_postprocess = self._counting(dispatcher.dispatch_postprocess, len(self.loads))
            self.loads.append(torch.zeros(layer.num_local_experts, dtype=torch.int64))
            for phase, methods in self.PHASES.items():
                for method in methods:
                    setattr(dispatcher, method, self.timer.timed(phase, getattr(dispatcher, method)))

    def _counting(self, postprocess: Callable[..., Any], layer: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = postprocess(*args)
            if self.timer.active:
                counts = result[1].detach().long()  # on the CPU or on the GPU: the host must not wait for it here
                if self.loads[layer].device != counts.device:
                    self.loads[layer] = torch.zeros_like(counts)
                self.loads[layer] += counts
            return result

        return call

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around a pass that is captured in a CUDA graph, or that prepares one: its replays are measured too."""
        self.timer.forget()
        self.timer.active = True
        yield
        self.timer.active = False

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the steps that are measured. Not all are: events and hooks cost the host several ms a step."""
        self.timer.wait()
        self.timer.active, began = True, time.perf_counter()
        yield
        self.timer.wait()
        self.timer.active = False
        self.elapsed = time.perf_counter() - began

    def report(self) -> dict[str, float]:
        """Of the measured steps: percent of the time per phase (mean over ranks); load of the busiest expert and of the
        busiest rank, as multiples of the mean (mean over layers).

        Collective.
        """
        seconds = self.timer.collect()
        shares = {phase: 100 * seconds.get(phase, 0.0) / self.elapsed for phase in self.PHASES}
        entry = {f"{phase}_percent": self.world.mean(share) for phase, share in shares.items()}
        if self.loads:
            local = torch.stack(self.loads).to(self.world.device)
            parts = [torch.empty_like(local) for _ in range(parallel_state.get_expert_model_parallel_world_size())]
            dist.all_gather(parts, local, group=parallel_state.get_expert_model_parallel_group())
            experts = torch.cat(parts, dim=1).double()
            ranks = torch.stack(parts, dim=1).sum(2).double()
            for name, loads in (("imbalance", experts), ("rank_imbalance", ranks)):
                entry[name] = self.world.mean((loads.amax(1) / loads.mean(1).clamp(min=1)).mean().item())
            for load in self.loads:
                load.zero_()
        return entry


# ----------------------------------------------------------------------------------------------- the run


def run(settings: Mapping[str, Any], folder: Path, resume: bool, world: World) -> None:
    """Train as ``settings`` say; everything written goes to ``folder``."""
    gpt = sections.fill(Gpt, "gpt", settings["gpt"])
    sections.check_vocabulary("gpt.vocab_size", gpt.vocab_size)
    data = sections.fill(Data, "data", settings["data"])
    train = sections.fill(Train, "train", settings["train"])
    trackers = reports.find_trackers(train.trackers)
    # Fields of DispatcherConfig; a YAML file ($DEEPEP_MOE_CONFIG) and DEEPEP_MOE_<FIELD> variables override them.
    dispatcher = DispatcherConfig.load(settings["dispatcher"], source="section dispatcher")
    deepep_moe.integrations.megatron.register(settings=settings["dispatcher"])

    expert_parallel = train.expert_parallel or world.size
    if world.size % expert_parallel:
        raise RecipeError(f"train.expert_parallel = {expert_parallel} does not divide the {world.size} processes")
    cpu.enable()
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel, create_gloo_process_groups=False
    )
    torch.manual_seed(train.seed)  # of routers; what ranks share comes from one of them
    in_graph = train.cuda_graph and world.device.type == "cuda"
    tensor_parallel.model_parallel_cuda_manual_seed(train.seed, use_cudagraphable_rng=in_graph)
    config = transformer_config(settings["model"], world, expert_parallel, train.precision)
    if dispatcher.capacity_factor and config.moe_token_dispatcher_type == "deepep" and not gpt.grouped_experts:
        raise RecipeError(f"dispatcher.capacity_factor = {dispatcher.capacity_factor} needs gpt.grouped_experts=true")
    model = build_model(config, gpt, data.sequence_length, world)
    if dispatcher.capacity_factor and dispatcher.replay_on_overflow:
        replay_on_overflow(model)
    MoEAuxLossAutoScaler.set_loss_scale(
        torch.tensor(1 / (train.accumulate * world.size), dtype=torch.float32, device=world.device)
    )
    optimizer = Adam(
        model.parameters(),
        replicas,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        clip=train.clip_gradient,
        warmup=train.warmup_steps,
        steps=train.steps,
    )
    text = common.ByteText(common.read_text(data.text), data.sequence_length, train.seed)
    meter = DispatcherMeter(model, world)
    graphed = None
    if in_graph:
        check_capturable(config, gpt, replay_of(model))
        shape = (train.accumulate, train.sequences, data.sequence_length)
        graphed = GraphedStep(model, optimizer, meter, shape, world)

    layout = {
        "expert_parallel": expert_parallel,
        "precision": "bf16" if config.bf16 else "fp32",
        "gpt": {**asdict(gpt), "fused_attention": None},  # without parameters
        "model": settings["model"],
    }
    checkpoints = common.Checkpoints(folder, world, layout)
    first = 0
    if resume:
        first, state = checkpoints.load()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        checkpoints.clear()

    own = sum(p.numel() for p in model.parameters())
    journal = reports.Journal(folder, world, folder.name, train.steps, first, trackers)
    journal.say(
        f"{world.size} process(es) on {world.device.type}, expert parallel {expert_parallel}, "
        f"dispatcher {config.moe_token_dispatcher_type}, {own / 1e6:.1f} M parameters on each\n"
        f"text {data.text}: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out"
        + (f"\nresumed after step {first}" if first else "")
        + ("\ntrain.cuda_graph has no effect without a GPU" if train.cuda_graph and not in_graph else "")
    )
    try:
        if not first:
            loss = held_out_loss(model, text, data, train, world)
            journal.add({"step": 0, "held_out_loss": loss}, f"step {0:>5}  held-out loss {loss:.4f}")
        model.train()
        flops = flops_per_token(model, config, data.sequence_length)
        _train(model, optimizer, text, data, train, world, meter, graphed, journal, checkpoints, first, flops)
    finally:
        journal.close()
        if graphed is not None:
            graphed.close()
    title = f"{folder.name}: {config.moe_token_dispatcher_type}, {world.size} x {world.device.type}"
    if picture := journal.draw(title):
        journal.say(f"curves: {picture}\nmetrics: {journal.path}")


def _train(
    model: GPTModel,
    optimizer: Adam,
    text: common.ByteText,
    data: Data,
    train: Train,
    world: World,
    meter: DispatcherMeter,
    graphed: GraphedStep | None,
    journal: reports.Journal,
    checkpoints: common.Checkpoints,
    first: int,
    flops: float,
) -> None:
    """Steps ``first`` to ``train.steps``, with their logging, evaluation and checkpoints."""
    tokens_per_step = train.sequences * train.accumulate * data.sequence_length * world.size
    losses: list[Tensor] = []
    since = time.perf_counter()
    for step in range(first, train.steps):
        done, last = step + 1, step + 1 == train.steps
        logs = done % train.log_every == 0 or last
        profiled = timing.profiled(journal) if done == train.profile_step else nullcontext()
        with profiled, meter.measuring() if logs else nullcontext():
            losses.append(train_step(model, optimizer, text, train, world, step, graphed))
        journal.advance()

        if logs:
            loss = world.mean(torch.stack(losses).mean().item())  # waits for the device
            elapsed = time.perf_counter() - since
            entry = {"step": done, "train_loss": loss, "tokens_per_second": tokens_per_step * len(losses) / elapsed}
            entry.update(meter.report())
            used = common.utilization(world, flops * entry["tokens_per_second"])
            entry.update({} if used is None else {"mfu_percent": used})
            replay = replay_of(model)
            if replay is not None:
                entry.update(replays=replay.replays, capacity_factor=replay.capacity_factor)
            journal.add(
                entry,
                f"step {done:>5}  loss {loss:.4f}  {entry['tokens_per_second']:,.0f} tokens/s  "
                + ("" if used is None else f"MFU {used:.1f}%  ")
                + f"dispatch {entry['dispatch_percent']:.1f}%  combine {entry['combine_percent']:.1f}%  "
                f"busiest expert {entry.get('imbalance', 1.0):.2f}x the mean, "
                f"rank {entry.get('rank_imbalance', 1.0):.2f}x" + ("" if replay is None else f"  {replay}"),
            )
            losses.clear()
            since = time.perf_counter()
        paused = time.perf_counter()
        if done % train.evaluate_every == 0 or last:
            loss = held_out_loss(model, text, data, train, world)
            journal.add({"step": done, "held_out_loss": loss}, f"step {done:>5}  held-out loss {loss:.4f}")
        if train.save_every and (done % train.save_every == 0 or last):
            checkpoints.save(done, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        since += time.perf_counter() - paused


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

EXAMPLES = """[bold]Examples[/bold]

Two processes, on GPUs where there are two, else on the CPU:

    torchrun --nproc-per-node 2 recipes/train_megatron.py recipes/tiny.yaml

Megatron-Core's own dispatcher, to compare with:

    torchrun --nproc-per-node 2 recipes/train_megatron.py recipes/tiny.yaml
        --set model.moe_token_dispatcher_type=alltoall --output runs/alltoall

Go on after an interruption:

    torchrun --nproc-per-node 2 recipes/train_megatron.py recipes/tiny.yaml --resume

Your own text, longer:

    torchrun --nproc-per-node 2 recipes/train_megatron.py recipes/tiny.yaml
        --set data.text=books/ --set train.steps=5000
"""


@app.command(epilog=EXAMPLES)
def main(
    config: Annotated[Path, typer.Argument(help="YAML file with the sections model, gpt, data, train, dispatcher")],
    overrides: sections.Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for checkpoints and curves [runs/NAME OF THE FILE]")
    ] = None,
    resume: sections.Resume = False,
) -> None:
    """Train a Megatron-Core MoE whose tokens deepep_moe moves to their experts and back.

    Start it with torchrun, one process per GPU. Without --resume a folder's earlier run is replaced.
    """
    with sections.plain_errors():
        settings = sections.read_settings(config, overrides or [], ("model", "gpt", "data", "train", "dispatcher"))
        world = common.start_processes()
        run(settings, output or Path("runs") / config.stem, resume, world)


if __name__ == "__main__":
    app()
