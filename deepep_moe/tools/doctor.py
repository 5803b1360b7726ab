"""``python -m deepep_moe doctor``: what is on this machine, which backend a group gets and why, and whether it works.

Without torchrun the group is one process; under torchrun it is all ranks, as in a training job. The last check is a
dispatch and a combine whose result is compared. ``--json`` prints the same for a program or an issue.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig, TokenDispatcher, __version__, extension, nvshmem
from deepep_moe.backends import BACKENDS, why_not
from deepep_moe.backends.exchange import gather
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.backends.rail import TorchRail
from deepep_moe.errors import DeepEPMoEError
from deepep_moe.low_latency_nodes import NodesEngine
from deepep_moe.nvshmem_transports import NodeFacts, look, summary
from deepep_moe.tools.world import World, ranks_of_this_run
from deepep_moe.topology import find_nodes

GOOD, NOTE, BAD = "ok", "note", "wrong"
_COLOURS = {GOOD: "32", NOTE: "33", BAD: "31"}  # of a terminal
_VARIABLES = ("DEEPEP_MOE_", "CUDA_", "NCCL_", "TORCH_NCCL_", "GLOO_", "NVSHMEM_", "OMP_", "TORCH_LOGS")
"""What environment variables start with that change how deepep_moe runs."""


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # GOOD, NOTE (it works without) or BAD (it must be mended)
    subject: str
    text: str


def look_at_torch() -> list[Finding]:
    """Versions, and the GPUs that torch sees."""
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
        state = BAD if extension.BUILT or torch.cuda.is_available() else NOTE
        return [Finding(state, "extension", f"{extension.why_missing}; without it backend nvlink is off")]
    found = [Finding(GOOD, "extension", f"built for {', '.join(extension.ARCHITECTURES)}, {extension._C.__file__}")]
    for index in range(torch.cuda.device_count()):
        if reason := extension.why_not_on(torch.device("cuda", index)):
            found.append(Finding(BAD, f"GPU {index}", reason))
    return found


def version_of(package: str) -> str | None:
    """Version of an installed package, or None."""
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
    """Optional packages: NVSHMEM, Apex."""
    missing = nvshmem.why_missing()
    version = "" if missing else ".".join(map(str, nvshmem.module().loaded_version()))
    use = "rail=nvshmem, and low-latency calls over several nodes"
    text = f"not there: {missing}; needed only for {use}" if missing else f"{version}, for {use}"
    found = [Finding(NOTE if missing else GOOD, "NVSHMEM", text)]
    if importlib.util.find_spec("apex") is None:
        use = "tensor parallelism of Megatron-Core's GPTModel needs it or TransformerEngine"
        found.append(Finding(NOTE, "Apex", f"not installed: {use}"))
    else:
        try:
            importlib.import_module("apex.optimizers")
            found.append(Finding(GOOD, "Apex", "NVIDIA's: Megatron-Core uses its kernels"))
        except (ImportError, RuntimeError) as error:
            found.append(Finding(NOTE, "Apex", f"a package of that name without apex.optimizers ({error}): not used"))
    return found


def look_at_settings() -> tuple[Finding, DispatcherConfig]:
    """The settings of this process; the defaults where they are wrong."""
    default = DispatcherConfig()
    try:
        config = DispatcherConfig.load()
    except DeepEPMoEError as error:
        return Finding(BAD, "settings", str(error)), default
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    text = ", ".join(f"{name} = {getattr(config, name)}" for name in changed) or "all at their defaults"
    return Finding(GOOD, "settings", f"{text} (DEEPEP_MOE_* variables and $DEEPEP_MOE_CONFIG)"), config


def look_at_environment() -> Finding:
    """Environment variables that change how deepep_moe runs."""
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
    return Finding(GOOD, "environment", " ".join(variables) or f"no variable that starts with {', '.join(_VARIABLES)}")


def look_here() -> tuple[list[Finding], DispatcherConfig]:
    """What one process sees without the others."""
    settings, config = look_at_settings()
    frameworks = [look_at_framework("megatron-core", "megatron"), look_at_framework("deepspeed", "deepspeed")]
    found = [*look_at_torch(), *look_at_extension(), *frameworks, *look_at_extras(), settings, look_at_environment()]
    return found, config


def look_at_group(mine: list[Finding], config: DispatcherConfig) -> list[Finding]:
    """The ranks, where they differ from rank 0, their backend, and a dispatch and combine on it. Collective."""
    try:
        with ranks_of_this_run() as world:
            found = compare_ranks(world, mine)
            try:
                dispatcher = TokenDispatcher(dist.group.WORLD, 4 * world.size, config, device=world.device)
                why = reason_against_better(dispatcher)
                text = f"{dispatcher.backend.name} ({world.collectives}, {world.device.type}){': ' * bool(why)}{why}"
                found += [Finding(GOOD, "backend", text), *look_at_nodes(dispatcher)]
                found.append(round_trip(dispatcher, world.device))
            except DeepEPMoEError as error:
                found.append(Finding(BAD, "backend", str(error)))
            return found
    except (RuntimeError, ValueError) as error:  # torch.distributed's own
        return [Finding(BAD, "ranks", f"torch.distributed failed: {error}")]


def compare_ranks(world: World, mine: list[Finding]) -> list[Finding]:
    """How many ranks there are, and every finding of another rank that rank 0 does not have too. Collective."""
    started = "by torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "without torchrun"
    everyone = [[Finding(*finding) for finding in findings] for findings in world.gather(mine)]
    ranks_of: dict[Finding, list[str]] = {}
    for rank, findings in enumerate(everyone):
        for finding in findings:
            if finding not in everyone[0]:
                ranks_of.setdefault(finding, []).append(str(rank))
    different = [
        Finding(BAD if finding.state == BAD else NOTE, f"rank {', '.join(ranks)}", f"{finding.subject}: {finding.text}")
        for finding, ranks in ranks_of.items()
    ]
    alike = f"{len(ranks_of)} findings differ from those of rank 0" if different else "all find the same"
    text = f"{world.size}, started {started}" + (f"; {alike}" if world.size > 1 else "")
    return [Finding(GOOD, "ranks", text), *different]


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
    reason = NodesEngine.why_not(backend, backend.config)
    text = "kernels, with rail=nvshmem or num_rdma_bytes" if reason is None else f"the slow reference, because {reason}"
    found.append(Finding(GOOD if reason is None else NOTE, "low latency", text))
    if (reason := nodes.why_unequal()) is not None:
        return [*found, Finding(NOTE, "rails", f"none: {reason}")]
    rails = "; ".join(f"ranks {', '.join(map(str, nodes.rail(place)))}" for place in range(nodes.size))
    found.append(Finding(GOOD, "rails", f"{nodes.size}; {rails}"))
    if isinstance(backend, HierarchicalBackend):
        text = f"{backend.rail.name}, over each rail"
    else:
        transport = TorchRail.name_on(backend.device) if backend.config.rail == "nccl" else backend.config.rail
        text = f"none: backend {backend.name} sends over the whole group; hierarchical would use {transport}"
    facts = gather("doctor", backend.group, backend.device, backend.config.timeout_seconds, look().as_dict())
    between, missing = summary([NodeFacts(**facts[ranks[0]]) for ranks in nodes.members])
    by_nvshmem = Finding(NOTE, "NVSHMEM would use", "; ".join([between, *missing]))
    return [*found, Finding(GOOD, "between nodes", text), by_nvshmem]


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


def as_text(found: Sequence[Finding], columns: int | None, colour: bool) -> str:
    """One line for each finding; longer ones are wrapped to ``columns``, if given."""
    subjects = max(len(finding.subject) for finding in found)
    lines = []
    for state, subject, text in found:
        start = f"{state:<5}  {subject:<{subjects}}  "
        line = start + text
        if columns is not None:
            line = textwrap.fill(line, max(columns, len(start) + 20), subsequent_indent=" " * len(start))
        lines.append(f"\033[{_COLOURS[state]}m{line[:5]}\033[0m{line[5:]}" if colour else line)
    return "\n".join(lines)


def as_json(found: Sequence[Finding]) -> str:
    """Everything that was found, for a program or an issue."""
    wrong = any(finding.state == BAD for finding in found)
    versions = {"deepep_moe": __version__, "torch": str(torch.__version__)}
    findings = [finding._asdict() for finding in found]
    return json.dumps({**versions, "state": BAD if wrong else GOOD, "findings": findings}, indent=1)


@contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """Send what frameworks and NCCL print meanwhile to stderr, so that stdout holds the report alone."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns the exit status: 1 where something must be mended, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m deepep_moe doctor",
        description="Show what is installed, which backend would run and why, and check one dispatch and combine.",
        epilog="Under torchrun: the backend, nodes and rails of all ranks, and where ranks differ. "
        "Exit status: 0 all works, 1 something must be mended (lines that begin with 'wrong'), 2 wrong arguments.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into an issue")
    asked = parser.parse_args(arguments)
    with stdout_as_stderr():
        mine, config = look_here()
        found = [*mine, *look_at_group(mine, config)]
    if int(os.environ.get("RANK", "0")) == 0:
        if asked.json:
            print(as_json(found), flush=True)
        else:
            terminal = sys.stdout.isatty()
            columns = shutil.get_terminal_size().columns if terminal else None
            print(as_text(found, columns, terminal and "NO_COLOR" not in os.environ), flush=True)
    return int(any(finding.state == BAD for finding in found))
