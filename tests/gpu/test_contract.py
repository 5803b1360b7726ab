"""The contract of Buffer, ElasticBuffer and TokenDispatcher on GPUs, in every combination that callers use.

BF16 or FP8 with scales, with top-k or without, asynchronous or not, with a previous event or without, exact or
worst-case sizes, a cached handle, under the caller's default device and dtype. Results are looked at as such callers
do: on the compute stream, right after ``event.current_stream_wait()``, with no other synchronisation before. The same
program on the CPU over gloo says what they must be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe import Buffer, DispatcherConfig, ElasticBuffer, EventOverlap, TokenDispatcher
from deepep_moe.overlap import Overlap
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks

HIDDEN, TOPK, LOCAL_EXPERTS, TOKENS = 512, 3, 4, 96
CPU = torch.device("cpu")
DEFAULTS = [None, (torch.float32, "cuda"), (torch.bfloat16, None), (torch.bfloat16, "cuda")]


@pytest.fixture(scope="module")
def cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


@pytest.fixture(autouse=True)
def settings(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", str(ranks.num_sms))
    monkeypatch.setenv("DEEPEP_MOE_TIMEOUT_SECONDS", str(TIMEOUT_SECONDS))


@contextmanager
def defaults(chosen: tuple[torch.dtype, str | None] | None) -> Iterator[None]:
    if chosen is None:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(chosen[0])
    torch.set_default_device(chosen[1])
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def batch(ranks: Ranks, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H] bf16, routes [T, K] with some dropped, weights [T, K]: this rank's own; T differs between ranks."""
    generator = torch.Generator(CPU).manual_seed(seed * 100 + ranks.rank)
    shape = (TOKENS - 7 * ranks.rank, LOCAL_EXPERTS * ranks.size)
    routes = torch.rand(shape, generator=generator, dtype=torch.float32, device=CPU).topk(TOPK, dim=1).indices
    dropped = torch.rand(routes.shape, generator=generator, dtype=torch.float32, device=CPU) < 0.1
    routes = routes.masked_fill(dropped, -1)
    x = torch.randn((shape[0], HIDDEN), generator=generator, dtype=torch.float32, device=CPU).bfloat16()
    weights = torch.rand(routes.shape, generator=generator, dtype=torch.float32, device=CPU)
    return x.to(device), routes.to(device), weights.to(device)


def busy(device: torch.device) -> None:
    """Keep the compute stream at work, so that what does not wait for it, or is not waited for, comes out wrong."""
    if device.type == "cuda":
        torch.cuda._sleep(2_000_000)


def data(x: Tensor, fp8: bool) -> Any:
    if not fp8:
        return x
    scales = x[:, : HIDDEN // 128].float().abs() + 0.5
    return x.to(torch.float8_e4m3fn), scales.t().contiguous().t()  # column-major, as GEMMs like them


def bits(result: Any) -> list[Tensor]:
    """Tensors of a result in a form that can be compared exactly; read on the current stream."""
    if isinstance(result, Tensor):
        return [(result.view(torch.uint8) if result.dtype == torch.float8_e4m3fn else result).clone()]
    return [] if result is None else [part for item in result for part in bits(item)]


def compare(got: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.dtype == w.dtype and g.shape == w.shape and torch.equal(g.cpu(), w.cpu()), (
            f"result {i}: {g} is not {w}"
        )


def both(
    ranks: Ranks, cpu_group: dist.ProcessGroup, run: Callable[[dist.ProcessGroup, torch.device], list[Tensor]]
) -> None:
    got = run(ranks.group, ranks.device)
    torch.cuda.synchronize()
    compare(got, run(cpu_group, CPU))


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize("worst_case", [False, True])
@pytest.mark.parametrize(("asynchronous", "previous"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_buffer(
    ranks: Ranks,
    cpu_group: dist.ProcessGroup,
    fp8: bool,
    topk: bool,
    asynchronous: bool,
    previous: bool,
    worst_case: bool,
    chosen: tuple[torch.dtype, str | None] | None,
) -> None:
    """Two rounds on one buffer: a call of one kind may be followed by a call of any other."""

    def run(group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
        with defaults(chosen):
            buffer, results = Buffer(group, num_nvl_bytes=1024), []
            for seed, worst in ((0, worst_case), (1, not worst_case)):
                results += one_round(buffer, device, seed, worst)
            buffer.destroy()
        return results

    def one_round(buffer: Buffer, device: torch.device, seed: int, worst: bool) -> list[Tensor]:
        x, routes, weights = batch(ranks, device, seed)
        both_given = asynchronous and previous

        def order() -> dict[str, Any]:
            event = Buffer.capture() if previous else None
            return {"previous_event": event, "async_finish": asynchronous, "allocate_on_comm_stream": both_given}

        def arrived(event: EventOverlap) -> None:
            if asynchronous:
                event.current_stream_wait()

        busy(device)
        given = data(x * 1, fp8)  # made behind what keeps the stream busy
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            routes, LOCAL_EXPERTS * ranks.size, **order()
        )
        arrived(event)
        received, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            given,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=routes if topk else None,
            topk_weights=weights if topk else None,
            expert_alignment=8,
            num_worst_tokens=TOKENS * ranks.size if worst else 0,
            **order(),
        )
        arrived(event)
        assert handle is not None and (recv_idx is None) == (not topk)
        results = bits([recv_idx, handle[0], handle[3], handle[4], per_rank, per_expert])
        rows = int(handle[0][-1, ranks.rank])  # the host waits here, after the reads above were enqueued
        data_rows = [part[:rows] for part in (received if fp8 else (received,))]
        results += bits([*data_rows, None if recv_weights is None else recv_weights[:rows]])
        if worst:
            assert counts == []
        else:
            results.append(torch.tensor(counts, dtype=torch.int64, device=CPU))

        busy(device)
        again, *nothing, event = buffer.dispatch(data(x * 2, fp8), handle=handle, **order())
        arrived(event)
        assert nothing == [None] * 4
        results += bits([part[:rows] for part in (again if fp8 else (again,))])

        busy(device)
        back, back_weights, event = buffer.combine(
            (received[0] if fp8 else received).to(torch.bfloat16) * 3,
            handle,
            topk_weights=recv_weights,
            bias=x,
            **order(),
        )
        arrived(event)
        return results + bits([back, back_weights])

    both(ranks, cpu_group, run)


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize("host_sync", [True, False])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_elastic_buffer(
    ranks: Ranks,
    cpu_group: dist.ProcessGroup,
    fp8: bool,
    expand: bool,
    asynchronous: bool,
    host_sync: bool,
    chosen: tuple[torch.dtype, str | None] | None,
) -> None:
    def run(group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
        with defaults(chosen):
            buffer = ElasticBuffer(group, num_max_tokens_per_rank=TOKENS)
            x, routes, weights = batch(ranks, device)
            stats = torch.zeros(LOCAL_EXPERTS, dtype=torch.int64, device=device)

            def order() -> dict[str, Any]:
                event = ElasticBuffer.capture() if asynchronous else None
                return {"previous_event": event, "async_with_compute_stream": asynchronous}

            busy(device)
            received, recv_idx, recv_weights, handle, event = buffer.dispatch(
                data(x * 1, fp8),
                topk_idx=routes,
                topk_weights=weights,
                num_experts=LOCAL_EXPERTS * ranks.size,
                expert_alignment=8,
                cumulative_local_expert_recv_stats=stats,
                do_cpu_sync=host_sync,
                do_expand=expand,
                use_tma_aligned_col_major_sf=fp8,
                **order(),
            )
            event.current_stream_wait()
            results = bits(
                [
                    recv_idx,
                    stats,
                    handle.topk_idx,
                    handle.psum_num_recv_tokens_per_scaleup_rank,
                    handle.psum_num_recv_tokens_per_expert,
                    handle.num_unaligned_recv_tokens_per_expert,
                    handle.recv_src_metadata,
                ]
            )
            ends = handle.psum_num_recv_tokens_per_expert if expand else handle.psum_num_recv_tokens_per_scaleup_rank
            rows = int(ends[-1])
            results += bits([part[:rows] for part in (received if fp8 else (received,))])
            results += bits(recv_weights[:rows])
            busy(device)
            again, _, _, _, event = buffer.dispatch(data(x * 2, fp8), handle=handle, do_expand=expand, **order())
            event.current_stream_wait()
            results += bits([part[:rows] for part in (again if fp8 else (again,))])
            ones = torch.ones((len(received[0] if fp8 else received), HIDDEN), dtype=torch.bfloat16, device=device)
            back, _, event = buffer.combine(ones, handle, **order())
            event.current_stream_wait()
            results += bits(back)  # small integers: exact however they are summed
            buffer.destroy()
        return results

    both(ranks, cpu_group, run)


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize(
    "settings_given",
    [
        {},
        {"expert_alignment": 16},
        {"fp8_dispatch": True, "fp8_dispatch_grad": True},
        {"capacity_factor": 8.0, "max_tokens_per_rank": TOKENS},
    ],
)
def test_dispatcher(
    ranks: Ranks,
    cpu_group: dist.ProcessGroup,
    settings_given: dict[str, Any],
    overlapped: bool,
    chosen: tuple[torch.dtype, str | None] | None,
) -> None:
    config = DispatcherConfig(timeout_seconds=TIMEOUT_SECONDS, num_sms=ranks.num_sms, **settings_given)

    def run(group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
        with defaults(chosen):
            dispatcher = TokenDispatcher(group, LOCAL_EXPERTS * ranks.size, config, device=device)
            x, routes, weights = batch(ranks, device)
            x, weights = x.requires_grad_(), weights.requires_grad_()
            overlap = Overlap(dispatcher)
            busy(device)
            if overlapped:
                sent = overlap.begin_dispatch(x * 1, routes, weights).wait()
            else:
                sent = dispatcher.dispatch(x * 1, routes, weights)
            results = bits([sent.tokens_per_expert, sent.tokens_per_expert_host])
            used = int(sent.tokens_per_expert.sum())
            results += bits([sent.rows[:used].detach(), sent.weights[:used].detach()])
            if overlapped:
                out = overlap.begin_combine(sent.rows, sent, weights=sent.weights).wait()
            else:
                out = dispatcher.combine(sent.rows, sent, weights=sent.weights)
            out.float().sum().backward()
            assert x.grad is not None and weights.grad is not None
            dispatcher.backend.check()
            sums = [out.detach().float(), x.grad.float(), weights.grad]
        return [*results, *(t.cpu() for t in sums)]

    got, wanted = run(ranks.group, ranks.device), run(cpu_group, CPU)
    compare(got[:-3], wanted[:-3])
    for mine, expected in zip(got[-3:], wanted[-3:], strict=True):  # summed in another order
        torch.testing.assert_close(mine.cpu(), expected, rtol=2e-2, atol=2e-2)
