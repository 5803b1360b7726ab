"""The DeepSpeed cases on GPUs, where tokens travel over NVLink and experts run as one grouped GEMM:

    torchrun --nproc-per-node 2 -m tests.distributed.deepspeed_on_gpus [TEXT ...]

One GPU per rank (2 or 4). Runs the cases whose name contains one of the texts, by default all. Prints a line per case,
the traceback of each failure, and exits with their number.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.launch import cases_for

MODULE = "tests.distributed.cases_deepspeed"
# Their tensors are made on the CPU, and what they check does not depend on the device; but for the first, which forces
# onto a CPU what the bf16 cases do on a GPU by themselves, and the last: a GPU's peers raise in their next call
# (tests/gpu/test_robustness.py).
# experts_of_all_kinds has a forward that closes over the module it was written for, which stays on the CPU.
CPU_ONLY = (
    "experts_of_all_kinds",
    "grouped_gemm",
    "keys_tags_and_returned_tuple_stay",
    "dropless_routing_agrees_on_nothing",
    "ranks_with_different_or_no_tokens",
    "errors_at_initialisation",
    "too_many_tokens",
    "a_model_without_moe_layers",
    "breakdown_of_time",
    "a_rank_that_cannot_go_on_tells_the_others",
)


def main() -> int:
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl", timeout=timedelta(seconds=100), device_id=torch.device("cuda", local_rank))
    failures = 0
    for name, function in cases_for(MODULE, dist.get_world_size()).items():
        if name.rpartition(".")[2] in CPU_ONLY or not any(text in name for text in sys.argv[1:] or [""]):
            continue
        error = None
        try:
            function(dist.group.WORLD)
        except Exception:
            error = traceback.format_exc()
            # at once: peers that did not fail may wait for this rank until they time out
            print(f"rank {dist.get_rank()} in {name}: {error}", file=sys.stderr, flush=True)
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        told = [e for e in errors if e is not None]
        failures += bool(told)
        if dist.get_rank() == 0:
            print("FAILED" if told else "passed", name, *told[:1], flush=True)
    dist.destroy_process_group()
    return failures


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("needs one CUDA GPU per rank")
    sys.exit(main())
