"""One of two ranks that train a small MoE layer, of which rank 1 is lost on the way; started by test_robustness.py.

    python -m tests.gpu.lost_rank PORT RANK HOW [SETTINGS]

PORT is that of a TCPStore. SETTINGS are those of DispatcherConfig, as JSON. HOW is an entry of :data:`WAYS`, and rank 0
prints what it got to know as one line of JSON;
or it is :data:`UNCAUGHT`, and rank 0 is a program that catches nothing and cleans nothing up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import PeerError

WAYS = ("killed between steps", "killed inside a step", "failed inside a step")
UNCAUGHT = "killed inside a step, nothing caught"
TIMEOUT_SECONDS = 3.0
LAST_STEP = 5
TOKENS, HIDDEN, TOPK, EXPERTS = 256, 256, 2, 8


def main(port: int, rank: int, how: str, settings: dict[str, Any]) -> None:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, **settings)
    dispatcher = TokenDispatcher(None, EXPERTS, config, device=device)
    if how == UNCAUGHT:
        train(dispatcher, rank, how, {})
    progress = {"steps": 0, "since": time.monotonic()}
    try:
        train(dispatcher, rank, how, progress)
    except PeerError as error:
        waited = time.monotonic() - progress["since"]
        told = {"error": type(error).__name__, "message": str(error), "seconds": waited, "steps": progress["steps"]}
        told["backend"] = dispatcher.backend.name
        dispatcher.backend.close()
        told["still computes"] = torch.arange(5, device=device).sum().item() == 10
        print(json.dumps(told), flush=True)
    finally:
        dist.destroy_process_group()


def train(dispatcher: TokenDispatcher, rank: int, how: str, progress: dict[str, float]) -> None:
    """Steps of one layer until somebody stops it."""
    device = dispatcher.backend.device
    generator = torch.Generator().manual_seed(rank)
    expert = torch.nn.Linear(HIDDEN, HIDDEN, device=device)
    optimizer = torch.optim.SGD(expert.parameters(), lr=1e-3)
    for step in range(1000):
        lost = rank == 1 and step == LAST_STEP
        if lost and how == "killed between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(TOKENS, HIDDEN, generator=generator).to(device).requires_grad_()
        routes = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, dim=1).indices.to(device)
        weights = torch.rand(TOKENS, TOPK, generator=generator).to(device)
        dispatched = dispatcher.dispatch(x, routes, weights)
        if lost and how.startswith("killed inside a step"):
            os.kill(os.getpid(), signal.SIGKILL)
        if lost and how == "failed inside a step":
            raise RuntimeError("the user's own mistake")
        out = dispatcher.combine(expert(dispatched.rows), dispatched, weights=dispatched.weights)
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        dispatcher.backend.check()  # what kernels gave up on would else be raised by the next call only
        progress.update(steps=step + 1, since=time.monotonic())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})
