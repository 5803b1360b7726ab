"""Cases of ElasticBuffer over gloo: both layouts, cached dispatches, worst-case sizes, misuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from deepep_moe import ElasticBuffer
from deepep_moe.errors import HandleError, InputError, RankMismatchError
from tests.distributed.cases_buffer import EXPERTS_PER_RANK, HIDDEN, TOPK, Batch
from tests.distributed.cases_dispatcher import raises
from tests.launch import case
from tests.reference import expert_rows


def buffer_for(group: dist.ProcessGroup) -> ElasticBuffer:
    return ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN, num_topk=TOPK)


def dispatch(buffer: ElasticBuffer, batch: Batch, **options: Any) -> Any:
    arguments = {"topk_idx": batch.topk_idx, "topk_weights": batch.topk_weights, "num_experts": batch.experts}
    return buffer.dispatch(batch.x, **{**arguments, **options})


@case()
def expanded_rows_are_grouped_and_padded(group: dist.ProcessGroup) -> None:
    buffer, batch = buffer_for(group), Batch(group)
    for alignment in (1, 4):
        x, topk_idx, weights, handle, _ = dispatch(buffer, batch, do_expand=True, expert_alignment=alignment)
        groups = expert_rows([b[1] for b in batch.all], batch.rank, EXPERTS_PER_RANK, alignment)
        flat = [row for rows in groups for row in rows]
        assert topk_idx is None
        assert len(x) == len(weights) == handle.num_expanded_tokens == len(flat)
        for got, weight, row in zip(x, weights, flat, strict=True):
            if row is None:
                assert not got.any()
                assert weight == 0
            else:
                source, token, k = row
                assert torch.equal(got, batch.all[source][0][token])
                assert weight == batch.all[source][2][token, k]
        sizes = [len(rows) for rows in groups]
        assert handle.num_recv_tokens_per_expert_list == sizes
        assert handle.psum_num_recv_tokens_per_expert.tolist() == [sum(sizes[: i + 1]) for i in range(len(sizes))]
        real = [sum(row is not None for row in rows) for rows in groups]
        assert handle.num_unaligned_recv_tokens_per_expert.tolist() == real


@case()
def rows_in_rank_order_without_expand(group: dist.ProcessGroup) -> None:
    buffer, batch = buffer_for(group), Batch(group)
    stats = torch.ones(EXPERTS_PER_RANK, dtype=torch.int32)
    x, topk_idx, weights, handle, _ = dispatch(buffer, batch, cumulative_local_expert_recv_stats=stats)
    expected_idx, expected_weights = batch.received_topk()
    assert torch.equal(x, batch.received_x())
    assert torch.equal(topk_idx, expected_idx)
    assert torch.equal(weights, expected_weights)
    assert handle.num_recv_tokens == len(batch.rows)
    assert handle.recv_src_metadata.tolist() == [token for _, token in batch.rows]
    ends = [sum(source <= r for source, _ in batch.rows) for r in range(batch.world)]
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == ends
    assert (stats - 1).tolist() == handle.num_unaligned_recv_tokens_per_expert.tolist()


@case()
def combine_is_the_transpose_in_both_layouts(group: dist.ProcessGroup) -> None:
    buffer, batch = buffer_for(group), Batch(group, dtype=torch.float32)
    kept = batch.topk_idx >= 0
    for do_expand in (False, True):
        x, _, weights, handle, _ = dispatch(buffer, batch, do_expand=do_expand)
        ranks = (handle.dst_buffer_slot_idx >= 0).sum(1, keepdim=True)
        copies = kept.sum(1, keepdim=True) if do_expand else ranks
        out, carried, _ = buffer.combine(x, handle, topk_weights=weights, bias=batch.x)
        torch.testing.assert_close(out, batch.x * (copies + 1))
        assert torch.equal(carried, torch.where(kept, batch.topk_weights, 0.0))
        out, carried, _ = buffer.combine(x, handle)
        torch.testing.assert_close(out, batch.x * copies)
        assert carried is None


@case()
def cached_dispatches_repeat_the_order(group: dist.ProcessGroup) -> None:
    buffer, batch = buffer_for(group), Batch(group)
    x, _, weights, handle, _ = dispatch(buffer, batch, do_expand=True, expert_alignment=4)
    dispatch(buffer, Batch(group, seed=99), do_expand=True)  # another layer, in between
    again = buffer.dispatch(batch.x, topk_weights=batch.topk_weights, handle=handle, do_expand=handle.do_expand)
    assert torch.equal(again[0], x)
    assert torch.equal(again[2], weights)
    assert again[3] is handle
    assert torch.equal(handle.topk_idx, batch.topk_idx)
    in_rank_layout = buffer.dispatch(batch.x, handle=handle)
    assert torch.equal(in_rank_layout[0], batch.received_x())
    assert not in_rank_layout[3].do_expand


@case()
def without_a_host_sync_sizes_are_the_worst_case(group: dist.ProcessGroup) -> None:
    buffer, batch = buffer_for(group), Batch(group)
    topk_idx = torch.stack([torch.randperm(batch.experts)[:2] for _ in batch.x] or [torch.empty(0)]).long()
    topk_idx = topk_idx.view(len(batch.x), 2)
    options = {"topk_idx": topk_idx, "topk_weights": None, "do_expand": True}
    exact, _, _, _, _ = dispatch(buffer, batch, **options)
    x, _, _, handle, _ = dispatch(buffer, batch, do_cpu_sync=False, **options)
    assert len(x) == handle.num_expanded_tokens == batch.world * 16 * 2
    assert handle.num_recv_tokens == batch.world * 16
    assert handle.num_recv_tokens_per_expert_list == []
    assert torch.equal(x[: len(exact)], exact)
    assert not x[len(exact) :].any()
    assert torch.equal(buffer.combine(x, handle)[0], batch.x * 2)


@case()
def scales_can_come_column_major(group: dist.ProcessGroup) -> None:
    buffer, batch = buffer_for(group), Batch(group)
    x = (batch.x.float().to(torch.float8_e4m3fn), torch.rand(len(batch.x), 2))
    for do_expand in (False, True):
        options = {"topk_idx": batch.topk_idx, "num_experts": batch.experts, "do_expand": do_expand}
        (_, plain), *_ = buffer.dispatch(x, **options)
        (_, aligned), *_ = buffer.dispatch(x, use_tma_aligned_col_major_sf=True, **options)
        assert torch.equal(plain, aligned)
        assert aligned.stride(0) == 1
        assert aligned.stride(1) % 4 == 0


@case()
def misuse_is_named(group: dist.ProcessGroup) -> None:
    buffer, other, batch = buffer_for(group), buffer_for(group), Batch(group)
    x, _, _, handle, _ = dispatch(buffer, batch)
    with raises(InputError, "num_experts", "needed with topk_idx"):
        dispatch(buffer, batch, num_experts=None)
    with raises(InputError, "topk_idx", "either"):
        buffer.dispatch(batch.x)
    with raises(InputError, "topk_idx", "either"):
        dispatch(buffer, batch, handle=handle)
    with raises(HandleError, "another ElasticBuffer"):
        other.combine(x, handle)
    with raises(HandleError, "tuple"):
        buffer.combine(x, ())
    with raises(InputError, "num_max_tokens_per_rank"):
        dispatch(ElasticBuffer(group), batch, do_cpu_sync=False)
    buffer.barrier()
    buffer.destroy()
    with raises(HandleError, "destroyed"):
        buffer.combine(x, handle)
    assert buffer.num_bytes == ElasticBuffer.get_buffer_size_hint(group, 16, HIDDEN, TOPK) > 0


@case(ranks=(2,))
def a_barrier_beside_another_call_is_an_error(group: dist.ProcessGroup) -> None:
    buffer = buffer_for(group)
    batch = Batch(group)
    with raises(RankMismatchError, "call", "barrier", "plan"):
        if dist.get_rank(group) == 0:
            buffer.barrier()
        else:
            dispatch(buffer, batch)
    buffer.barrier()  # ranks that are in step again
