"""Run by test_core.py: rank 1 dies without a word after the plan; the others print what they are told."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from deepep_moe import DispatcherConfig
from deepep_moe.backends import Layout, get_backend
from deepep_moe.errors import PeerError

dist.init_process_group("gloo")
backend = get_backend(None, torch.device("cpu"), DispatcherConfig(timeout_seconds=20))
plan = backend.plan(torch.zeros((4, 1), dtype=torch.int64), dist.get_world_size())
if backend.rank == 1:
    os._exit(0)
try:
    backend.dispatch(plan, torch.ones(4, 8), layout=Layout.BY_SOURCE)
except PeerError as error:
    print(f"told: {error}", flush=True)
dist.destroy_process_group()
