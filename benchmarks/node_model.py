"""What dispatch and combine should take over several nodes, from what was measured on one and the speed of the network.

A step moves rows four times: dispatch, combine, and the backward of both. Each time costs the larger of

* the network: rows that a rank sends to other nodes, times their bytes, over the network's speed per rank, and
* what is left to do inside the nodes, taken from a measurement on one node (``local_us``, of a whole step),

plus what cannot overlap. ``alltoall`` and ``collective`` send everything in one operation and do their local work
before and after it, so the two add up. ``hierarchical`` works on the rank's own tokens and on the chunks that have
arrived while others cross; what is left is the work on the last chunk. Its plan precedes the transfers. Rows follow
from routing that is even over the experts, which is what load balancing aims at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.ops import Shape

MOVES = 4  # of all rows, in a step
BYTES = 2  # of a BF16 channel
CHUNK_BYTES = 32 << 20
MOST_CHUNKS = 8
TRANSFER_US = 40.0  # to start a chunk's transfer and its kernels inside the node
KINDS = ("alltoall", "collective", "hierarchical")


PLAN_US = 900.0  # what dispatch takes longer than on one node; two H200s, two nodes of one (docs/multinode.md)


class Cluster(NamedTuple):
    """Nodes and the network between them."""

    nodes: int
    size: int
    """Ranks of a node."""
    network: float
    """GB/s per rank and direction."""
    start_us: float = TRANSFER_US
    """To start a transfer."""
    plan_us: float = PLAN_US
    """Of ``hierarchical``, beyond the plan of nvlink: host time, so the same for all sizes."""


LOCAL_US = {"alltoall": 11248.0, "collective": 8314.0, "hierarchical": 3328.0 * 1.5}
"""A step of 4096 tokens, hidden 7168, top-8 of 256, on four H100s of one host, scaled by the rows that a rank handles.
The third is that of nvlink, times what combine and backward of hierarchical took beyond theirs (2 x 2 GPUs, no row
between nodes)."""


def crossing_rows(kind: str, shape: Shape, cluster: Cluster) -> float:
    """Rows that cross the network per token, on average."""
    ranks = cluster.nodes * cluster.size
    if kind == "alltoall":  # one per route
        return shape.topk * (cluster.nodes - 1) / cluster.nodes
    if kind == "collective":  # one per rank
        return (ranks - cluster.size) * hit(shape, ranks)
    return (cluster.nodes - 1) * hit(shape, cluster.nodes)  # one per node


def hit(shape: Shape, parts: int) -> float:
    """The share of tokens with an expert in one of ``parts`` equal parts of the experts."""
    others = shape.experts - shape.experts // parts
    return 1 - math.comb(others, shape.topk) / math.comb(shape.experts, shape.topk)


def local_us(kind: str, shape: Shape, cluster: Cluster) -> float:
    """Work of a step outside of the network, scaled from :data:`LOCAL_US`: by the bytes of routes with ``alltoall``,
    else by the bytes of rows that reach a rank."""
    reference, ranks = Shape(4096, 7168, 8, 256), cluster.nodes * cluster.size
    volume = shape.tokens * shape.hidden / (reference.tokens * reference.hidden)
    if kind == "alltoall":
        return LOCAL_US[kind] * volume * shape.topk / reference.topk
    return LOCAL_US[kind] * volume * ranks * hit(shape, ranks) / (4 * hit(reference, 4))


def step_us(kind: str, shape: Shape, cluster: Cluster) -> float:
    """Forward and backward of dispatch and combine."""
    num_bytes = shape.tokens * crossing_rows(kind, shape, cluster) * shape.hidden * BYTES
    network, local = num_bytes / cluster.network / 1e3, local_us(kind, shape, cluster) / MOVES
    if kind != "hierarchical" or cluster.nodes == 1:
        return MOVES * (network + local + (cluster.start_us if num_bytes else 0.0))
    chunks = max(1, min(MOST_CHUNKS, math.ceil(num_bytes / CHUNK_BYTES)))
    remote = local * (cluster.nodes - 1) / cluster.nodes  # of the local work, what needs the network's rows
    overlapped = max(network, local) + min(network, remote) / chunks
    return MOVES * (overlapped + chunks * cluster.start_us) + cluster.plan_us


SOCKETS = Cluster(2, 2, network=1.895, start_us=620.0, plan_us=2700.0)
"""Two parts of one host with NCCL over sockets: an all-to-all of 16 MiB took 9.5 ms, one of 64 MiB 36.0 ms. A plan then
made two exchanges; now it makes one."""
MEASURED = (  # (kind, tokens, us) over SOCKETS, docs/multinode.md
    ("alltoall", 1024, 128_965.0),
    ("collective", 1024, 57_995.0),
    ("hierarchical", 1024, 35_968.0),
    ("alltoall", 4096, 547_466.0),
    ("collective", 4096, 266_091.0),
    ("hierarchical", 4096, 140_701.0),
)


def model(shape: str, size: int, network: float, nodes: str) -> None:
    """Predict what dispatch and combine, forward and backward, take over several nodes, beside what was measured."""
    one, console = Shape.parse(shape), Console(highlight=False)
    table = Table("measured", "us", "predicted", "error", title="Two nodes of two H100s, NCCL over sockets", box=None)
    for kind, tokens, measured in MEASURED:
        predicted = step_us(kind, Shape(tokens, 7168, 8, 256), SOCKETS)
        error = f"{100 * (predicted / measured - 1):+.0f} %"
        table.add_row(f"{kind}, {tokens} tokens", f"{measured:.0f}", f"{predicted:.0f}", error)
    console.print(table)
    headings = [f"{kind} {what}" for kind in KINDS for what in ("rows", "us")]
    table = Table("ranks", *headings, title=f"Predicted: {one}, nodes of {size}, {network:g} GB/s per rank", box=None)
    for count in map(int, nodes.split(",")):
        one.check(count * size)
        cluster = Cluster(count, size, network)
        cells = []
        for kind in KINDS:
            cells += [f"{crossing_rows(kind, one, cluster):.2f}", f"{step_us(kind, one, cluster):.0f}"]
        table.add_row(str(count * size), *cells)
    console.print(table)
