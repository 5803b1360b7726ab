"""What the training recipes share: settings, processes, text, timing, progress, curves, checkpoints.

Nothing here knows a framework or a model; the recipes do.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import os
import pydoc_data.topics
import sys
import sysconfig
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from deepep_moe.errors import DeepEPMoEError
from deepep_moe.tools.world import World

T = TypeVar("T")


class RecipeError(Exception):
    """Something a user can mend: a setting, a path, a checkpoint of another run. Shown without a stack trace."""


# ------------------------------------------------------------------------------------------ command line

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="change one setting; repeatable")
]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the latest checkpoint in the folder")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Around a script's work: one line on stderr for an error, exit status 1, and no process group left behind.

    What a user can mend has no stack trace. Under torchrun every error is also written to the file that torchrun reads
    (as ``torch.distributed.elastic.multiprocessing.errors.record`` does), so the report that it ends with shows the
    first error of any rank, with the stack trace of one that nobody expected.
    """
    try:
        yield
    except (RecipeError, DeepEPMoEError) as error:
        _report_error(str(error), None, once=isinstance(error, RecipeError))
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception as error:
        if ERROR_FILE not in os.environ:
            raise  # Python prints the stack trace
        _report_error(f"{type(error).__name__}: {error}", error, once=False)
        raise typer.Exit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def _report_error(text: str, error: Exception | None, once: bool) -> None:
    """``once``: the ranks of a node are likely to have the same error, so one of them prints it."""
    text = f"error on rank {os.environ.get('RANK', '0')}: {text}"
    if not once or ERROR_FILE not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
    if ERROR_FILE in os.environ:
        extra = {"timestamp": str(int(time.time()))}
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            told = [frame for frame in frames if not frame.filename.endswith("torch/nn/modules/module.py")]
            lines = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}' for frame in told]
            extra["py_callstack"] = "\n".join([text, *lines[-12:]])
        content = json.dumps({"message": {"message": text, "extraInfo": extra}})
        Path(os.environ[ERROR_FILE]).write_text(content, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- settings

BYTES = 256  # different values of a byte of text

Positive = Annotated[int, 1]
"""An integer field of a section that must be at least 1. Other numbers of sections must not be negative."""


def read_settings(path: Path, overrides: Iterable[str], sections: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The YAML file at ``path`` with ``section.key=value`` overrides, whose values are YAML too.

    Returns all of ``sections``, those that the file does not have empty. In a section of nested mappings the key may
    have several parts: ``ds_config.optimizer.params.lr=1e-4``.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} must hold a mapping of sections: {', '.join(sections)}")
    for section, values in settings.items():
        if section not in sections:
            raise RecipeError(f"unknown section {section} in {path}; allowed: {', '.join(sections)}")
        if values is not None and not isinstance(values, dict):
            raise RecipeError(f"section {section} in {path} must be a mapping, not {values!r}")
    settings = {section: settings.get(section) or {} for section in sections}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, *inner, key = name.split(".") if "." in name else ("", name)
        if not (equals and section in sections and key):
            raise RecipeError(f"--set {override}: write section.key=value with a section of {', '.join(sections)}")
        place = settings[section]
        for part in inner:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {override}: {part} is {place!r}, not a mapping")
        try:
            place[key] = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from error
    return settings


def fill(kind: type[T], section: str, values: Mapping[str, Any]) -> T:
    """The dataclass ``kind`` from one section of the settings; unknown, missing and impossible values are errors."""
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind, include_extras=True)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise RecipeError(f"unknown key {section}.{key}{hint}; allowed: {', '.join(known)}")
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise RecipeError(f"{section}.{key} is missing")
    filled = {}
    for key, value in values.items():
        name, positive = f"{section}.{key}", types[key] == Positive
        filled[key] = checked(name, value, int if positive else types[key])
        if isinstance(filled[key], (int, float)) and not filled[key] >= positive:
            raise RecipeError(f"{name} = {value}: allowed is at least {int(positive)}")
    return kind(**filled)


def checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` for a field of type ``kind``, where that is bool, int, float, str, or a union of these and None.

    ``1e-4``, which YAML reads as text, is a number for a float. Values for fields of other types are passed on.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if not all(option in _TYPE_NAMES for option in options) or type(value) in options:
        return value
    if float in options and type(value) in (int, str):
        with suppress(ValueError):
            return float(value)
    raise RecipeError(f"{name} = {value!r}: allowed is {' or '.join(_TYPE_NAMES[option] for option in options)}")


_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "null",
}


# --------------------------------------------------------------------------------------------- processes


PEAK_TERAFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "GH200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense BF16 of the SXM variants, by what the device name contains."""


def utilization(world: World, flops_per_second: float) -> float | None:
    """Percent of all GPUs' peak (dense BF16) that ``flops_per_second`` are; None where the peak is not known."""
    name = torch.cuda.get_device_name(world.device) if world.on_gpu else ""
    peak = next((peak for part, peak in PEAK_TERAFLOPS.items() if part in name), None)
    return None if peak is None else 100 * flops_per_second / (peak * 1e12 * world.size)


def check_vocabulary(name: str, size: int) -> None:
    """Raise :class:`RecipeError` unless a vocabulary of ``size`` tokens holds every byte of a text."""
    if size < BYTES:
        raise RecipeError(f"{name} = {size}: allowed is at least {BYTES}, because text is read as bytes")


def start_processes(timeout_seconds: float = 600) -> World:
    """Join the process group: NCCL with a GPU for every process, gloo on a machine without GPUs.

    Without torchrun this is a world of one process.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
    if missing:
        raise RecipeError(f"RANK is set but not {', '.join(missing)}: start with torchrun, which sets all of them")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise RecipeError(
            f"{local_size} processes but {gpus} GPUs on this machine: start one process per GPU "
            "(torchrun --nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if gpus else None,
    )
    return World(rank, size, device, "nccl" if gpus else "gloo")


# -------------------------------------------------------------------------------------------------- text


def read_text(source: str) -> bytes:
    """Text to learn from.

    ``python-docs``: the language reference that every CPython carries for ``help()``, about 0.5 MB of English.
    ``python-source``: the modules of the standard library, some 10 MB of code and comments. Anything else is a
    text file, or a directory whose ``*.txt`` and ``*.md`` files are read in order of name.
    """
    if source == "python-docs":
        return "\n\n".join(pydoc_data.topics.topics.values()).encode()
    if source == "python-source":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for pattern in ("*.py", "[a-z]*/*.py") for path in library.glob(pattern))
        files = [path for path in files if path.parts[-2] not in ("site-packages", "test", "pydoc_data")]
    else:
        path = Path(source)
        if not path.exists():
            raise RecipeError(f"data.text = {source}: neither python-docs, python-source nor a file or directory")
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md")) if path.is_dir() else [path]
    return b"\n\n".join(path.read_bytes() for path in files)


class ByteText:
    """Text as bytes (256 tokens), every tenth block of it held out from training.

    Batches are a function of (seed, step, rank) alone, so a resumed run sees what an uninterrupted one sees.
    """

    BLOCK = 4096
    HELD_OUT_EVERY = 10

    def __init__(self, text: bytes, sequence_length: int, seed: int) -> None:
        blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).split(self.BLOCK)
        held_out = blocks[:: self.HELD_OUT_EVERY]
        train = [block for i, block in enumerate(blocks) if i % self.HELD_OUT_EVERY]
        if any(sum(map(len, part)) <= sequence_length for part in (held_out, train)):
            raise RecipeError(f"{len(text)} bytes of text are too few for sequences of {sequence_length}")
        self.train, self.held_out = torch.cat(train), torch.cat(held_out)
        self.sequence_length, self.seed = sequence_length, seed

    def batch(self, step: int, rank: int, sequences: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-byte labels, each int64 ``[sequences, sequence_length]``, at random places."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 65_537 + rank)
        starts = torch.randint(len(self.train) - self.sequence_length, (sequences,), generator=generator)
        return self._windows(self.train, starts)

    def held_out_batches(self, world: World, windows: int, sequences: int) -> Iterable[tuple[Tensor, Tensor]]:
        """This rank's share of ``windows`` fixed places in the held-out text; every rank gets as many batches."""
        per_rank = max(1, windows // (world.size * sequences)) * sequences
        last = len(self.held_out) - self.sequence_length - 1
        starts = torch.linspace(0, last, per_rank * world.size).long()[world.rank :: world.size]
        return [self._windows(self.held_out, part) for part in starts.split(sequences)]

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = tokens[starts[:, None] + torch.arange(self.sequence_length + 1)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------- optimizer


class Adam:
    """AdamW on fp32 copies of the parameters (fp32 parameters are their own copy).

    NVIDIA Apex's fused Adam where ``apex.optimizers`` can be imported, else torch's fused one. The learning rate
    rises over ``warmup`` steps and falls to a tenth along a cosine. Weights of one dimension do not decay.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float, warmup: int, steps: int
    ) -> None:
        self.parameters = parameters
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in parameters]
        self.learning_rate, self.warmup, self.steps = learning_rate, warmup, steps
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.inner, self.name = self._make(groups, parameters[0].device)

    @staticmethod
    def _make(groups: list[dict[str, Any]], device: torch.device) -> tuple[torch.optim.Optimizer, str]:
        betas = (0.9, 0.95)
        if device.type == "cuda":
            try:
                from apex.optimizers import FusedAdam

                return FusedAdam(groups, betas=betas, adam_w_mode=True), "Apex FusedAdam"
            except (ImportError, RuntimeError):
                pass  # not installed, PyPI's unrelated package of that name, or built without its CUDA extension
        return torch.optim.AdamW(groups, betas=betas, fused=True), "torch AdamW (fused)"

    @torch.no_grad()
    def step(self, step: int, gradient_scale: float | Tensor) -> float:
        """Update the parameters from their gradients times ``gradient_scale``; clears them, returns the rate used."""
        rate = self.learning_rate * self._schedule(step)
        for group in self.inner.param_groups:
            group["lr"] = rate
        for parameter, master in zip(self.parameters, self.masters):
            gradient, parameter.grad = parameter.grad, None  # freed one by one, as their fp32 copies appear
            master.grad = None if gradient is None else gradient.float()
        scale = torch.as_tensor(gradient_scale, dtype=torch.float32, device=self.masters[0].device)
        if isinstance(self.inner, torch.optim.AdamW):
            # By which the fused kernel divides gradients, as torch.amp.GradScaler has it do.
            self.inner.grad_scale = scale.reciprocal()  # type: ignore[attr-defined]
        else:
            torch._foreach_mul_([master.grad for master in self.masters if master.grad is not None], scale)
        self.inner.step()
        for parameter, master in zip(self.parameters, self.masters):
            if parameter is not master:
                parameter.copy_(master)
            master.grad = None
        return rate

    def _schedule(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)


# ------------------------------------------------------------------------------------------------ timing


class _OnBackward(torch.autograd.Function):
    """Identity whose backward calls ``hook`` once the gradients of all its tensors are there."""

    @staticmethod
    def forward(ctx: Any, hook: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.hook = hook
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.hook()
        return (None, *gradients)


class PhaseTimer:
    """Seconds that the device spends in named phases of a step, forward and backward.

    On a GPU these are CUDA events on the current stream: work that another stream hides does not count, and
    nothing waits before :meth:`collect`.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.active = True
        self._pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[object, Any] = {}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its time, and that of its backward, added to ``phase``."""

        def call(*args: Any) -> Any:
            if not self.active:
                return function(*args)
            key = object()
            begin_backward, end_backward = self._backward_hooks(phase, key)
            args = self._mark(args, end_backward)
            start = self._now()
            result = function(*args)
            self._pairs[phase].append((start, self._now()))
            if isinstance(result, tuple):
                return self._mark(result, begin_backward)
            return self._mark((result,), begin_backward)[0]

        return call

    def _backward_hooks(self, phase: str, key: object) -> tuple[Callable[[], None], Callable[[], None]]:
        def begin() -> None:
            self._open[key] = self._now()

        def end() -> None:
            if key in self._open:
                self._pairs[phase].append((self._open.pop(key), self._now()))

        return begin, end

    @staticmethod
    def _mark(values: tuple[Any, ...], hook: Callable[[], None]) -> tuple[Any, ...]:
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        if not places:
            return values
        marked = dict(zip(places, _OnBackward.apply(hook, *(values[i] for i in places))))
        return tuple(marked.get(i, value) for i, value in enumerate(values))

    def wait(self) -> None:
        """Until the device has done what was enqueued."""
        if self.cuda:
            torch.cuda.synchronize()

    def collect(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        self.wait()
        seconds = {
            phase: sum(stop - start if not self.cuda else start.elapsed_time(stop) / 1000 for start, stop in pairs)
            for phase, pairs in self._pairs.items()
        }
        self._pairs.clear()
        return seconds


@contextmanager
def profiled(journal: Journal) -> Iterator[None]:
    """Inside, rank 0 runs under torch.profiler: ``profile.txt`` (where the time went) and ``trace.json`` (timeline)."""
    if not journal.active:
        yield
        return
    from torch.profiler import DeviceType, ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    profiler.export_chrome_trace(str(journal.folder / "trace.json"))
    orders = ["self_cuda_time_total", "self_cpu_time_total"] if cuda else ["self_cpu_time_total"]
    tables = [profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90) for order in orders]
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    (journal.folder / "profile.txt").write_text(
        f"step {1e3 * wall:.1f} ms on the host\n{_describe_gaps(kernels)}\n" + "\n".join(tables), encoding="utf-8"
    )
    journal.say(f"profile: {journal.folder / 'profile.txt'}, {journal.folder / 'trace.json'}")


def _describe_gaps(kernels: list[tuple[float, float, str]]) -> str:
    """When the GPU was busy, and the longest times when it was not, from (start, end, name) in us."""
    if not kernels:
        return "no work on a GPU"
    busy, idle, (begin, end, before) = 0.0, [], kernels[0]
    first = begin
    for start, stop, name in kernels[1:]:
        if start > end:
            busy += end - begin
            idle.append((start - end, before, name))
            begin = start
        if stop > end:
            end, before = stop, name
    busy += end - begin
    lines = [
        f"GPU: {len(kernels)} kernels and copies in {(end - first) / 1e3:.1f} ms, busy {busy / 1e3:.1f} ms, "
        f"idle {sum(gap for gap, *_ in idle) / 1e3:.1f} ms in {len(idle)} gaps; the longest:"
    ]
    lines += [f"  {gap:8.0f} us after {one[:70]} before {two[:70]}" for gap, one, two in sorted(idle)[:-16:-1]]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- progress and curves


Tracker = Callable[[Path, str], Callable[[dict[str, float]], None]]
"""Given the run's folder and title, starts an experiment tracker; returns what gives it an entry."""


def find_trackers(names: str) -> list[Tracker]:
    """Of ``train.trackers``: ``tensorboard``, ``wandb``, both with a comma between them, or nothing."""
    known: dict[str, Tracker] = {"tensorboard": _tensorboard, "wandb": _wandb}
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise RecipeError(f"train.trackers = {names!r}: allowed are {', '.join(known)}, with commas between them")
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise RecipeError(f"train.trackers = {names!r}: `pip install {name}` first ({error})") from None
        found.append(known[name])
    return found


def _tensorboard(folder: Path, title: str) -> Callable[[dict[str, float]], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def add(entry: dict[str, float]) -> None:
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, int(entry["step"]))
        writer.flush()

    return add


def _wandb(folder: Path, title: str) -> Callable[[dict[str, float]], None]:
    import wandb

    run = wandb.init(project="deepep_moe", name=title, dir=str(folder))
    return lambda entry: run.log({name: value for name, value in entry.items() if name != "step"}, int(entry["step"]))


class Journal:
    """Progress bar, log lines, ``metrics.jsonl`` and the curves of one run. Only rank 0 writes.

    Entries are dictionaries with a ``step``; a resumed run drops the entries after its checkpoint. ``trackers`` from
    :func:`find_trackers` get every entry too.
    """

    def __init__(
        self, folder: Path, world: World, title: str, steps: int, resumed_at: int, trackers: Iterable[Tracker] = ()
    ) -> None:
        self.folder, self.active, self.steps = folder, world.rank == 0, steps
        self.entries: list[dict[str, float]] = []
        self.path = folder / "metrics.jsonl"
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if resumed_at and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.entries = [entry for entry in map(json.loads, lines) if entry["step"] <= resumed_at]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        # a bar is for a terminal; a log file gets the lines of `add` and `say`
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task(title, total=steps, completed=resumed_at)
        self.progress.start()
        self.trackers = [tracker(folder, title) for tracker in trackers]

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text)

    def add(self, entry: dict[str, float], text: str) -> None:
        """Keep ``entry``, and show ``text`` (if any)."""
        if self.active:
            self.entries.append(entry)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            self.console.print(text)
            for track in self.trackers:
                track(entry)

    def advance(self) -> None:
        if self.active:
            self.progress.advance(self.task)

    def close(self) -> None:
        if self.active:
            self.progress.stop()

    def draw(self, title: str) -> Path | None:
        """Loss, throughput and balance against steps, as ``curves.png``. None where matplotlib is missing."""
        if not self.active:
            return None
        try:
            import matplotlib
        except ImportError:
            self.say("no curves.png: matplotlib is not installed")
            return None
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (loss, speed, share) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
        figure.suptitle(title)
        panels = [
            (loss, "loss (nats per token)", {"train_loss": "training", "held_out_loss": "held out"}),
            (speed, "tokens/s", {"tokens_per_second": "all ranks"}),
            (share, "share of step time (%)", {"dispatch_percent": "dispatch", "combine_percent": "combine"}),
        ]
        for axes, label, curves in panels:
            for key, name in curves.items():
                points = [(entry["step"], entry[key]) for entry in self.entries if key in entry]
                if points:
                    axes.plot(*zip(*points), marker="." if len(points) < 40 else "", label=name)
                    axes.legend()
            axes.set(xlabel="step", ylabel=label)
            axes.grid(alpha=0.3)
        for axes in (speed, share):
            axes.set_ylim(bottom=0)
        path = self.folder / "curves.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        return path


# -------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """``checkpoints/step-N/rank-R.pt``: each rank its own part. ``latest.json`` names the newest complete step.

    Files appear under their final name only when complete, and ``latest.json`` only changes when every rank has
    written: a run that is killed at any moment leaves a checkpoint that can be resumed.
    """

    KEEP = 2

    def __init__(self, folder: Path, world: World, layout: Mapping[str, Any]) -> None:
        self.folder, self.world = folder / "checkpoints", world
        self.layout = json.loads(json.dumps({"processes": world.size, **layout}))
        self.pointer = self.folder / "latest.json"

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Collective: every rank writes ``state``, then the checkpoint becomes the latest."""
        target = self.folder / f"step-{step:07d}" / f"rank-{self.world.rank}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        self._replace(target, lambda path: torch.save(dict(state), path))
        dist.barrier()
        if self.world.rank == 0:
            text = json.dumps({"step": step, "layout": self.layout})
            self._replace(self.pointer, lambda path: path.write_text(text, encoding="utf-8"))
            self._remove(sorted(self.folder.glob("step-*"))[: -self.KEEP])

    def load(self) -> tuple[int, dict[str, Any]]:
        """Step and state of the latest checkpoint, on the CPU. Raises RecipeError where it cannot be used here."""
        if not self.pointer.exists():
            raise RecipeError(f"--resume: no checkpoint in {self.folder}; start without --resume")
        latest = json.loads(self.pointer.read_text(encoding="utf-8"))
        for key, value in self.layout.items():
            if latest["layout"].get(key) != value:
                raise RecipeError(
                    f"--resume: the checkpoint in {self.folder} was written with {key} = {latest['layout'].get(key)}, "
                    f"this run has {key} = {value}"
                )
        path = self.folder / f"step-{latest['step']:07d}" / f"rank-{self.world.rank}.pt"
        return latest["step"], torch.load(path, map_location="cpu", weights_only=True)

    def clear(self) -> None:
        """Collective: remove the checkpoints of an earlier run in this folder."""
        if self.world.rank == 0 and self.folder.exists():
            self.pointer.unlink(missing_ok=True)
            self._remove(sorted(self.folder.glob("step-*")))
        dist.barrier()

    @staticmethod
    def _replace(target: Path, write: Callable[[Path], object]) -> None:
        unfinished = target.with_suffix(".unfinished")
        write(unfinished)
        unfinished.replace(target)

    @staticmethod
    def _remove(folders: Iterable[Path]) -> None:
        for folder in folders:
            for file in folder.glob("rank-*"):
                file.unlink()
            folder.rmdir()
