"""``benchmarks nodes``: dispatchers and MoE layers over several nodes: Megatron-Core's ``alltoall`` and our backends.

Beside the times: rows that crossed between nodes per token, counted from the routing, and the least that can (one per
token and other node that it has an expert on).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import dispatcher, megatron_layer
from benchmarks.candidates import Candidate, Step, measure, with_settings
from benchmarks.megatron_layer import Layer, megatron_missing
from benchmarks.ops import Shape, routing
from benchmarks.report import Measurement, Table
from benchmarks.timing import Phases, call_samples
from deepep_moe.backends import why_not
from deepep_moe.backends.rail import Blocks, TorchRail
from deepep_moe.config import ENV_PREFIX, DispatcherConfig
from deepep_moe.errors import InputError
from deepep_moe.tools.world import World
from deepep_moe.topology import find_nodes, node_groups

BACKENDS = ("collective", "hierarchical")
NETWORK_MEBIBYTES = (16, 64)
ROWS, FLOOR = "rows across per token", "floor"
_AHEAD_MS = 6  # longer than the host needs for a step
_WITHOUT_TRANSFER = {"nvlink": "over all ranks", "hierarchical": "without rows between nodes"}
_RANKS_PER_NODE = f"{ENV_PREFIX}RANKS_PER_NODE"


def cut_host(ranks_per_node: int) -> None:
    """Start this process again as part of a host of its own: NCCL then takes the network between such parts.

    NCCL reads ``NCCL_HOSTID`` early, so it must be there before torch is.
    """
    rank = os.environ.get("RANK")
    if rank is None or os.environ.get(_RANKS_PER_NODE) == str(ranks_per_node):
        return
    os.environ[_RANKS_PER_NODE] = str(ranks_per_node)
    os.environ["NCCL_HOSTID"] = f"node-{int(rank) // ranks_per_node}"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def ranks_per_node(world: World, given: int) -> int:
    """Ranks of a node: ``given``, or those that one torchrun started."""
    size = given or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.size % size:
        raise InputError("--ranks-per-node", size, f"must divide the {world.size} ranks")
    return size


def crossing_rows(shape: Shape, ranks: int, size: int) -> dict[str, float]:
    """Rows that cross between nodes per token, for each way to send them, counted from the benchmark's routing."""
    local, nodes = shape.experts // ranks, ranks // size
    totals = dict.fromkeys(("alltoall", *BACKENDS), 0)
    for rank in range(ranks):
        owner, node = routing(shape, rank, imbalanced=False) // local, rank // size
        wanted = torch.zeros((shape.tokens, ranks), dtype=torch.bool, device="cpu").scatter_(1, owner, True)
        wanted[:, node * size : (node + 1) * size] = False
        totals["alltoall"] += int((owner // size != node).sum())
        totals["collective"] += int(wanted.sum())
        totals["hierarchical"] += int(wanted.view(shape.tokens, nodes, size).any(2).sum())
    return {kind: rows / (shape.tokens * ranks) for kind, rows in totals.items()}


def candidates(world: World, shape: Shape) -> list[Candidate]:
    """alltoall if Megatron-Core is there, then our dispatcher inside Megatron and alone, on each backend."""
    found = []
    if megatron_missing(world) is None:
        found.append(Candidate("Megatron alltoall", lambda: dispatcher.megatron_dispatcher(world, shape, "alltoall")))
        for name in BACKENDS:
            build = with_settings(lambda: dispatcher.megatron_dispatcher(world, shape, "deepep"), backend=name)
            found.append(Candidate(f"Megatron deepep, {name}", build))
    for name in BACKENDS:
        build = with_settings(lambda: dispatcher.token_dispatcher(world, shape), backend=name)
        found.append(Candidate(f"TokenDispatcher, {name}", build))
    return found


def dispatcher_table(
    world: World, shape: Shape, size: int, candidates: list[Candidate], repeats: int, done: Callable[[str], None]
) -> Table:
    """The phases of ``candidates`` on one shape. Collective."""
    nodes = world.size // size
    title = f"Dispatchers over {nodes} nodes of {size}: {shape}"
    table = Table(title, {**shape._asdict(), "ranks": world.size, "nodes": nodes}, list(dispatcher.NOTES))
    table = measure(world, table, candidates, repeats, done)
    rows = crossing_rows(shape, world.size, size)
    for index, row in enumerate(table.rows):
        if row.name == "total":
            kind = next(kind for kind in rows if kind in row.setting)
            table.rows[index] = replace(row, details={ROWS: rows[kind], FLOOR: rows["hierarchical"]})
    return table


def network_table(world: World, size: int, repeats: int, done: Callable[[str], None]) -> Table:
    """How fast rows cross between nodes: an all-to-all over each rail, as the backend makes it. Collective.

    Two sizes give the speed and the time to start, which the model takes (node_model.py).
    """
    group = dist.group.WORLD
    assert group is not None
    config = DispatcherConfig.load()
    nodes = find_nodes(group, world.device, config)
    rail = TorchRail(node_groups(group, nodes).rail, world.device, config)
    table = Table(f"Network between {nodes.count} nodes of {size}", {"ranks": world.size, "nodes": nodes.count})
    table.notes.append("Bytes of one rank to all other nodes together, over its rail.")
    row_bytes = 1 << 14
    for mebibytes in NETWORK_MEBIBYTES if world.on_gpu else (1,):
        rows = (mebibytes << 20) // row_bytes // max(1, nodes.count - 1)
        blocks = Blocks(tuple(0 if rank == dist.get_rank(rail.group) else rows for rank in range(nodes.count)))
        sent, received = rail.buffers(sum(blocks.sizes), sum(blocks.sizes), row_bytes)
        move = partial(rail.start, "dispatch", sent, received, blocks, blocks, 0, 1)
        times = call_samples(world, lambda move=move: move()(), repeats)[0]  # type: ignore[misc]
        table.rows.append(Measurement("transfer", times, f"{mebibytes} MiB", link_bytes=sent.numel()))
        done("network")
    return table


def own_cost_table(world: World, shape: Shape, size: int, repeats: int, done: Callable[[str], None]) -> Table:
    """What ``hierarchical`` costs beside the transfer between nodes, which is left out. Collective.

    Beside it ``nvlink`` over all ranks where it can run: that is the same work on one node. Both also with fixed sizes.
    """
    nodes = world.size // size
    title = f"Own cost over {nodes} nodes of {size}: {shape}"
    notes = [
        "hierarchical without rows between nodes: all that a step does but the transfer itself; nvlink: all ranks as "
        "one node. Results are not compared.",
        f"GPU busy before: the clock starts when the GPU ends {_AHEAD_MS} ms of other work, in which the host begins "
        "the step. With fixed sizes the host then is ahead all the time, and what is left is the time of the GPU.",
    ]
    table = Table(title, {**shape._asdict(), "ranks": world.size, "nodes": nodes}, notes)
    found, group = [], dist.group.WORLD
    assert group is not None
    for sizes, factor in (("", 0.0), (", fixed sizes", dispatcher.capacity_factor(shape, world.size))):
        for name, what in _WITHOUT_TRANSFER.items():
            if why_not(name, group, world.device) is None:
                build = with_settings(
                    lambda: dispatcher.token_dispatcher(world, shape), backend=name, capacity_factor=factor
                )
                found.append(Candidate(f"{name} {what}{sizes}", partial(_without_transfer, build)))
    return measure(world, table, found, repeats, done, busy_ms=_AHEAD_MS)


def _without_transfer(build: Callable[[], Step]) -> Step:
    step = build()

    def without(phase: Phases) -> Tensor:
        with mock.patch.object(TorchRail, "start", _start_nothing):
            return torch.ones_like(step(phase))  # the values of rows that were not sent mean nothing

    return without


def _start_nothing(self: TorchRail, *arguments: object) -> Callable[[], None]:
    return lambda: None


def layer_table(world: World, layer: Layer, size: int, tokens: int, repeats: int, done: Callable[[str], None]) -> Table:
    """One MoELayer, all with our grouped experts. Collective."""
    nodes = world.size // size
    title = f"MoELayer over {nodes} nodes of {size}: {layer}, {tokens} tokens per rank"
    case = {**layer._asdict(), "tokens": tokens, "ranks": world.size, "nodes": nodes}
    table = Table(title, case, list(megatron_layer.LAYER_NOTES))
    found = [Candidate("alltoall", megatron_layer.layer_builder(world, layer, tokens, "alltoall", grouped=True))]
    for name in BACKENDS:
        build = megatron_layer.layer_builder(world, layer, tokens, "deepep", grouped=True)
        found.append(Candidate(f"deepep, {name}", with_settings(build, backend=name)))
    return measure(world, table, found, repeats, done)
