"""Cases under another default dtype and device: what we make names its own.

On a machine without a GPU the device "meta" stands in for "cuda": a tensor that was made without naming its device
holds no values there, and whatever uses it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import Buffer, DispatcherConfig, ElasticBuffer, TokenDispatcher
from deepep_moe.overlap import Overlap
from tests.distributed.cases_buffer import Batch
from tests.distributed.cases_buffer import dispatch as buffer_dispatch
from tests.distributed.cases_dispatcher import random_batch
from tests.launch import case


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def same_under_other_defaults(program: Callable[[], list[Any]]) -> None:
    """``program`` gives the same values, dtypes and devices whatever the caller's defaults are."""
    wanted = program()
    for dtype, device in ((torch.bfloat16, None), (torch.float32, "meta"), (torch.bfloat16, "meta")):
        with defaults(dtype, device):
            got = program()
        assert len(got) == len(wanted)
        for i, (mine, expected) in enumerate(zip(got, wanted, strict=True)):
            what = f"result {i} under {dtype} and {device}"
            if isinstance(expected, Tensor):
                assert mine.device == expected.device and mine.dtype == expected.dtype, what
                assert torch.equal(mine, expected), what
            else:
                assert mine == expected, what


@case()
def the_dispatcher_names_dtype_and_device(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 9, 128, 3, 2 * world, torch.bfloat16, dropped=0.2)
    for settings in (
        {"expert_alignment": 4},
        {"fp8_dispatch": True, "fp8_dispatch_grad": True},
        {"capacity_factor": 4.0 * world, "max_tokens_per_rank": 9},
        {"num_chunks": 2, "debug_waits": True},
    ):

        def program(settings: dict[str, Any] = settings) -> list[Any]:
            dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(timeout_seconds=20, **settings))
            sent = dispatcher.dispatch(x, topk_idx, weights)
            out = dispatcher.combine(sent.rows * 2, sent, weights=sent.weights)
            piped = Overlap(dispatcher).pipeline(lambda arrived: arrived.rows, x, topk_idx, weights)
            grads = torch.autograd.grad((out, piped), (x, weights), (out.detach(), piped.detach()))
            counts = sent.tokens_per_expert_host
            known = [] if counts is None else [counts]
            dispatcher.backend.check()
            return [sent.rows, sent.weights, sent.tokens_per_expert, out, piped, *grads, *known]

        same_under_other_defaults(program)


@case()
def buffer_names_dtype_and_device(group: dist.ProcessGroup) -> None:
    batch = Batch(group)

    def program() -> list[Any]:
        buffer = Buffer(group, num_nvl_bytes=64)
        results: list[Any] = [buffer.get_local_buffer_tensor(torch.float32)]
        counted = buffer.get_dispatch_layout(batch.topk_idx, batch.experts)
        results += [counted[0], *counted[2:4]]
        scaled = (batch.x.float().to(torch.float8_e4m3fn), batch.x[:, :2].float())
        for options in ({}, {"topk_idx": None, "topk_weights": None}, {"num_worst_tokens": 64}, {"x": scaled}):
            received, *others, counts, handle, _ = buffer_dispatch(buffer, batch, **options)
            results += [*(received if isinstance(received, tuple) else (received,)), *others, counts, *handle]
            again, *_ = buffer.dispatch(options.get("x", batch.x), handle=handle)
            results += again if isinstance(again, tuple) else (again,)
            rows = received[0].to(torch.bfloat16) if isinstance(received, tuple) else received
            results += buffer.combine(rows, handle, topk_weights=others[1], bias=batch.x)[:2]
        # FP8 cannot be compared on a CPU
        return [r.view(torch.uint8) if getattr(r, "dtype", None) == torch.float8_e4m3fn else r for r in results]

    same_under_other_defaults(program)


@case()
def elastic_buffer_names_dtype_and_device(group: dist.ProcessGroup) -> None:
    batch = Batch(group)

    def program() -> list[Any]:
        buffer = ElasticBuffer(group, num_max_tokens_per_rank=16)
        results: list[Any] = []
        for options in ({}, {"do_expand": True, "expert_alignment": 4}, {"do_expand": True, "do_cpu_sync": False}):
            stats = torch.zeros(2, dtype=torch.int64, device="cpu")
            x, topk_idx, weights, handle, _ = buffer.dispatch(
                batch.x,
                topk_idx=batch.topk_idx,
                topk_weights=batch.topk_weights,
                num_experts=batch.experts,
                cumulative_local_expert_recv_stats=stats,
                **options,
            )
            results += [x, topk_idx, weights, stats, *vars(handle).values()]
            results += buffer.combine(x, handle, topk_weights=weights)[:2]
        return [r for r in results if r is None or isinstance(r, (Tensor, int, list))]

    same_under_other_defaults(program)
