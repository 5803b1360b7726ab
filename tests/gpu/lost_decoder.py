"""One of several ranks that decode with masks; the last is killed on the way. Started by test_low_latency_failures.py.

    python -m tests.gpu.lost_decoder PORT RANK COUNT [RANKS_PER_NODE]

PORT is that of a TCPStore. With RANKS_PER_NODE other than 0 the ranks are on several nodes. Every survivor prints what
it saw as one line of JSON.
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

from deepep_moe import Buffer
from tests.low_latency_util import Batch, Shape, check_combine, check_dispatch, combined, expert_outputs

TIMEOUT_SECONDS = 3.0
LOST_STEP, LAST_STEP = 4, 8


def main(port: int, rank: int, count: int, ranks_per_node: int = 0) -> None:
    os.environ["DEEPEP_MOE_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
    if ranks_per_node:
        os.environ.update(DEEPEP_MOE_RAIL="nvshmem", DEEPEP_MOE_RANKS_PER_NODE=str(ranks_per_node))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=30)
    )
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True, enable_shrink=True)
    shape = Shape(16, 512, 4, 4 * count, (13,) * count)
    status = torch.zeros(count, dtype=torch.int32, device=device)
    slowest = 0.0
    for step in range(LAST_STEP):
        if rank == count - 1 and step == LOST_STEP:
            torch.cuda.synchronize()
            os.kill(os.getpid(), signal.SIGKILL)
        batch = Batch(step, shape, device)
        began = time.monotonic()
        result: Any = buffer.low_latency_dispatch(
            batch.x[rank], batch.topk_idx[rank], shape.max_tokens, shape.experts, use_fp8=False
        )
        y = expert_outputs(batch, rank, "bf16", result)
        out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
        torch.cuda.synchronize()
        slowest = max(slowest, time.monotonic() - began)
        masked = {count - 1} if step >= LOST_STEP else set()
        check_dispatch(batch, rank, "bf16", result, masked)
        check_combine(out, combined(batch, rank, "bf16", masked=masked), f"step {step}")
    buffer.low_latency_query_mask_buffer(status)
    print(json.dumps({"masked": status.tolist(), "slowest": slowest}), flush=True)
    os._exit(0)  # the group has lost a member: there is nothing to take leave of


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
