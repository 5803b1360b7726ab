"""Cases of the low-latency calls over gloo, through ``import deep_ep`` as inference engines use them."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import time
from typing import Any

import torch
import torch.distributed as dist

import deepep_moe.compat
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import DeepEPMoEError, HandleError, InputError, PeerError, RankMismatchError, UnsupportedError
from tests.distributed.cases_dispatcher import raises
from tests.launch import case
from tests.low_latency_util import FORMATS, Batch, Shape, check_combine, check_dispatch, combined, expert_outputs

deepep_moe.compat.install()

from deep_ep import Buffer  # noqa: E402

HIDDEN = 384  # three blocks of FP8: not a multiple of four


def small(group: dist.ProcessGroup, seed: int = 0, hidden: int = HIDDEN, topk: int = 3, room: int = 7) -> Batch:
    ranks = dist.get_world_size(group)
    tokens = tuple(0 if r == 1 else min(room, 4 + r) for r in range(ranks))  # ragged, and one rank without tokens
    return Batch(seed, Shape(room, hidden, topk, 3 * ranks, tokens), dropped=0.2)


def dispatch(buffer: Buffer, batch: Batch, **options: Any) -> Any:
    rank = buffer.rank
    arguments: dict[str, Any] = {
        "x": batch.x[rank],
        "topk_idx": batch.topk_idx[rank],
        "num_max_dispatch_tokens_per_rank": batch.shape.max_tokens,
        "num_experts": batch.shape.experts,
    }
    return buffer.low_latency_dispatch(**{**arguments, **options})


@case()
def every_combination_against_a_dense_reference(group: dist.ProcessGroup) -> None:
    buffer = Buffer(group, low_latency_mode=True)
    modes = ("plain", "async", "hook")
    rank = buffer.rank
    combinations = itertools.product(FORMATS, modes, modes, (False, True), (False, True), (False, True))
    for seed, (format, mode, back, zero_copy, given_out, dropped) in enumerate(combinations):
        batch = small(group, seed)
        where = f"{format} {mode} {back} zero_copy={zero_copy} out={given_out} dropped={dropped}, rank {rank}"
        options = {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}
        topk_idx = batch.topk_idx[rank]
        if seed % 2:
            batch.topk_idx = [t.int() for t in batch.topk_idx]
            topk_idx = batch.topk_idx[rank]
        result = dispatch(buffer, batch, **FORMATS[format], **options)
        event, hook = result[3:]
        assert (hook is not None) == (mode == "hook"), where
        if hook is not None:
            hook()
        event.current_stream_wait()
        check_dispatch(batch, rank, format, result)
        handle = result[2]
        into = buffer.get_next_low_latency_combine_buffer(handle) if zero_copy else None
        if into is not None:
            into.fill_(torch.nan)
        y = expert_outputs(batch, rank, format, result, into)
        if dropped:
            topk_idx = topk_idx.clone()
            topk_idx[:, 0] = -1
        out = torch.full_like(batch.x[rank], torch.nan) if given_out else None
        options = {"async_finish": back == "async", "return_recv_hook": back == "hook"}
        got, event, hook = buffer.low_latency_combine(
            torch.full_like(y, torch.nan) if zero_copy else y,
            topk_idx,
            batch.weights[rank],
            handle,
            use_logfmt=bool(seed % 3),
            zero_copy=zero_copy,
            out=out,
            **options,
        )
        if hook is not None:
            hook()
        event.current_stream_wait()
        assert out is None or got is out, where
        check_combine(got, combined(batch, rank, format, topk_idx), where)


@case()
def shapes_that_others_refuse(group: dist.ProcessGroup) -> None:
    buffer, ranks = Buffer(group), dist.get_world_size(group)
    for seed, (room, hidden, topk, experts, format) in enumerate(
        ((1, 8, 1, ranks, "bf16"), (5, 24, 12, 12 * ranks, "bf16"), (3, 128, 32, 33 * ranks, "fp8"))
    ):
        tokens = tuple((r + seed) % (room + 1) for r in range(ranks))
        batch = Batch(seed, Shape(room, hidden, topk, experts, tokens))
        result = dispatch(buffer, batch, **FORMATS[format])
        check_dispatch(batch, buffer.rank, format, result)
        y = expert_outputs(batch, buffer.rank, format, result)
        rank = buffer.rank
        out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
        check_combine(out, combined(batch, rank, format), f"shape {seed}")


@case()
def blocks_of_zeros_and_powers_of_two(group: dist.ProcessGroup) -> None:
    buffer = Buffer(group)
    batch = small(group)
    for r, x in enumerate(batch.x):
        x[:, :128] = 0
        x[:, 128:256] = 448 * 2.0**r
    for format in ("fp8", "rounded", "ue8m0"):
        check_dispatch(batch, buffer.rank, format, dispatch(buffer, batch, **FORMATS[format]))


@case()
def two_calls_in_flight(group: dist.ProcessGroup) -> None:
    buffer = Buffer(group)
    rank = buffer.rank
    batches = [small(group, seed) for seed in (1, 2)]
    results = [dispatch(buffer, batch, use_fp8=False, return_recv_hook=True) for batch in batches]
    with raises(HandleError, "return_recv_hook", "dispatch 1", "dispatch 3", "at most 2"):
        dispatch(buffer, batches[0])
    for batch, result in zip(batches, results):
        result[4]()
        check_dispatch(batch, rank, "bf16", result)
    with raises(HandleError, "hook of dispatch 1", "twice"):
        results[0][4]()
    buffers = [buffer.get_next_low_latency_combine_buffer(result[2]) for result in results]
    assert buffers[0].data_ptr() != buffers[1].data_ptr()
    sent = []
    for batch, result, into in zip(batches, results, buffers):
        expert_outputs(batch, rank, "bf16", result, into)
        sent.append(
            buffer.low_latency_combine(
                into, batch.topk_idx[rank], batch.weights[rank], result[2], zero_copy=True, return_recv_hook=True
            )
        )
    with raises(HandleError, "return_recv_hook", "combine 1"):
        buffer.low_latency_combine(buffers[0], batches[0].topk_idx[rank], batches[0].weights[rank], results[0][2])
    for batch, (out, _, hook) in zip(batches, sent):
        hook()
        check_combine(out, combined(batch, rank, "bf16"), "two in flight")
    # a handle may be combined again
    y = expert_outputs(batches[0], rank, "bf16", results[0])
    out, _, _ = buffer.low_latency_combine(y, batches[0].topk_idx[rank], batches[0].weights[rank], results[0][2])
    assert torch.equal(out, sent[0][0])


@case(ranks=(2, 3))
def a_third_call_in_flight_on_one_rank(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), small(group)
    rank, first, began = buffer.rank, buffer.rank == 0, time.monotonic()
    refused: Any = raises(HandleError if first else PeerError, "return_recv_hook", "1 was not called", "at most 2")
    results = [dispatch(buffer, batch, use_fp8=False, return_recv_hook=True) for _ in range(2)]
    if not first:
        results[0][4]()
    with refused:
        dispatch(buffer, batch)
    check_dispatch(batch, rank, "bf16", results[0])  # rank 0 has received it, to be able to refuse the third
    if first:
        results[0][4]()
    results[1][4]()
    check_dispatch(batch, rank, "bf16", results[1])
    for result in results:
        with raises(HandleError, "hook of dispatch", "twice"):
            result[4]()
    arguments = batch.topk_idx[rank], batch.weights[rank], results[0][2]
    y = expert_outputs(batch, rank, "bf16", results[0])
    sums = [buffer.low_latency_combine(y, *arguments, return_recv_hook=True) for _ in range(2)]
    if not first:
        sums[0][2]()
    with refused:
        buffer.low_latency_combine(y, *arguments, return_recv_hook=True)
    if first:
        sums[0][2]()
    sums[1][2]()
    for out, _, _ in sums:
        check_combine(out, combined(batch, rank, "bf16"), "two in flight")
    check_dispatch(batch, rank, "fp8", dispatch(buffer, batch))
    assert time.monotonic() - began < 10  # no rank has waited for its timeout


@case()
def statistics_add_up(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), small(group)
    stats = torch.ones(batch.shape.local_experts, dtype=torch.int32)
    waits = torch.zeros(batch.shape.ranks, dtype=torch.int64)
    total = stats.clone()
    for _ in range(3):
        result = dispatch(buffer, batch, cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waits)
        total += result[1]
    assert torch.equal(stats, total)


@case()
def normal_and_low_latency_calls_mix(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), small(group)
    rank = buffer.rank
    topk_idx = batch.topk_idx[rank]
    for _ in range(3):
        result = dispatch(buffer, batch, use_fp8=False)
        *_, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, batch.shape.experts)
        rows, *_, handle, _ = buffer.dispatch(
            batch.x[rank], is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx
        )
        buffer.clean_low_latency_buffer(batch.shape.max_tokens, HIDDEN, batch.shape.experts)
        back, _, _ = buffer.combine(rows, handle)
        assert torch.equal(back, (in_rank.sum(1, keepdim=True) * batch.x[rank].float()).bfloat16())
        check_dispatch(batch, rank, "bf16", result)


@case(ranks=(2, 3))
def masked_ranks_count_as_none(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group, enable_shrink=True), small(group)
    rank, last = buffer.rank, dist.get_world_size(group) - 1
    status = torch.full((last + 1,), 7, dtype=torch.int32)
    if rank != last:
        buffer.low_latency_update_mask_buffer(last, True)
    buffer.low_latency_query_mask_buffer(status)
    masked = {last} if rank != last else set()
    assert status.tolist() == [int(r in masked) for r in range(last + 1)]
    result = dispatch(buffer, batch, use_fp8=False)
    if rank != last:
        check_dispatch(batch, rank, "bf16", result, masked)
    y = expert_outputs(batch, rank, "bf16", result)
    if rank == last:
        y.zero_()  # it got less than it expects
    out, _, _ = buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])
    if rank != last:
        check_combine(out, combined(batch, rank, "bf16", masked=masked), "masked")
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any()
    check_dispatch(batch, rank, "bf16", dispatch(buffer, batch, use_fp8=False))
    with raises(InputError, f"rank_to_mask = {rank}"):
        buffer.low_latency_update_mask_buffer(rank, True)
    plain = Buffer(group)
    for call in (
        lambda: plain.low_latency_update_mask_buffer(0, True),
        lambda: plain.low_latency_query_mask_buffer(status),
        plain.low_latency_clean_mask_buffer,
    ):
        with raises(UnsupportedError, "enable_shrink"):
            call()


def unaligned(like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that does not begin where vectors of 16 bytes may."""
    return like.new_zeros(like.numel() + 1)[1:].view(like.shape)


@case()
def wrong_arguments_are_named_on_every_rank(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), small(group)
    rank, shape = buffer.rank, batch.shape
    first = rank == 0
    x, topk_idx = batch.x[rank], batch.topk_idx[rank]
    transposed = torch.zeros((HIDDEN, shape.tokens[0]), dtype=torch.bfloat16).t()
    twice = batch.topk_idx[0].clone()
    twice[2] = 1
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    wrong: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"num_max_dispatch_tokens_per_rank": 2}, ("x = 4 tokens", "num_max_dispatch_tokens_per_rank is 2")),
        ({"num_max_dispatch_tokens_per_rank": 0}, ("num_max_dispatch_tokens_per_rank = 0",)),
        ({"num_experts": shape.experts * 1000}, ("num_experts", str(shape.experts * 1000), "1024")),
        ({"x": transposed}, ("x = strides (1, 4)", "contiguous")),
        ({"x": x.float()}, ("x = torch.float32", "bfloat16")),
        ({"x": x[:, :192].contiguous()}, ("x = hidden size 192", "multiple of 128")),
        ({"x": x[:, :4].contiguous(), "use_fp8": False}, ("x = hidden size 4", "multiple of 8")),
        ({"topk_idx": torch.full_like(topk_idx, shape.experts)}, ("topk_idx", str(shape.experts))),
        ({"topk_idx": twice}, ("topk_idx = expert 1 twice for token 2",)),
        ({"use_ue8m0": True}, ("use_ue8m0", "round_scale")),
        ({"async_finish": True, "return_recv_hook": True}, ("async_finish", "return_recv_hook")),
        ({"cumulative_local_expert_recv_stats": topk_idx}, ("cumulative_local_expert_recv_stats", "shape")),
        ({"dispatch_wait_recv_cost_stats": topk_idx}, ("dispatch_wait_recv_cost_stats", "shape")),
        ({"x": torch.nested.nested_tensor([x.new_zeros(3)])}, ("x = a nested tensor", "dense")),
        ({"x": freed}, ("x = a tensor without memory", "freed storage")),
        ({"x": unaligned(x)}, ("x = a view that begins 1 elements", "multiple of 16 bytes")),
        ({"use_fp8": torch.zeros(2, dtype=torch.bool)}, ("use_fp8 = tensor", "True or False")),
        ({"return_recv_hook": torch.zeros(2, dtype=torch.bool)}, ("return_recv_hook = tensor", "True or False")),
    ]
    for options, told in wrong:
        with raises(InputError if first else PeerError, *told):
            dispatch(buffer, batch, **(options if first else {}))
    result = dispatch(buffer, batch, use_fp8=False)
    check_dispatch(batch, rank, "bf16", result)
    with raises(InputError if first else PeerError, "x = a tensor without memory", "vmap"):
        torch.func.vmap(lambda x: dispatch(buffer, batch, x=x)[1])(x[None]) if first else dispatch(buffer, batch)
    y, weights = expert_outputs(batch, rank, "bf16", result), batch.weights[rank]
    other = topk_idx.clone()
    if first:
        other[1] = (batch.topk_idx[0][1] + 1).clamp(max=shape.experts - 1)
    for changed, kind, told in (
        ({"x": y.float()}, InputError, ("x = torch.float32",)),
        ({"x": y.transpose(1, 2).contiguous().transpose(1, 2)}, InputError, ("x = strides", "contiguous")),
        ({"x": y[:, :3]}, InputError, ("x = shape",)),
        ({"x": unaligned(y)}, InputError, ("x = a view that begins 1 elements", "multiple of 16 bytes")),
        ({"out": unaligned(x)}, InputError, ("out = a view that begins 1 elements", "multiple of 16 bytes")),
        ({"topk_idx": topk_idx[:1]}, InputError, ("topk_idx = shape (1, 3)",)),
        ({"topk_idx": other}, InputError, ("topk_idx", "token 1", "went elsewhere")),
        ({"topk_weights": weights.double()}, InputError, ("topk_weights = torch.float64",)),
        ({"out": y[0]}, InputError, ("out = shape",)),
        ({"out": y.view(-1, HIDDEN)[1 : 1 + len(x)]}, InputError, ("out = a tensor in the memory of x",)),
        ({"zero_copy": True}, InputError, ("zero_copy", "get_next_low_latency_combine_buffer")),
        ({"zero_copy": torch.zeros(2, dtype=torch.bool)}, InputError, ("zero_copy = tensor", "True or False")),
        ({"handle": tuple(result[2])}, HandleError, ("handle is a tuple",)),
        ({"handle": dispatch(Buffer(group), batch)[2]}, HandleError, ("another Buffer",)),
    ):
        arguments = {"x": y, "topk_idx": topk_idx, "topk_weights": weights, "handle": result[2]}
        with raises(kind if first else PeerError, *told):
            buffer.low_latency_combine(**{**arguments, **(changed if first else {})})
    with raises(TypeError, "x_global_scale"):
        dispatch(buffer, batch, x_global_scale=1.0)
    with raises(InputError, "num_experts"):
        buffer.clean_low_latency_buffer(1, HIDDEN, 3 * shape.ranks + 1 if shape.ranks > 1 else 0)
    out, _, _ = buffer.low_latency_combine(y, topk_idx, weights, result[2])
    check_combine(out, combined(batch, rank, "bf16"), "after errors")


@case(ranks=(2, 3))
def ranks_that_differ_are_told(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), small(group)
    odd = buffer.rank == 1
    x = torch.zeros((0, 2 * HIDDEN), dtype=torch.bfloat16)
    for options, told in (
        ({"num_max_dispatch_tokens_per_rank": 9}, ("num_max_dispatch_tokens_per_rank", "9 on rank 1", "7 on rank 0")),
        ({"x": x}, ("hidden size", "768 on rank 1", "384 on rank 0")),
        ({"num_experts": 6 * batch.shape.ranks}, ("num_experts",)),
        ({"topk_idx": batch.topk_idx[1][:, :2].contiguous()}, ("top-k", "2 on rank 1")),
        ({"use_fp8": False}, ("use_fp8", "bf16 on rank 1", "fp8 on rank 0")),
    ):
        with raises(RankMismatchError, *told):
            dispatch(buffer, batch, **(options if odd else {}))
    check_dispatch(batch, buffer.rank, "fp8", dispatch(buffer, batch))


@case(ranks=(2, 3))
def ranks_that_combine_different_dispatches_are_told(group: dist.ProcessGroup) -> None:
    """Also if the routing of both is equal, so that all sizes are."""
    buffer = Buffer(group)
    rank = buffer.rank
    for seed in (1, 2):
        batches = [small(group, 1), small(group, seed)]
        results = [dispatch(buffer, batch, use_fp8=False) for batch in batches]
        pairs = list(zip(batches, results))

        def combine(batch: Batch, result: Any) -> torch.Tensor:
            y = expert_outputs(batch, rank, "bf16", result)
            return buffer.low_latency_combine(y, batch.topk_idx[rank], batch.weights[rank], result[2])[0]

        for pair in pairs if rank == 0 else pairs[::-1]:
            with raises(RankMismatchError, "handle (the number of its dispatch)", "on rank 0", "on rank 1"):
                combine(*pair)
        for batch, result in pairs:
            check_combine(combine(batch, result), combined(batch, rank, "bf16"), "after the errors")


@case(ranks=(2,))
def ranks_may_collect_decoders_at_different_times(group: dist.ProcessGroup) -> None:
    batch = small(group)
    rank, shape = dist.get_rank(group), batch.shape
    kept = []

    def decode() -> None:
        decoder = TokenDispatcher(group, shape.experts).decoder(shape.max_tokens)
        if rank == 1:
            kept.append(decoder)
        sent = decoder.dispatch(batch.x[rank], batch.topk_idx[rank])
        y = expert_outputs(batch, rank, "bf16", (sent.rows, sent.counts))
        check_combine(decoder.combine(y, sent, batch.weights[rank]), combined(batch, rank, "bf16"), "a decoder again")

    for _ in range(3):
        decode()
        gc.collect()


@case(ranks=(2,))
def indices_of_two_batches_in_one_tensor(group: dist.ProcessGroup) -> None:
    """Programs that capture graphs have one tensor for the indices of all their batches."""
    buffer, batches = Buffer(group), [small(group, seed) for seed in (1, 2)]
    rank = buffer.rank
    topk_idx = torch.empty_like(batches[0].topk_idx[rank])
    results = [
        dispatch(buffer, batch, use_fp8=False, topk_idx=topk_idx.copy_(batch.topk_idx[rank])) for batch in batches
    ]
    for batch, result in zip(batches, results):
        y = expert_outputs(batch, rank, "bf16", result)
        out, _, _ = buffer.low_latency_combine(y, topk_idx.copy_(batch.topk_idx[rank]), batch.weights[rank], result[2])
        check_combine(out, combined(batch, rank, "bf16"), "one tensor for all indices")


@case(ranks=(2,))
def tensors_of_inference_mode_and_with_gradients(group: dist.ProcessGroup) -> None:
    """Kernels write into any tensor, so the reference does too: a program behaves the same on CPUs."""
    buffer, batch = Buffer(group, enable_shrink=True), small(group)
    rank = buffer.rank
    with torch.inference_mode():
        stats = torch.zeros(batch.shape.local_experts, dtype=torch.int32)
        status = torch.ones(batch.shape.ranks, dtype=torch.int32)
        out = torch.empty_like(batch.x[rank])
        result = dispatch(buffer, batch, use_fp8=False, return_recv_hook=True, cumulative_local_expert_recv_stats=stats)
    result[4]()
    check_dispatch(batch, rank, "bf16", result)
    assert torch.equal(stats, result[1])
    y, weights = expert_outputs(batch, rank, "bf16", result), batch.weights[rank].clone().requires_grad_()
    for into in (out, torch.empty_like(batch.x[rank]).requires_grad_()):
        got, _, hook = buffer.low_latency_combine(
            y, batch.topk_idx[rank], weights, result[2], out=into, return_recv_hook=True
        )
        hook()
        assert got is into
        check_combine(got.detach(), combined(batch, rank, "bf16"), "out")
    with torch.inference_mode():
        buffer.low_latency_update_mask_buffer(1 - rank, True)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any()


@case()
def hooks_and_handles_out_of_order(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), small(group)
    rank = buffer.rank
    result = dispatch(buffer, batch, use_fp8=False, return_recv_hook=True)
    y = torch.zeros(result[0].shape, dtype=torch.bfloat16)
    arguments = (y, batch.topk_idx[rank], batch.weights[rank], result[2])
    with raises((HandleError, PeerError), "hook"):
        buffer.low_latency_combine(*arguments)
    with raises((HandleError, PeerError), "hook"):
        buffer.get_next_low_latency_combine_buffer(result[2])
    result[4]()
    buffer.low_latency_combine(*arguments)
    *_, late = dispatch(buffer, batch, return_recv_hook=True)
    *_, late_sum = buffer.low_latency_combine(*arguments, return_recv_hook=True)
    buffer.destroy()
    for hook in (late, late_sum):
        with raises(HandleError, "hook of", "destroyed"):
            hook()
    with raises(DeepEPMoEError, "destroyed"):
        dispatch(buffer, batch)


@case()
def a_dispatcher_decodes_between_training_steps(group: dist.ProcessGroup) -> None:
    batch = small(group)
    rank, shape = dist.get_rank(group), batch.shape
    dispatcher = TokenDispatcher(group, shape.experts)
    decoders = [dispatcher.decoder(shape.max_tokens, fp8=fp8) for fp8 in (False, True)]
    for wrong in (0, "8", None):
        with raises(InputError, f"max_tokens_per_rank = {wrong!r}" if wrong != 0 else "max_tokens_per_rank = 0"):
            dispatcher.decoder(wrong)  # type: ignore[arg-type]
    with raises(InputError, "max_tokens_per_rank = 40000: must be an integer from 1 to 32768"):
        dispatcher.decoder(40000)
    with raises(InputError, "fp8 = 'no': must be True or False"):
        dispatcher.decoder(8, fp8="no")  # type: ignore[arg-type]
    assert copy.deepcopy([decoders[0]])[0] is decoders[0]
    with raises(UnsupportedError, "a Decoder cannot be pickled"):
        pickle.dumps(decoders[0])
    other = TokenDispatcher(group, shape.experts).decoder(shape.max_tokens)  # its dispatcher is gone: same engine
    assert other._engine is decoders[0]._engine
    x, topk_idx, weights = batch.x[rank], batch.topk_idx[rank], batch.weights[rank]
    for decoder, format in zip(decoders, ("bf16", "fp8")):
        sent = decoder.dispatch(x, topk_idx)
        received = sent.rows if sent.scales is None else (sent.rows, sent.scales)
        check_dispatch(batch, rank, format, (received, sent.counts, sent.handle))
        y = expert_outputs(batch, rank, format, (received, sent.counts))
        trained = dispatcher.dispatch(x, topk_idx, weights)
        dispatcher.combine(trained.rows, trained, weights=trained.weights)
        check_combine(decoder.combine(y, sent, weights), combined(batch, rank, format), f"decoder {format}")
        with raises(InputError, "x = requires a gradient", "no_grad"):
            decoder.dispatch(x.clone().requires_grad_(), topk_idx)
        with raises(HandleError, "sent is a tuple"):
            decoder.combine(y, (), weights)  # type: ignore[arg-type]
        if shape.ranks < 2:
            continue
        wrong: list[tuple[tuple[Any, ...], type[DeepEPMoEError], str]] = [
            ((y, (), weights), HandleError, "sent is a tuple"),
            ((y, sent, None), InputError, "topk_weights = None"),
            ((y, sent, weights.to(torch.complex64)), InputError, "topk_weights = torch.complex64"),
            ((y[:, :1], sent, weights), InputError, "y = shape"),
            ((y, sent, weights.clone().requires_grad_()), InputError, "topk_weights = requires a gradient"),
        ]
        with raises(InputError if rank == 0 else PeerError, "x = requires a gradient"):
            decoder.dispatch(x.clone().requires_grad_(rank == 0), topk_idx)
        for changed, kind, told in wrong:  # on one rank: the others do not wait for it
            with raises(kind if rank == 0 else PeerError, told):
                decoder.combine(*(changed if rank == 0 else (y, sent, weights)))
        check_combine(decoder.combine(y, sent, weights), combined(batch, rank, format), f"decoder {format}, after")
        decoder.check()


@case(ranks=(2,))
def defaults_of_the_caller_change_nothing(group: dist.ProcessGroup) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        buffer, batch = Buffer(group), small(group)
        for format in FORMATS:
            result = dispatch(buffer, batch, **FORMATS[format])
            check_dispatch(batch, buffer.rank, format, result)
    finally:
        torch.set_default_dtype(torch.float32)


@case(ranks=(2,))
def compiled_programs_call_them_between_their_graphs(group: dist.ProcessGroup) -> None:
    """torch.compile does not trace into the calls: it would run their exchanges while it compiles."""
    buffer, batch = Buffer(group), small(group)
    rank = buffer.rank
    decoder = TokenDispatcher(group, batch.shape.experts).decoder(batch.shape.max_tokens)
    x, topk_idx, weights = batch.x[rank], batch.topk_idx[rank], batch.weights[rank]

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *result, hook = dispatch(buffer, batch, x=2 * x, use_fp8=False, return_recv_hook=True)
        hook()
        y = result[0].nan_to_num() * 0.5
        out, _, hook = buffer.low_latency_combine(y, topk_idx, weights, result[2], return_recv_hook=True)
        hook()
        sent = decoder.dispatch(2 * x, topk_idx)
        return out + 1, decoder.combine(sent.rows.nan_to_num() * 0.5, sent, weights) + 1

    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        for got, expected in zip(compiled(x), step(x)):
            assert torch.equal(got, expected)
    torch._dynamo.reset()
