"""Which ranks of a group share a node, and the two small groups that each rank belongs to.

A *node* is a set of ranks that can map each other's memory: the ranks of one host. Ranks with the same *place* in their
nodes (the first of each node, the second, ...) form a *rail*: rows cross the network along rails only. Nodes are found,
not configured. Tests cut one host into several with the setting ``ranks_per_node``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from deepep_moe.backends.exchange import call_ranks, gather
from deepep_moe.backends.headers import compare
from deepep_moe.config import DispatcherConfig


@dataclass(frozen=True)
class Nodes:
    """The nodes of a group. Ranks are those of the group throughout."""

    members: tuple[tuple[int, ...], ...]
    """[N] ranks of each node, in the order of their global ranks; nodes are numbered by their lowest rank."""
    rank: int
    hosts: tuple[str, ...]
    """[N] name of each node's host."""
    groups_apart: str | None = None
    """Why torch.distributed cannot make the groups of nodes and rails, if it cannot."""

    @property
    def count(self) -> int:
        """N."""
        return len(self.members)

    @property
    def size(self) -> int:
        """G: ranks of a node; only where nodes are equal."""
        return len(self.members[0])

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """[R] the node of each rank."""
        return tuple(node for _, node, _ in sorted(self._positions()))

    @cached_property
    def place_of(self) -> tuple[int, ...]:
        """[R] the place of each rank in its node."""
        return tuple(place for _, _, place in sorted(self._positions()))

    @property
    def node(self) -> int:
        return self.node_of[self.rank]

    @property
    def place(self) -> int:
        return self.place_of[self.rank]

    def rail(self, place: int) -> tuple[int, ...]:
        """[N] ranks with this place, by node."""
        return tuple(ranks[place] for ranks in self.members)

    def why_unequal(self) -> str | None:
        """The reason why there are no rails, or None."""
        if len({len(ranks) for ranks in self.members}) == 1:
            return None
        told = ", ".join(f"{host} has {len(ranks)}" for host, ranks in zip(self.hosts, self.members))
        return f"nodes have different numbers of ranks of the group ({told}): start equally many on each"

    def _positions(self) -> list[tuple[int, int, int]]:
        return [(rank, node, place) for node, ranks in enumerate(self.members) for place, rank in enumerate(ranks)]

    def __str__(self) -> str:
        return "; ".join(
            f"node {node} ({host}): ranks {', '.join(map(str, ranks))}"
            for node, (host, ranks) in enumerate(zip(self.hosts, self.members))
        )


def find_nodes(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> Nodes:
    """The nodes of ``group``, the same on all ranks. Collective.

    Raises:
        RankMismatchError: on every rank, where ``ranks_per_node`` differs.
    """
    mine = [host_id(), socket.gethostname(), config.ranks_per_node, len(distributed_c10d._world.pg_names)]
    told = gather("set-up", group, device, config.timeout_seconds, mine)
    ids, names, cuts, numbers_of_groups = zip(*told)
    compare({"ranks_per_node": [str(cut) for cut in cuts]})
    cut = config.ranks_per_node
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(ids):
        nodes.setdefault(f"{rank // cut}" if cut else host, []).append(rank)
    apart = None
    if len(set(numbers_of_groups)) > 1:  # from which torch makes the name of a group of some ranks
        apart = f"its ranks are in different numbers of process groups ({', '.join(map(str, numbers_of_groups))})"
    hosts = [names[ranks[0]] + (f", part {node}" if cut else "") for node, ranks in enumerate(nodes.values())]
    members = tuple(tuple(_in_order(group, ranks)) for ranks in nodes.values())
    return Nodes(members, dist.get_rank(group), tuple(hosts), apart)


@dataclass(frozen=True)
class NodeGroups:
    """The two groups that this rank needs."""

    node: dist.ProcessGroup
    rail: dist.ProcessGroup
    rails: tuple[tuple[int, ...], ...]
    """[G][N] ranks of each rail of this node, in the order of its group."""


_groups: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], ...], NodeGroups]] = WeakKeyDictionary()


def node_groups(group: dist.ProcessGroup, nodes: Nodes) -> NodeGroups:
    """The groups of this rank's node and rail, made once per group. Collective; nodes are equal."""
    made = _groups.setdefault(group, {})
    if nodes.members not in made:
        rails = tuple(tuple(_in_order(group, nodes.rail(place))) for place in range(nodes.size))
        node = _sub_group(group, nodes.members[nodes.node])
        made[nodes.members] = NodeGroups(node, _sub_group(group, rails[nodes.place]), rails)
    return made[nodes.members]


def _in_order(group: dist.ProcessGroup, ranks: Iterable[int]) -> list[int]:
    """``ranks`` of ``group`` as torch orders a group that is made of them."""
    return sorted(ranks, key=lambda rank: dist.get_global_rank(group, rank))


def _sub_group(group: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The group of ``ranks`` of ``group``, which are in order. Only they call."""
    global_ranks = [dist.get_global_rank(group, rank) for rank in ranks]
    everyone = dist.group.WORLD
    assert everyone is not None
    # Bound to a device, torch would split the communicator of all ranks, which ranks outside of ``group`` do not join.
    bound, everyone.bound_device_id = everyone.bound_device_id, None
    try:
        made = dist.new_group(global_ranks, backend=dist.get_backend_config(group), use_local_synchronization=True)
    finally:
        everyone.bound_device_id = bound
    call_ranks(made, ranks)
    return made


def host_id() -> str:
    """The same on all processes of one host and different elsewhere (hostnames alone repeat in containers)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return f"{socket.gethostname()}-{os.uname().nodename}"
