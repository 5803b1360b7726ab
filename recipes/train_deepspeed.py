"""Train a mixture-of-experts GPT with DeepSpeed, its tokens moved by deepep_moe.

The MoE layers are DeepSpeed's own ``deepspeed.moe.layer.MoE``; what this project adds is one block in ds_config:
``"deepep_moe": {"enabled": true}``. The same script and files run on CPUs (gloo) and GPUs (NCCL).

Read it from top to bottom: settings, model, engine, measuring, checkpoints, the run.
"""

from __future__ import annotations

# ruff: noqa: E402
import dataclasses
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about calls that DeepSpeed makes

import common
import reports
import sections
import timing
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from common import World
from sections import Positive, RecipeError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from deepep_moe.dispatcher import Dispatched
from deepep_moe.integrations.deepspeed.moe import DispatchedMOELayer
from deepep_moe.overflow import replay_of

# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Shape:
    """Section ``model``."""

    layers: Positive
    hidden_size: Positive
    heads: Positive
    experts: Positive
    top_k: Positive
    expert_hidden_size: Positive
    key_value_heads: int = 0  # 0: as many as heads
    shared_expert_hidden_size: int = 0  # 0: no shared expert
    vocab_size: Positive = 256  # at least the 256 bytes; larger only to give the layers their real shape
    rotary_base: Positive = 10000
    drop_tokens: bool = False
    capacity_factor: float = 1.0  # with drop_tokens
    aux_loss_coefficient: float = 0.01
    checkpoint_activations: bool = False


@dataclass(frozen=True)
class Data:
    """Section ``data``."""

    text: str = "python-docs"  # python-docs, python-source, a file or a directory
    sequence_length: Positive = 128
    held_out_windows: Positive = 64


@dataclass(frozen=True)
class Train:
    """Section ``train``. Batch sizes, optimizer and learning rate are in ``ds_config``, where DeepSpeed wants them."""

    steps: Positive
    log_every: Positive = 10
    evaluate_every: Positive = 50
    save_every: int = 100  # and at the end; 0: never
    trackers: str = ""  # tensorboard, wandb, or both: they get what metrics.jsonl gets
    seed: int = 1234
    expert_parallel: int = 0  # ranks that share one set of experts; 0: all of them


# ------------------------------------------------------------------------------------------------- model


class GatedMLP(nn.Module):
    """The expert. deepep_moe recognises it, and computes all experts of a layer at once."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.width = shape.heads, shape.hidden_size // shape.heads
        self.key_value_heads = shape.key_value_heads or shape.heads
        self.base = shape.rotary_base
        self.qkv = nn.Linear(shape.hidden_size, (self.heads + 2 * self.key_value_heads) * self.width, bias=False)
        self.out = nn.Linear(self.heads * self.width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sequences, length, _ = x.shape
        heads = self.qkv(x).view(sequences, length, -1, self.width).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.key_value_heads, self.key_value_heads], dim=1)
        q, k = self._rotate(q), self._rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.key_value_heads)
        return self.out(mixed.transpose(1, 2).reshape(sequences, length, -1))

    def _rotate(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
        speeds = self.base ** -(torch.arange(0, self.width, 2, device=x.device, dtype=torch.float32) / self.width)
        angles = torch.outer(places, speeds)
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape, expert_parallel: int) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.before_attention, self.before_experts = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(shape)
        self.shared = GatedMLP(hidden, shape.shared_expert_hidden_size) if shape.shared_expert_hidden_size else None
        self.moe = MoE(
            hidden,
            GatedMLP(hidden, shape.expert_hidden_size),
            shape.experts,
            ep_size=expert_parallel,
            k=shape.top_k,
            drop_tokens=shape.drop_tokens,
            capacity_factor=shape.capacity_factor,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        # DeepSpeed copies one expert. Each rank draws values of its own, so that no two experts start alike.
        for expert in self.moe.deepspeed_moe.experts.deepspeed_experts:
            for layer in expert.children():
                layer.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.before_attention(x))
        normed = self.before_experts(x)
        out, aux_loss, _ = self.moe(normed)
        if self.shared is not None:
            out = out + self.shared(normed)
        return x + out, aux_loss


class Gpt(nn.Module):
    """Returns the mean loss per token in nats; in training plus the load-balancing loss."""

    def __init__(self, shape: Shape, expert_parallel: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(shape, expert_parallel) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size)
        self.logits = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        aux = torch.zeros((), device=x.device)
        for block in self.blocks:
            if self.shape.checkpoint_activations and self.training:
                x, aux_loss = checkpoint(block, x, use_reentrant=False)
            else:
                x, aux_loss = block(x)
            aux = aux + aux_loss
        loss = F.cross_entropy(self.logits(self.norm(x)).float().flatten(0, 1), labels.flatten())
        return loss + self.shape.aux_loss_coefficient * aux if self.training else loss


# ------------------------------------------------------------------------------------------------ engine


def start_engine(shape: Shape, train: Train, ds_config: dict[str, Any], world: World, expert_parallel: int) -> Any:
    """DeepSpeed's engine around a new model, with experts in parameter groups of their own."""
    torch.manual_seed(train.seed + world.rank)  # what ranks share comes from rank 0: DeepSpeed sends it
    with world.device:  # a GPU draws billions of weights in a moment, one core of a CPU does not
        model = Gpt(shape, expert_parallel)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "name": "matrices"},
        {"params": [p for p in model.parameters() if p.dim() < 2], "name": "vectors", "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(groups),
        config={"steps_per_print": 1 << 30, **ds_config},
        dist_init_required=False,
    )
    return engine


@torch.no_grad()
def held_out_loss(engine: Any, text: common.ByteText, data: Data, world: World) -> float:
    """Mean loss on the held-out windows, over all ranks."""
    engine.eval()
    batches = text.held_out_batches(world, data.held_out_windows, engine.train_micro_batch_size_per_gpu())
    losses = [engine(tokens.to(world.device), labels.to(world.device)) for tokens, labels in batches]
    engine.train()
    return world.mean(torch.stack(losses).mean().item())


# --------------------------------------------------------------------------------------------- measuring


class Meter:
    """Time in dispatch and combine with their backward (deepep_moe's only), and how evenly experts are loaded."""

    def __init__(self, engine: Any, world: World) -> None:
        self.timer, self.world = timing.PhaseTimer(world.device), world
        self.loads: dict[nn.Module, Tensor] = {}  # per MoE layer [experts]: routes of this rank since the last report
        self.measures = False
        for layer in (module for module in engine.module.modules() if isinstance(module, MoE)):
            layer.register_forward_hook(self._count)
            if isinstance(layer.deepspeed_moe, DispatchedMOELayer):
                self.measures = True
                self._time(layer.deepspeed_moe.overlap.dispatcher)

    def _count(self, layer: nn.Module, _: Any, result: tuple[Tensor, Tensor, Tensor]) -> None:
        if self.timer.active:
            counts = result[2].detach()
            self.loads[layer] = self.loads[layer] + counts if layer in self.loads else counts.clone()

    def _time(self, dispatcher: Any) -> None:
        dispatch, combine = dispatcher.dispatch, dispatcher.combine

        def timed_dispatch(x: Tensor, topk_idx: Any, topk_weights: Tensor | None = None) -> Dispatched:
            def call(*args: Any) -> tuple[Any, ...]:
                result = dispatch(*args)
                return result, result.rows, result.weights

            result, rows, weights = self.timer.timed("dispatch", call)(x, topk_idx, topk_weights)
            return dataclasses.replace(result, rows=rows, weights=weights)

        def timed_combine(rows: Tensor, dispatched: Dispatched, *, weights: Tensor | None = None) -> Tensor:
            call: Callable[..., Tensor] = lambda r, w: combine(r, dispatched, weights=w)  # noqa: E731
            return self.timer.timed("combine", call)(rows, weights)

        dispatcher.dispatch, dispatcher.combine = timed_dispatch, timed_combine

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is measured: evaluation is no part of a training step."""
        self.timer.active = False
        yield
        self.timer.active = True

    def report(self, elapsed: float) -> dict[str, float]:
        """Percent of ``elapsed`` seconds per phase (mean over ranks); busiest expert over the mean. Collective."""
        entry = {}
        seconds = self.timer.collect()
        if self.measures:
            for phase in ("dispatch", "combine"):
                entry[f"{phase}_percent"] = self.world.mean(100 * seconds.get(phase, 0.0) / elapsed)
        loads = torch.stack(list(self.loads.values())).double()
        dist.all_reduce(loads)
        entry["imbalance"] = (loads.amax(1) / loads.mean(1).clamp(min=1)).mean().item()
        self.loads.clear()
        return entry


# ------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """DeepSpeed's checkpoints under ``checkpoints/step-N``; its file ``latest`` names the newest complete one."""

    KEEP = 2

    def __init__(self, folder: Path, world: World, layout: Mapping[str, Any]) -> None:
        self.folder, self.world = folder / "checkpoints", world
        self.layout = json.loads(json.dumps({"processes": world.size, **layout}))

    def save(self, engine: Any, step: int) -> None:
        """Collective."""
        engine.save_checkpoint(str(self.folder), tag=f"step-{step:07d}", client_state={"step": step})
        if self.world.rank == 0:
            (self.folder / "layout.json").write_text(json.dumps(self.layout), encoding="utf-8")
            for old in sorted(self.folder.glob("step-*"))[: -self.KEEP]:
                shutil.rmtree(old)
        dist.barrier()

    def check(self) -> None:
        """Raise RecipeError unless there is a checkpoint that this run can continue."""
        if not (self.folder / "latest").exists() or not (self.folder / "layout.json").exists():
            raise RecipeError(f"--resume: no checkpoint in {self.folder}; start without --resume")
        written = common.read_json(self.folder / "layout.json")
        for key, value in self.layout.items():
            if written.get(key) != value:
                raise RecipeError(
                    f"--resume: the checkpoint in {self.folder} was written with {key} = {written.get(key)}, "
                    f"this run has {key} = {value}"
                )

    def load(self, engine: Any) -> int:
        """Collective: the engine continues after the step that is returned."""
        _, state = engine.load_checkpoint(str(self.folder))
        return int(state["step"])

    def clear(self) -> None:
        """Collective: remove the checkpoints of an earlier run in this folder."""
        if self.world.rank == 0 and self.folder.exists():
            (self.folder / "latest").unlink(missing_ok=True)
            for old in self.folder.glob("step-*"):
                shutil.rmtree(old)
        dist.barrier()


# ----------------------------------------------------------------------------------------------- the run


def run(settings: Mapping[str, Any], folder: Path, resume: bool, world: World) -> None:
    """Train as ``settings`` say; everything written goes to ``folder``."""
    shape = sections.fill(Shape, "model", settings["model"])
    sections.check_vocabulary("model.vocab_size", shape.vocab_size)
    data = sections.fill(Data, "data", settings["data"])
    train = sections.fill(Train, "train", settings["train"])
    trackers = reports.find_trackers(train.trackers)
    ds_config = dict(settings["ds_config"])
    expert_parallel = train.expert_parallel or world.size
    if world.size % expert_parallel:
        raise RecipeError(f"train.expert_parallel = {expert_parallel} does not divide the {world.size} processes")
    if shape.experts % expert_parallel:
        raise RecipeError(
            f"model.experts = {shape.experts}: allowed is a positive multiple of {expert_parallel}, the number of "
            "processes that share the experts (train.expert_parallel)"
        )

    text = common.ByteText(common.read_text(data.text), data.sequence_length, train.seed)
    layout = {"expert_parallel": expert_parallel, "model": settings["model"]}
    precisions = [name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")]
    layout["precision"] = precisions[0] if precisions else "fp32"
    layout["ZeRO stage"] = ds_config.get("zero_optimization", {}).get("stage", 0)
    checkpoints = Checkpoints(folder, world, layout)
    if resume:
        checkpoints.check()
    deepspeed.utils.logger.setLevel("WARNING")
    if world.device.type == "cpu":
        # Built on first use, under a lock that a killed build leaves behind for every later run to wait on.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine = start_engine(shape, train, ds_config, world, expert_parallel)
    first = checkpoints.load(engine) if resume else 0
    if not resume:
        checkpoints.clear()
    meter = Meter(engine, world)

    own = sum(p.numel() for p in engine.module.parameters())
    journal = reports.Journal(folder, world, folder.name, train.steps, first, trackers)
    journal.say(
        f"{world.size} process(es) on {world.device.type}, expert parallel {expert_parallel}, "
        f"{'deepep_moe' if meter.measures else 'stock DeepSpeed'}, ZeRO {engine.zero_optimization_stage()}, "
        f"{own / 1e6:.1f} M parameters on each\n"
        f"text {data.text}: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out"
        + (f"\nresumed after step {first}" if first else "")
    )
    try:
        if not first:
            with meter.paused():
                loss = held_out_loss(engine, text, data, world)
            journal.add({"step": 0, "held_out_loss": loss}, f"step {0:>5}  held-out loss {loss:.4f}")
        _train(engine, text, data, train, world, meter, journal, checkpoints, first)
    finally:
        journal.close()
    name = "deepep_moe" if meter.measures else "stock DeepSpeed"
    if picture := journal.draw(f"{folder.name}: {name}, {world.size} x {world.device.type}"):
        journal.say(f"curves: {picture}\nmetrics: {journal.path}")


def _train(
    engine: Any,
    text: common.ByteText,
    data: Data,
    train: Train,
    world: World,
    meter: Meter,
    journal: reports.Journal,
    checkpoints: Checkpoints,
    first: int,
) -> None:
    """Steps ``first`` to ``train.steps``, with their logging, evaluation and checkpoints."""
    sequences, accumulate = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    tokens_per_step = sequences * accumulate * data.sequence_length * world.size
    losses: list[Tensor] = []
    since, steps_since = time.perf_counter(), 0
    engine.train()
    for step in range(first, train.steps):
        for part in range(accumulate):
            tokens, labels = text.batch(step * accumulate + part, world.rank, sequences)
            loss = engine(tokens.to(world.device), labels.to(world.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        done, steps_since = step + 1, steps_since + 1
        journal.advance()
        last = done == train.steps

        if done % train.log_every == 0 or last:
            mean = world.mean(torch.stack(losses).mean().item())  # waits for the device
            elapsed = time.perf_counter() - since
            entry = {"step": done, "train_loss": mean, "tokens_per_second": tokens_per_step * steps_since / elapsed}
            entry.update(meter.report(elapsed))
            replay = replay_of(engine.module)
            if replay is not None:
                entry.update(replays=replay.replays, capacity_factor=replay.capacity_factor)
            shares = "".join(
                f"  {phase} {entry[f'{phase}_percent']:.1f}%" for phase in ("dispatch", "combine") if meter.measures
            )
            journal.add(
                entry,
                f"step {done:>5}  loss {mean:.4f}  {entry['tokens_per_second']:,.0f} tokens/s{shares}  "
                f"busiest expert {entry['imbalance']:.2f}x the mean" + ("" if replay is None else f"  {replay}"),
            )
            losses.clear()
            since, steps_since = time.perf_counter(), 0
        paused = time.perf_counter()
        if done % train.evaluate_every == 0 or last:
            with meter.paused():
                loss_held_out = held_out_loss(engine, text, data, world)
            journal.add(
                {"step": done, "held_out_loss": loss_held_out}, f"step {done:>5}  held-out loss {loss_held_out:.4f}"
            )
        if train.save_every and (done % train.save_every == 0 or last):
            checkpoints.save(engine, done)
        since += time.perf_counter() - paused


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

EXAMPLES = """[bold]Examples[/bold]

Two processes, on GPUs where there are two, else on the CPU:

    torchrun --nproc-per-node 2 recipes/train_deepspeed.py recipes/ds_config/tiny.json

Stock DeepSpeed, to compare with:

    torchrun --nproc-per-node 2 recipes/train_deepspeed.py recipes/ds_config/tiny.json
        --set 'ds_config.deepep_moe={enabled: false}' --output runs/stock

Go on after an interruption:

    torchrun --nproc-per-node 2 recipes/train_deepspeed.py recipes/ds_config/tiny.json --resume

The layers of Mixtral on two GPUs:

    torchrun --nproc-per-node 2 recipes/train_deepspeed.py recipes/ds_config/mixtral_like.json
"""


@app.command(epilog=EXAMPLES)
def main(
    config: Annotated[Path, typer.Argument(help="JSON file with the sections model, data, train, ds_config")],
    overrides: sections.Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for checkpoints and curves [runs/deepspeed_NAME OF THE FILE]")
    ] = None,
    resume: sections.Resume = False,
) -> None:
    """Train a mixture of experts with DeepSpeed's MoE layers, on deepep_moe.

    Start it with torchrun, one process per GPU. Without --resume a folder's earlier run is replaced.
    """
    with sections.plain_errors():
        settings = sections.read_settings(config, overrides or [], ("model", "data", "train", "ds_config"))
        if not settings["ds_config"]:
            raise RecipeError(f"{config} has no section ds_config")
        world = common.start_processes()
        run(settings, output or Path("runs") / f"deepspeed_{config.stem}", resume, world)


if __name__ == "__main__":
    app()
