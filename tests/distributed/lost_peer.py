"""One of several ranks whose last one is lost in some way; started by test_lost_peers.py.

    python -m tests.distributed.lost_peer PORT RANK RANKS HOW DEVICE

PORT is that of a TCPStore. HOW is an entry of :data:`WAYS`. DEVICE is cpu (gloo) or cuda (NCCL, a GPU per rank).
Every rank that is left prints what it was told as a line of JSON and then ends as any program does: nothing is
destroyed or killed on the way out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.backends.exchange import Exchange

TIMEOUT_SECONDS = 2.0
LATE_SECONDS = 3 * TIMEOUT_SECONDS
FOR_EVER = 60.0
WAYS = ("asleep", "in a barrier", "killed", "late", "silent after a refusal", "failed inside a call")


def main(port: int, rank: int, ranks: int, how: str, kind: str) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)  # with the timeout of 30 minutes
    config = DispatcherConfig(backend="collective", timeout_seconds=TIMEOUT_SECONDS, debug_waits=rank == 0)
    group = dist.new_group(backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    dispatcher = TokenDispatcher(group, 2 * ranks, config, device=device)
    x = torch.ones(4, 8, dtype=torch.float32, device=device)
    topk_idx = torch.arange(8, dtype=torch.int64, device=device).view(4, 2) % (2 * ranks)
    plan = dispatcher.plan(topk_idx)
    sent = dispatcher.dispatch(x, plan)
    assert torch.equal(dispatcher.combine(sent.rows, sent), 2 * x)
    dist.barrier()
    if rank == ranks - 1:
        lose(how)
    wrong = how == "silent after a refusal" and rank == 0
    tell("first", lambda: dispatcher.plan(topk_idx.float() if wrong else topk_idx))
    tell("again", lambda: dispatcher.combine(sent.rows, sent))
    tell("another", lambda: TokenDispatcher(group, 2 * ranks, DispatcherConfig(backend="collective"), device=device))
    print(json.dumps({"call": "state", "usable": dispatcher.backend.usable}), flush=True)


def tell(name: str, call: Callable[[], Any]) -> None:
    began = time.monotonic()
    error: Exception | None = None
    try:
        call()
    except Exception as raised:
        error = raised
    told = {"call": name, "error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    print(json.dumps(told), flush=True)


def lose(how: str) -> None:
    if how == "asleep":
        time.sleep(FOR_EVER)
    elif how == "in a barrier":
        dist.barrier()
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "late":
        time.sleep(LATE_SECONDS)
    elif how == "silent after a refusal":
        Exchange.gather = lambda *_: time.sleep(FOR_EVER)  # type: ignore[assignment,method-assign,return-value]
    elif how == "failed inside a call":
        all_to_all = Exchange.all_to_all

        def fail(self: Exchange, phase: str, rows: torch.Tensor, *counts: Any) -> torch.Tensor:
            if rows.dtype == torch.int32:  # the routes; the agreement is over
                raise MemoryError("no memory for the routes")
            return all_to_all(self, phase, rows, *counts)

        Exchange.all_to_all = fail  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
