"""Four ranks on two nodes, started by test_nodes.py; the last is lost or fails in the middle of a call.

    torchrun --nproc-per-node 4 -m tests.distributed.lost_on_node WHEN

The ranks that are left print what they were told, and when.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig
from deepep_moe.backends import Layout, get_backend
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.errors import PeerError

TIMEOUT_SECONDS = 8.0


def main(when: str) -> None:
    dist.init_process_group("gloo")
    config = DispatcherConfig(backend="hierarchical", ranks_per_node=2, timeout_seconds=TIMEOUT_SECONDS)
    backend = get_backend(None, torch.device("cpu"), config)
    assert isinstance(backend, HierarchicalBackend)
    topk_idx = torch.arange(8, dtype=torch.int64).view(8, 1)
    plan = backend.plan(topk_idx, 8)
    x = torch.ones(8, 4, dtype=torch.float32)
    dist.barrier()
    last = backend.rank == 3
    if last and when == "before a call":
        os._exit(0)
    if when == "inside its node":
        lose_inside(backend)
    elif last:  # after all have agreed
        backend.rail.start = leave if when == "in a call" else fail  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        backend.dispatch(plan, x, layout=Layout.BY_EXPERT)
        if not last:
            backend.combine(plan, torch.ones(plan.num_rows, 4), layout=Layout.BY_EXPERT)
    except PeerError as error:
        print(f"told {backend.rank} after {time.monotonic() - began:.1f}: {error}", flush=True)
    except MemoryError:
        time.sleep(TIMEOUT_SECONDS / 2)  # this process stays, and still the others do not wait for it
    assert not backend.usable
    os._exit(0)


def lose_inside(backend: HierarchicalBackend) -> None:
    """After all rows have crossed, when the ranks of the other node are in their next call already. Rank 2, of the same
    node, learns of it later than they do."""
    dispatch, calls = backend.engine.dispatch, []

    def inside(*given: Any, **options: Any) -> Any:
        calls.append(None)
        if backend.rank >= 2 and len(calls) == 2:  # the first is for the rank's own tokens
            time.sleep(0.5 if backend.rank == 3 else 1.5)
        if backend.rank == 3 and len(calls) == 2:
            leave()
        return dispatch(*given, **options)

    backend.engine.dispatch = inside  # type: ignore[method-assign]


def leave(*_: Any) -> Any:
    os._exit(0)


def fail(*_: Any) -> Any:
    raise MemoryError("no memory for the rows")


if __name__ == "__main__":
    main(sys.argv[1])
