"""Cases of Buffer over gloo, written as a DeepEP 1.x program would be: through ``import deep_ep``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import deepep_moe.compat
from deepep_moe.errors import CapacityError, HandleError, InputError, RankMismatchError, UnsupportedError
from tests.distributed.cases_dispatcher import raises, random_batch
from tests.launch import case
from tests.reference import rank_rows

deepep_moe.compat.install()

from deep_ep import Buffer, EventOverlap, topk_idx_t  # noqa: E402
from deep_ep.utils import EventHandle  # noqa: E402

HIDDEN, TOPK, EXPERTS_PER_RANK = 16, 3, 2


class Batch:
    """The routing of all ranks, so that each can tell what it must receive."""

    def __init__(self, group: dist.ProcessGroup, seed: int = 0, tokens: int = 6, dtype: torch.dtype = torch.bfloat16):
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.experts = EXPERTS_PER_RANK * self.world
        sizes = [0 if r == 1 else tokens + r for r in range(self.world)]  # ragged, and one rank without tokens
        self.all = [
            random_batch(seed + r, n, HIDDEN, TOPK, self.experts, dtype, dropped=0.2) for r, n in enumerate(sizes)
        ]
        self.x, self.topk_idx, self.topk_weights = (t.detach() for t in self.all[self.rank])
        self.rows = rank_rows([b[1] for b in self.all], self.rank, EXPERTS_PER_RANK)

    def received_x(self) -> Tensor:
        return torch.stack([self.all[s][0][t] for s, t in self.rows]).detach() if self.rows else self.x[:0]

    def received_topk(self) -> tuple[Tensor, Tensor]:
        """Local experts and weights of each received row."""
        if not self.rows:
            return self.topk_idx[:0], self.topk_weights[:0]
        chosen = torch.stack([self.all[s][1][t] for s, t in self.rows])
        weights = torch.stack([self.all[s][2][t] for s, t in self.rows]).detach()
        here = chosen // EXPERTS_PER_RANK == self.rank
        return torch.where(here, chosen - self.rank * EXPERTS_PER_RANK, -1), torch.where(here, weights, 0.0)

    def times_its_ranks(self, handle: Any) -> Tensor:
        """What combining unchanged rows gives: each token once per rank that got it, summed in fp32."""
        return (handle[4].sum(1, keepdim=True) * self.x.float()).to(self.x.dtype)


def dispatch(buffer: Buffer, batch: Batch, **options: Any) -> Any:
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(batch.topk_idx, batch.experts)
    arguments: dict[str, Any] = {
        "x": batch.x,
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": batch.topk_idx,
        "topk_weights": batch.topk_weights,
    }
    return buffer.dispatch(**{**arguments, **options})


@case()
def layout_counts_destinations(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    for topk_idx in (batch.topk_idx, batch.topk_idx.int()):
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(topk_idx, batch.experts)
        event.current_stream_wait()
        owners = [{e // EXPERTS_PER_RANK for e in row if e >= 0} for row in topk_idx.tolist()]
        assert in_rank.tolist() == [[r in owner for r in range(batch.world)] for owner in owners]
        assert per_rank.tolist() == [sum(r in owner for owner in owners) for r in range(batch.world)]
        flat = topk_idx.flatten().tolist()
        assert per_expert.tolist() == [flat.count(e) for e in range(batch.experts)]
        assert per_node is None
        assert per_rank.dtype == per_expert.dtype == torch.int32


@case()
def dispatch_delivers_rows_in_source_order(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group, num_nvl_bytes=1 << 20), Batch(group)
    recv_x, recv_topk_idx, recv_weights, counts, handle, event = dispatch(buffer, batch, expert_alignment=4)
    assert isinstance(event, EventOverlap)
    experts, weights = batch.received_topk()
    assert torch.equal(recv_x, batch.received_x())
    assert torch.equal(recv_topk_idx, experts)
    assert torch.equal(recv_weights, weights)
    assert recv_topk_idx.dtype == topk_idx_t
    flat = experts.flatten().tolist()
    assert counts == [-(-flat.count(e) // 4) * 4 for e in range(EXPERTS_PER_RANK)]

    assert len(handle) == 6
    assert handle[3].tolist() == [token for _, token in batch.rows]
    prefix = handle[0]
    assert prefix.dtype == torch.int32
    assert prefix.shape == (batch.world, batch.world)
    sources = [source for source, _ in batch.rows]
    assert prefix[:, batch.rank].tolist() == [sum(s <= r for s in sources) for r in range(batch.world)]
    assert dispatch(buffer, batch, topk_idx=batch.topk_idx.int())[1].dtype == torch.int32


@case()
def combine_sums_rows_weights_and_biases(group: dist.ProcessGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        buffer, batch = Buffer(group), Batch(group, dtype=dtype)
        recv_x, _, recv_weights, _, handle, _ = dispatch(buffer, batch)
        copies = handle[4].sum(1, keepdim=True)  # ranks that got the token
        x = batch.x.float()
        added = torch.randn(x.shape).to(dtype)
        for bias, expected in (
            (None, copies * x),
            (added, copies * x + added.float()),
            ((added, added), copies * x + 2 * added.float()),
        ):
            out, weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights, bias=bias)
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
            assert torch.equal(weights, torch.where(batch.topk_idx >= 0, batch.topk_weights, 0.0))
        assert buffer.combine(recv_x, handle)[1] is None


@case()
def combine_accumulates_in_fp32_and_rounds_once_per_hop(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    recv_x, _, _, _, handle, _ = dispatch(buffer, batch)
    sent = recv_x * (1 + batch.rank)  # another value from every rank, rounded to bf16 as it travels
    out, _, _ = buffer.combine(sent, handle)
    total = torch.zeros(batch.x.shape)
    for rank in range(batch.world):
        total += handle[4][:, rank : rank + 1] * (batch.x * (1 + rank)).float()
    assert torch.equal(out, total.bfloat16())


@case()
def cached_dispatch_repeats_the_routing(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    recv_x, _, _, _, handle, _ = dispatch(buffer, batch)
    again = buffer.dispatch(batch.x * 2, handle=handle)
    assert torch.equal(again[0], recv_x * 2)
    assert again[1:5] == (None, None, None, None)
    other = Batch(group, seed=50)
    dispatch(buffer, other)  # a later dispatch does not disturb the handle
    assert torch.equal(buffer.dispatch(batch.x, handle=handle)[0], recv_x)
    assert torch.equal(buffer.combine(recv_x, handle)[0], batch.times_its_ranks(handle))


@case()
def fp8_rows_keep_their_scales(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    x = batch.x.float().to(torch.float8_e4m3fn)
    scales = torch.rand(2, x.shape[0]).t()  # column-major, as GEMMs like them
    (recv_x, recv_scales), _, _, _, handle, _ = dispatch(buffer, batch, x=(x, scales))
    assert torch.equal(recv_x.float(), batch.received_x().float().to(torch.float8_e4m3fn).float())
    names = torch.arange(x.shape[0], dtype=torch.int32).unsqueeze(1) + 100 * batch.rank
    (_, recv_names), *_ = buffer.dispatch((x, names), handle=handle)  # packed UE8M0 scales travel as int32
    assert recv_names.flatten().tolist() == [100 * source + token for source, token in batch.rows]
    assert recv_scales.shape == (len(batch.rows), 2)


@case()
def routing_without_expert_indices(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    recv_x, recv_topk_idx, recv_weights, counts, handle, _ = dispatch(buffer, batch, topk_idx=None, topk_weights=None)
    assert torch.equal(recv_x, batch.received_x())
    assert recv_topk_idx is None
    assert recv_weights is None
    flat = batch.received_topk()[0].flatten().tolist()
    assert counts == [flat.count(e) for e in range(EXPERTS_PER_RANK)]
    assert torch.equal(buffer.combine(recv_x, handle)[0], batch.times_its_ranks(handle))


@case()
def worst_case_mode_fixes_the_size(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    worst = 64
    recv_x, recv_topk_idx, _, counts, handle, _ = dispatch(buffer, batch, num_worst_tokens=worst)
    used = len(batch.rows)
    assert recv_x.shape == (worst, HIDDEN)
    assert counts == []
    assert torch.equal(recv_x[:used], batch.received_x())
    assert torch.equal(recv_topk_idx[:used], batch.received_topk()[0])
    assert (recv_topk_idx[used:] == -1).all()
    out, _, _ = buffer.combine(recv_x, handle)
    assert torch.equal(out, batch.times_its_ranks(handle))

    needs_more = [len(rank_rows([b[1] for b in batch.all], r, EXPERTS_PER_RANK)) > 1 for r in range(batch.world)]
    assert any(needs_more)
    with raises(CapacityError, "needs room for", "num_worst_tokens", "gives room for 1:"):
        dispatch(buffer, batch, num_worst_tokens=1)
    assert torch.equal(dispatch(buffer, batch)[0], batch.received_x())  # and it goes on


@case()
def events_and_options_are_accepted(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    previous = EventOverlap(EventHandle())
    options = {"previous_event": previous, "async_finish": True, "allocate_on_comm_stream": True}
    recv_x, _, _, _, handle, event = dispatch(buffer, batch, config=Buffer.get_dispatch_config(batch.world), **options)
    assert event.event is not None
    with event:
        pass
    out, _, event = buffer.combine(recv_x, handle, config=Buffer.get_combine_config(batch.world), **options)
    event.current_stream_wait()
    assert torch.equal(out, batch.times_its_ranks(handle))
    Buffer.capture().current_stream_wait()
    with raises(InputError, "allocate_on_comm_stream"):
        buffer.combine(recv_x, handle, allocate_on_comm_stream=True)
    with raises(UnsupportedError, "streams"):
        buffer.get_comm_stream()


@case()
def handles_belong_to_one_living_buffer(group: dist.ProcessGroup) -> None:
    buffer, other, batch = Buffer(group), Buffer(group), Batch(group)
    recv_x, _, _, _, handle, _ = dispatch(buffer, batch)
    with raises(HandleError, "another Buffer"):
        other.combine(recv_x, handle)
    with raises(HandleError, "tuple"):
        buffer.combine(recv_x, tuple(handle))
    buffer.destroy()
    buffer.destroy()
    for call in (lambda: buffer.combine(recv_x, handle), lambda: buffer.dispatch(batch.x, handle=handle)):
        with raises(HandleError, "destroyed"):
            call()
    dispatch(other, batch)


@case()
def wrong_arguments_are_named(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    recv_x, _, recv_weights, _, handle, _ = dispatch(buffer, batch)
    with raises(InputError, "is_token_in_rank", "get_dispatch_layout"):
        buffer.dispatch(batch.x, topk_idx=batch.topk_idx)
    with raises(InputError, "topk_weights", "needs topk_idx"):
        dispatch(buffer, batch, topk_idx=None)
    with raises(InputError, "handle", "neither"):
        buffer.dispatch(batch.x, handle=handle, topk_idx=batch.topk_idx)
    with raises(InputError, "topk_weights", "torch.float64"):
        dispatch(buffer, batch, topk_weights=batch.topk_weights.double())
    with raises(InputError, "x", "rows"):
        buffer.combine(torch.zeros(len(recv_x) + 1, HIDDEN), handle)
    with raises(InputError, "x", "float8"):
        buffer.combine(recv_x.float().to(torch.float8_e4m3fn), handle)
    with raises(InputError, "bias", "3 tensors"):
        buffer.combine(recv_x, handle, bias=(batch.x, batch.x, batch.x))
    with raises(InputError, "bias", "shape"):
        buffer.combine(recv_x, handle, bias=torch.zeros(1, 1, dtype=recv_x.dtype))
    with raises(InputError, "topk_weights", "shape"):
        buffer.combine(recv_x, handle, topk_weights=torch.zeros(len(recv_weights) + 1, TOPK))


@case(ranks=(2, 3))
def disagreeing_ranks_all_raise(group: dist.ProcessGroup) -> None:
    buffer, batch = Buffer(group), Batch(group)
    with raises(RankMismatchError, "expert alignment", "2 on rank 1"):
        dispatch(buffer, batch, expert_alignment=2 if batch.rank == 1 else 1)
    with raises(RankMismatchError, "scale columns"):
        x = batch.x.float().to(torch.float8_e4m3fn)
        dispatch(buffer, batch, x=(x, torch.ones(len(x), 1 + batch.rank % 2)))


@case(ranks=(1, 2))
def what_is_not_offered_is_said(group: dist.ProcessGroup) -> None:
    with raises(UnsupportedError, "MPI"):
        Buffer(None, comm=object())


@case(ranks=(1,))
def local_memory_is_a_view(group: dist.ProcessGroup) -> None:
    buffer = Buffer(group, num_nvl_bytes=64)
    whole = buffer.get_local_buffer_tensor(torch.uint8)
    part = buffer.get_local_buffer_tensor(torch.float32, torch.Size((2, 3)), offset=8)
    part.fill_(1.0)
    assert whole.numel() == 64
    assert whole.view(torch.float32).sum() == 6
    with raises(InputError, "offset", "65"):
        buffer.get_local_buffer_tensor(torch.uint8, offset=65)
    with raises(InputError, "offset", "multiple of 4"):
        buffer.get_local_buffer_tensor(torch.float32, offset=2)
    with raises(InputError, "size", "at most 16"):
        buffer.get_local_buffer_tensor(torch.float32, torch.Size((17,)))
    assert buffer.get_local_buffer_tensor(torch.float32, (4, 4)).shape == (4, 4)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "float32"}, "dtype = 'float32'"),
        ({"offset": "8"}, "offset = '8'"),
        ({"offset": -4}, "offset = -4"),
        ({"size": "4"}, "size = '4'"),
        ({"size": (-1, 4)}, "size = (-1, 4)"),
    ]
    for changed, told in wrong:
        with raises(InputError, told):
            buffer.get_local_buffer_tensor(**{"dtype": torch.float32, **changed})
