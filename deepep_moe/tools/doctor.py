"""``deepep-moe doctor``: what is on this machine, what deepep_moe would do with it, and whether that works.

Alone it looks at a group of one process; under torchrun at the group of all ranks, which is what a training job
gets. It ends with a real dispatch and combine whose result is checked.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from deepep_moe import DispatcherConfig, TokenDispatcher, __version__, extension
from deepep_moe.backends import BACKENDS, why_not
from deepep_moe.backends.rail import TorchRail
from deepep_moe.errors import DeepEPMoEError
from deepep_moe.tools.world import ranks_of_this_run
from deepep_moe.topology import find_nodes

GOOD, NOTE, BAD = "[green]ok[/green]", "[yellow]note[/yellow]", "[red]wrong[/red]"


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # GOOD, NOTE (works without it) or BAD (must be mended)
    subject: str
    text: str


def look_at_torch() -> list[Finding]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = [
        Finding(GOOD, "deepep_moe", f"{__version__}, Python {platform.python_version()}"),
        Finding(GOOD, "torch", f"{torch.__version__}, {cuda}"),
    ]
    gpus = torch.cuda.device_count()
    if not gpus:
        why = "torch is built without CUDA" if not torch.version.cuda else "torch sees none"
        return [*found, Finding(NOTE, "GPUs", f"none: {why}; everything runs on CPUs over gloo")]
    for index in range(gpus):
        gpu = torch.cuda.get_device_properties(index)
        peers = [str(peer) for peer in range(gpus) if peer != index and torch.cuda.can_device_access_peer(index, peer)]
        reach = f"peer access to {', '.join(peers)}" if peers else "no peer access to another GPU"
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, {reach}"
        found.append(Finding(GOOD, f"GPU {index}", text))
    return found


def look_at_extension() -> list[Finding]:
    """What the extension was built for, and every GPU here that it cannot run on."""
    if extension.why_missing is not None:
        there = importlib.util.find_spec("deepep_moe._C") is not None  # but it cannot be loaded
        state = BAD if there or torch.cuda.is_available() else NOTE
        return [Finding(state, "extension", f"{extension.why_missing}; without it backend nvlink is off")]
    found = [Finding(GOOD, "extension", f"built for {', '.join(extension.ARCHITECTURES)}, {extension._C.__file__}")]
    for index in range(torch.cuda.device_count()):
        if reason := extension.why_not_on(torch.device("cuda", index)):
            found.append(Finding(BAD, f"GPU {index}", reason))
    return found


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_at_framework(package: str, plugin: str) -> Finding:
    """Whether ``package`` is installed and our plugin for it loads, which checks the version."""
    version = version_of(package)
    if version is None:
        return Finding(NOTE, package, "not installed")
    module = f"deepep_moe.integrations.{plugin}"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return Finding(NOTE, package, f"{version}; this version of deepep_moe has no plugin for it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except DeepEPMoEError as error:
        return Finding(BAD, package, f"{version}: {error}")
    except ImportError as error:
        return Finding(BAD, package, f"{version}, but it cannot be imported: {error}")
    return Finding(GOOD, package, f"{version}, supported: {module}")


def look_at_extras() -> list[Finding]:
    nvshmem = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nvshmem")
    text = "wheel found (no kernel uses it yet)" if nvshmem else "not found (no kernel uses it yet)"
    found = [Finding(GOOD if nvshmem else NOTE, "NVSHMEM", text)]
    if importlib.util.find_spec("apex") is None:
        found.append(Finding(NOTE, "Apex", "not installed: recipes use torch's fused AdamW"))
    else:
        try:
            importlib.import_module("apex.optimizers")
            found.append(Finding(GOOD, "Apex", "NVIDIA's: recipes use its fused Adam on GPUs"))
        except (ImportError, RuntimeError) as error:
            found.append(Finding(NOTE, "Apex", f"a package of that name without apex.optimizers ({error}): not used"))
    return found


def look_at_settings() -> tuple[Finding, DispatcherConfig]:
    default = DispatcherConfig()
    try:
        config = DispatcherConfig.load()
    except DeepEPMoEError as error:
        return Finding(BAD, "settings", str(error)), default
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    text = ", ".join(f"{name} = {getattr(config, name)}" for name in changed) or "all at their defaults"
    return Finding(GOOD, "settings", f"{text} (DEEPEP_MOE_* variables and $DEEPEP_MOE_CONFIG)"), config


def try_group(config: DispatcherConfig) -> list[Finding]:
    """Backend of the group of all ranks, and a dispatch and combine on it. Collective."""
    with ranks_of_this_run() as world:
        try:
            dispatcher = TokenDispatcher(dist.group.WORLD, 4 * world.size, config, device=world.device)
            where = f"{world.size} rank(s), {world.collectives}, {world.device.type}"
            why = reason_against_better(dispatcher)
            found = [Finding(GOOD, "backend", f"{dispatcher.backend.name} ({where}){': ' * bool(why)}{why}")]
            return [*found, *look_at_nodes(dispatcher), round_trip(dispatcher, world.device)]
        except DeepEPMoEError as error:
            return [Finding(BAD, "backend", str(error))]


def reason_against_better(dispatcher: TokenDispatcher) -> str:
    """Why the group did not get a backend that the registry prefers."""
    backend = dispatcher.backend
    if dispatcher.config.backend != "auto":
        return "chosen by the settings"
    told = []
    for name, better in BACKENDS.items():
        if name == backend.name:
            break
        reason = better.why_not_auto(backend.group, backend.device, backend.config)
        reason = str(reason or why_not(name, backend.group, backend.device, backend.config))
        told.append(reason if reason.startswith(name) else f"{name}: {reason}")
    return "; ".join(told)


def look_at_nodes(dispatcher: TokenDispatcher) -> list[Finding]:
    """The nodes and rails of the group. Collective."""
    backend = dispatcher.backend
    nodes = find_nodes(backend.group, backend.device, backend.config)
    found = [Finding(GOOD, "nodes", f"{nodes.count}; {nodes}")]
    if nodes.count == 1:
        return found
    if (reason := nodes.why_unequal()) is not None:
        return [*found, Finding(NOTE, "rails", f"none: {reason}")]
    rails = "; ".join(f"ranks {', '.join(map(str, nodes.rail(place)))}" for place in range(nodes.size))
    found.append(Finding(GOOD, "rails", f"{nodes.size}; {rails}"))
    transport = TorchRail.name_on(backend.device)
    if backend.name == "hierarchical":
        text = f"{transport}: torch.distributed's all-to-all over each rail, the one transport there is"
    else:
        text = f"none: backend {backend.name} sends over the whole group; hierarchical would use {transport}"
    return [*found, Finding(GOOD, "between nodes", text)]


def round_trip(dispatcher: TokenDispatcher, device: torch.device) -> Finding:
    """Every token to two experts that give it back: the sum must be the weights' sum times the token."""
    tokens, hidden, topk = 64, 256, 2
    generator = torch.Generator().manual_seed(dispatcher.rank)
    x = torch.randn(tokens, hidden, generator=generator).to(device)
    topk_idx = torch.rand(tokens, 4 * dispatcher.world_size, generator=generator).topk(topk).indices.to(device)
    weights = torch.rand(tokens, topk, generator=generator).to(device)
    dispatched = dispatcher.dispatch(x, topk_idx, weights)
    result = dispatcher.combine(dispatched.rows, dispatched, weights=dispatched.weights)
    error = (result - x * weights.sum(1, keepdim=True)).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    state = GOOD if error < 1e-3 else BAD
    return Finding(state, "round trip", f"dispatch and combine of {tokens} tokens, largest error {error.item():.1e}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

EXAMPLES = """[bold]Examples[/bold]

    python -m deepep_moe doctor

    torchrun --nproc-per-node 8 -m deepep_moe doctor      (the backend that eight ranks get)
"""


@app.command(epilog=EXAMPLES)
def doctor() -> None:
    """Show what is installed, which backend would run and why, and check one dispatch and combine.

    Exit status 1 when something must be mended.
    """
    settings, config = look_at_settings()
    steps: list[Callable[[], Any]] = [
        look_at_torch,
        look_at_extension,
        lambda: look_at_framework("megatron-core", "megatron"),
        lambda: look_at_framework("deepspeed", "deepspeed"),
        look_at_extras,
    ]
    found: list[Finding] = []
    for step in steps:
        result = step()
        found += result if isinstance(result, list) else [result]
    found += [settings, *try_group(config)]

    if int(os.environ.get("RANK", "0")) == 0:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for finding in found:
            table.add_row(*finding)
        Console(highlight=False).print(table)
    if any(finding.state == BAD for finding in found):
        raise typer.Exit(1)
