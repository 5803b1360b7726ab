"""Cases of the hierarchical backend over gloo: one host cut into nodes, beside the collective backend."""

from __future__ import annotations

import gc
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep_moe import Buffer, DispatcherConfig, ElasticBuffer, TokenDispatcher, topology
from deepep_moe.backends import Backend, Layout, Plan, Wire, get_backend
from deepep_moe.backends.exchange import Exchange, as_bytes
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.backends.hierarchical_plan import Way
from deepep_moe.backends.rail import Blocks, TorchRail
from deepep_moe.elastic import EPHandle
from deepep_moe.errors import CapacityError, InputError, PeerError, RankMismatchError, UnsupportedError
from deepep_moe.events import EventOverlap, StreamRunner
from deepep_moe.fp8 import quantize_e4m3
from deepep_moe.overlap import Overlap
from tests.distributed.cases_dispatcher import (
    TOLERANCE,
    local_matrices,
    moe,
    raises,
    random_batch,
    together,
)
from tests.launch import case
from tests.reference import dense_moe

CPU = torch.device("cpu")
CUTS = {2: (1,), 3: (1,), 4: (2, 1), 6: (3,)}  # ranks per node, by ranks
PLAN_TENSORS = ("topk_idx", "send_slot", "counted", "received", "row_recv", "expert_counts_host")


def both(group: dist.ProcessGroup, cut: int, **options: Any) -> tuple[Backend, Backend]:
    """The collective and the hierarchical backend."""
    return (
        get_backend(group, CPU, DispatcherConfig(backend="collective", **options)),
        get_backend(group, CPU, DispatcherConfig(backend="hierarchical", ranks_per_node=cut, **options)),
    )


def assert_same_plan(got: Plan, wanted: Plan) -> None:
    for name in PLAN_TENSORS:
        mine, theirs = getattr(got, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype, name
            assert torch.equal(mine, theirs), f"{name}: {mine} instead of {theirs}"


def assert_bits(got: Tensor | None, wanted: Tensor | None, what: str) -> None:
    assert (got is None) == (wanted is None), what
    if got is not None and wanted is not None:
        assert got.dtype == wanted.dtype, what
        assert got.shape == wanted.shape, f"{what}: {got.shape} instead of {wanted.shape}"
        assert got.numel() == 0 or torch.equal(bits(got), bits(wanted)), f"{what}: {got} instead of {wanted}"


def bits(t: Tensor) -> Tensor:
    return as_bytes(t if t.dim() == 2 else t.unsqueeze(1))


def compare(reference: Backend, nodes: Backend, plans: tuple[Plan, Plan], x: Tensor, weights: Tensor | None) -> None:
    """Every way to move rows: bits of dispatch, sums of combine."""
    theirs, mine = plans
    assert_same_plan(mine, theirs)
    layouts = [Layout.BY_SOURCE] + [Layout.BY_EXPERT] * bool(theirs.num_topk)
    ways: list[dict[str, Any]] = [{}]
    if x.dtype == torch.bfloat16 and x.shape[1] % 128 == 0:
        ways += [{"wire": Wire.E4M3}, {"wire": Wire.E4M3_TO_BF16}]
    for layout in layouts:
        for some_weights in (None, weights) if weights is not None else (None,):
            for way in ways:
                sent = [
                    b.dispatch(p, x, layout=layout, weights=some_weights, **way)
                    for b, p in zip((reference, nodes), plans)
                ]
                for name, wanted, got in zip(("x", "scales", "weights"), *sent):
                    assert_bits(got, wanted, f"{name} in {layout} by {way}")
            if x.dtype == torch.bfloat16 and x.shape[1] % 128 == 0:
                rows, scales = quantize_e4m3(x)
                for given_scales in (scales, scales.view(torch.int32)):
                    sent = [
                        b.dispatch(p, rows, layout=layout, scales=given_scales, weights=some_weights)
                        for b, p in zip((reference, nodes), plans)
                    ]
                    for name, wanted, got in zip(("x", "scales", "weights"), *sent):
                        assert_bits(got, wanted, f"{name} of given FP8 in {layout}")
        rows = reference.dispatch(theirs, x, layout=layout, weights=weights)
        scaled = (rows.x.float() * (1 + reference.rank / 8)).to(x.dtype)
        rtol, atol = TOLERANCE[x.dtype]
        for carried, applied, biases in (
            (None, False, ()),
            (rows.weights, False, (x,)),
            (rows.weights, layout is Layout.BY_EXPERT, (x, x)),
        ):
            applied = applied and carried is not None
            summed = [
                b.combine(p, scaled, layout=layout, weights=carried, apply_weights=applied, bias=biases)
                for b, p in zip((reference, nodes), plans)
            ]
            torch.testing.assert_close(summed[1].x, summed[0].x, rtol=rtol, atol=atol)
            assert (summed[0].weights is None) == (summed[1].weights is None)
            if summed[0].weights is not None:
                torch.testing.assert_close(summed[1].weights, summed[0].weights)


def random_case(group: dist.ProcessGroup, cut: int, seed: int, chunk_bytes: int) -> None:
    """One random shape, sizes exact and fixed; the shape is shared by the ranks, tokens are their own."""
    reference, nodes = both(group, cut, rail_chunk_bytes=chunk_bytes)
    shared, own = (torch.Generator().manual_seed(s) for s in (seed, 1000 * seed + reference.rank))

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=shared))]

    experts = pick(1, 2, 5) * reference.world_size
    topk, alignment, hidden = pick(1, 2, 5), pick(1, 4, 16), pick(8, 128, 384)
    dtype = pick(torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)
    tokens = pick(0, 1, 7, 40)
    if pick(False, True):
        tokens = int(torch.randint(tokens + 1, (), generator=own))
    x, topk_idx, weights = random_batch(
        1000 * seed + reference.rank, tokens, hidden, topk, experts, dtype, dropped=pick(0, 0, 0.3, 1)
    )
    x, weights = x.detach() * 10 ** pick(-6, 0, 3), weights.detach()
    fixed = {"max_recv": 40 * reference.world_size + 3, "max_rows": 40 * topk * reference.world_size + 16 * 5}
    for limits in ({}, fixed):
        plans = tuple(b.plan(topk_idx, experts, alignment=alignment, **limits) for b in (reference, nodes))
        compare(reference, nodes, plans, x, weights)
    counts = reference.destinations(topk_idx, experts)
    by_ranks = [
        b.plan(
            None,
            experts,
            is_token_in_rank=counts.is_token_in_rank,
            num_tokens_per_expert=counts.num_tokens_per_expert,
        )
        for b in (reference, nodes)
    ]
    compare(reference, nodes, tuple(by_ranks), x, None)
    for name, wanted, got in zip(counts._fields, counts, nodes.destinations(topk_idx, experts)):
        if name != "num_tokens_per_node":
            assert torch.equal(got, wanted), name


def property_case(group: dist.ProcessGroup, cut: int) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(1, 10_000), chunk_bytes=st.sampled_from((0, 1, 900, 1 << 20)))
    def check(seed: int, chunk_bytes: int) -> None:
        together(group, lambda: random_case(group, cut, seed, chunk_bytes))

    check()


@case(ranks=(2,))
def a_plan_is_freed_with_its_last_reference(group: dist.ProcessGroup) -> None:
    """Its tables would otherwise take GPU memory until the next garbage collection."""
    _, nodes = both(group, 1)
    topk_idx, weights = torch.tensor([[0, 1], [1, 3]]), torch.ones(2, 2)
    plan = nodes.plan(topk_idx, 4)
    for layout in Layout:
        rows = nodes.dispatch(plan, torch.ones(2, 8), layout=layout, weights=weights)
        nodes.combine(plan, rows.x, layout=layout, weights=rows.weights)
    gone = weakref.ref(plan)
    gc.disable()
    try:
        del plan
        assert gone() is None
    finally:
        gc.enable()


@case(ranks=(2, 3, 4, 6))
def like_collective_on_random_shapes(group: dist.ProcessGroup) -> None:
    for cut in CUTS[dist.get_world_size(group)]:
        property_case(group, cut)


def config(cut: int, **options: Any) -> DispatcherConfig:
    return DispatcherConfig(backend="hierarchical", ranks_per_node=cut, **options)


@case(ranks=(4,))
def values_and_gradients_of_a_layer(group: dist.ProcessGroup) -> None:
    for chunk_bytes in (0, 64):
        dispatcher = TokenDispatcher(group, 8, config(2, expert_alignment=4, rail_chunk_bytes=chunk_bytes))
        x, topk_idx, weights = random_batch(dispatcher.rank, 5 * dispatcher.rank, 8, 3, 8, dropped=0.2)
        matrices, own = local_matrices(dispatcher, 8)
        out, expected = moe(dispatcher, x, topk_idx, weights, own), dense_moe(x, topk_idx, weights, matrices)
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(
            torch.autograd.grad(out.square().sum(), (x, weights)),
            torch.autograd.grad(expected.square().sum(), (x, weights)),
        ):
            torch.testing.assert_close(got, wanted)


@case(ranks=(4,))
def sums_are_rounded_once_per_hop_in_a_fixed_order(group: dist.ProcessGroup) -> None:
    """A rank's sum, the sum of a node over its ranks, the sum over nodes: each in fp32, then rounded."""
    nodes = get_backend(group, CPU, config(2))
    tokens, hidden = 9, 16
    x, topk_idx, _ = random_batch(7 + nodes.rank, tokens, hidden, 6, 8, torch.bfloat16, dropped=0.1)
    plan = nodes.plan(topk_idx, 8)
    rows = nodes.dispatch(plan, x.detach(), layout=Layout.BY_EXPERT).x
    factors = torch.tensor([1.37, 0.61, 2.43, 3.07])
    scaled = (rows.float() * factors[nodes.rank]).bfloat16()
    out = nodes.combine(plan, scaled, layout=Layout.BY_EXPERT).x
    expected = torch.zeros(tokens, hidden)
    for node in range(2):
        of_node = torch.zeros(tokens, hidden)
        for rank in (2 * node, 2 * node + 1):
            of_rank = torch.zeros(tokens, hidden)
            for route in topk_idx.t():
                here = (route // 2 == rank).unsqueeze(1)
                of_rank += here * (x.detach().float() * factors[rank]).bfloat16().float()
            of_node += of_rank.bfloat16().float()
        expected += of_node.bfloat16().float()
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(out, nodes.combine(plan, scaled, layout=Layout.BY_EXPERT).x)


@contextmanager
def hosts(group: dist.ProcessGroup, names: str) -> Iterator[None]:
    """Make each rank believe that it runs on the host of its letter."""
    mine = names[dist.get_rank(group)]
    with (
        mock.patch.object(topology, "host_id", return_value=mine),
        mock.patch("socket.gethostname", return_value=f"host-{mine}"),
    ):
        yield


@case(ranks=(4, 6))
def ranks_in_any_order_over_the_hosts(group: dist.ProcessGroup) -> None:
    orders = {4: ("abab", "abba", "aabb"), 6: ("abcabc", "abbaab", "abccba")}[dist.get_world_size(group)]
    for order in orders:
        fresh = dist.new_group()
        with hosts(fresh, order):
            reference, nodes = both(fresh, 0, rail_chunk_bytes=300)
        assert isinstance(nodes, HierarchicalBackend)
        for ranks in nodes.nodes.members:
            assert len({order[rank] for rank in ranks}) == 1
        assert nodes.nodes.count == len(set(order))
        experts = 2 * len(order)
        x, topk_idx, weights = random_batch(nodes.rank, 11, 128, 3, experts, torch.bfloat16)
        plans = tuple(b.plan(topk_idx, experts, alignment=4) for b in (reference, nodes))
        compare(reference, nodes, plans, x.detach(), weights.detach())


@case(ranks=(4,))
def groups_that_are_not_contiguous(group: dist.ProcessGroup) -> None:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    reference, nodes = both(mine, 1)
    x, topk_idx, weights = random_batch(dist.get_rank(), 11, 128, 2, 4, torch.bfloat16)
    compare(reference, nodes, tuple(b.plan(topk_idx, 4) for b in (reference, nodes)), x.detach(), weights.detach())


@case(ranks=(2, 3))
def one_node_is_a_node_too(group: dist.ProcessGroup) -> None:
    reference, nodes = both(group, 0)
    assert nodes.nodes.count == 1
    x, topk_idx, weights = random_batch(nodes.rank, 11, 128, 2, 6, torch.bfloat16)
    compare(reference, nodes, tuple(b.plan(topk_idx, 6) for b in (reference, nodes)), x.detach(), weights.detach())
    assert nodes.destinations(topk_idx, 6).num_tokens_per_node.tolist() == [11]


@case(ranks=(3, 4))
def nodes_of_unequal_size_are_refused_with_the_reason(group: dist.ProcessGroup) -> None:
    fresh = dist.new_group()
    with hosts(fresh, "aaba"[: dist.get_world_size(group)]):
        ranks = dist.get_world_size(group) - 1
        with raises(UnsupportedError, "hierarchical", f"host-a has {ranks}, host-b has 1", "start equally many"):
            get_backend(fresh, CPU, config(0))


@case(ranks=(2, 3, 4))
def settings_that_differ_are_errors_at_construction(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    with raises(RankMismatchError, "ranks_per_node", "2 on rank 1", "1 on rank 0"):
        get_backend(group, CPU, config(2 if rank == 1 else 1))
    with raises(RankMismatchError, "rail_chunk_bytes", "5 on rank 1", "7 on rank 0"):
        get_backend(group, CPU, config(1, rail_chunk_bytes=5 if rank == 1 else 7))


@case(ranks=(2, 4))
def buffer_knows_nodes(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    variables = {"DEEPEP_MOE_BACKEND": "hierarchical", "DEEPEP_MOE_RANKS_PER_NODE": str(world // 2)}
    with mock.patch.dict(os.environ, variables):
        buffer = Buffer(group)
    x, topk_idx, weights = (t.detach() for t in random_batch(buffer.rank, 9, 16, 3, 2 * world, dropped=0.2))
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2 * world)
    owners = [{expert // 2 // (world // 2) for expert in row if expert >= 0} for row in topk_idx.tolist()]
    assert per_node is not None and per_node.dtype == torch.int32
    assert per_node.tolist() == [sum(node in owner for owner in owners) for node in (0, 1)]
    sent = [
        call(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=weights,
        )
        for call in (buffer.dispatch, buffer.internode_dispatch)
    ]
    for one, other in zip(sent[0][:3], sent[1][:3]):
        assert torch.equal(one, other)
    recv_x, _, recv_weights, _, handle, _ = sent[1]
    assert handle[0].shape == (world, world)
    back, back_weights, _ = buffer.internode_combine(recv_x, handle, recv_weights, bias=x)
    torch.testing.assert_close(back, x * (in_rank.sum(1, keepdim=True) + 1))
    torch.testing.assert_close(back_weights, torch.where(topk_idx >= 0, weights, 0.0))


@case(ranks=(2,))
def plans_are_not_packed_to_record_streams(group: dist.ProcessGroup) -> None:
    """Calls on a communication stream record the tensors that a plan holds, not copies."""
    recorded: list[set[int]] = []

    def storages(tensors: Iterable[Tensor | None]) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}

    def run(self: Any, call: Any, *, reads: Any, made: Any, **options: Any) -> Any:
        result = call()
        recorded.append(storages([*reads, *made(result)]))
        return result, EventOverlap()

    def includes(plan: Plan) -> bool:
        held = (plan.topk_idx, plan.send_slot, plan.counted, plan.received, plan.row_recv)
        return storages(held) <= recorded.pop()

    x, topk_idx, weights = (t.detach() for t in random_batch(dist.get_rank(group), 9, 128, 2, 4))
    settings = {"DEEPEP_MOE_BACKEND": "hierarchical", "DEEPEP_MOE_RANKS_PER_NODE": "1"}
    with (
        mock.patch.object(StreamRunner, "run", run),
        mock.patch.object(Way, "pack", side_effect=AssertionError("the plan was packed")),
        mock.patch.dict(os.environ, settings),
    ):
        overlap = Overlap(TokenDispatcher(group, 4, device=CPU))
        for routing in (topk_idx, overlap.dispatcher.plan(topk_idx)):
            sent = overlap.begin_dispatch(x, routing, weights).wait()
            assert includes(sent.plan)
            overlap.begin_combine(sent.rows, sent).wait()

        elastic = ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=128, num_topk=2)
        handle: EPHandle | None = None
        for _ in range(2):  # the second repeats the routing
            routing = {"topk_idx": topk_idx, "topk_weights": weights} if handle is None else {}
            received, _, _, handle, _ = elastic.dispatch(x, num_experts=4, handle=handle, **routing)
            assert includes(handle.plan)
        elastic.combine(received, handle)
        assert includes(handle.plan)

        buffer = Buffer(group)
        _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
        buffer_handle = buffer.dispatch(
            x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=topk_idx, topk_weights=weights
        )[4]
        assert includes(buffer_handle.plan)


@case(ranks=(4,))
def rows_beyond_the_capacity_are_an_error_of_the_plan_on_all_ranks(group: dist.ProcessGroup) -> None:
    nodes = both(group, 2)[1]
    topk_idx = torch.zeros((13, 2), dtype=torch.int64)  # all to rank 0: 52 rows there, 104 of its first expert
    for limits, *told in (
        ({"max_recv": 51, "max_rows": 104}, "52 received tokens, but num_worst_tokens", "gives room for 51"),
        ({"max_recv": 52, "max_rows": 103}, "104 expert rows, but num_max_tokens_per_rank gives room for 103"),
    ):
        with raises(CapacityError, *told):
            nodes.plan(topk_idx, 8, **limits)
    nodes.plan(topk_idx, 8, max_recv=52, max_rows=104)


class EqualBlocks(TorchRail):
    """A transport that wants equal blocks, like one without the host; unused rows cross as garbage."""

    moves_unused_rows = False

    def buffers(self, send_rows: int, recv_rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        send, recv = super().buffers(send_rows, recv_rows, row_bytes)
        return send.fill_(255), recv.fill_(255)

    def start(self, phase: Any, sent: Tensor, received: Tensor, send: Blocks, recv: Blocks, *chunk: int) -> Any:
        assert send.used is not None and recv.used is not None
        for blocks in (send, recv):
            assert len({size for rank, size in enumerate(blocks.sizes) if rank != self.rank}) <= 1
            assert all(used <= size for used, size in zip(blocks.used.tolist(), blocks.sizes))
        return super().start(phase, sent, received, send, recv, *chunk)


def with_equal_blocks(nodes: HierarchicalBackend, cut: int) -> None:
    rail = EqualBlocks(nodes.rail.group, CPU, nodes.config)
    rail.rank = dist.get_rank(rail.group)
    nodes.rail = nodes._planner.rail = rail


@contextmanager
def host_waits() -> Iterator[list[Exchange]]:
    """The exchanges whose results the host reads."""
    waits: list[Exchange] = []

    def counted(read: Any) -> Any:
        return lambda self, phase, tensor: waits.append(self) or read(self, phase, tensor)

    with (
        mock.patch.object(Exchange, "to_host", counted(Exchange.to_host)),
        mock.patch.object(Exchange, "read", counted(Exchange.read)),
    ):
        yield waits


@case(ranks=(2, 4, 6))
def fixed_sizes_without_a_host_wait_are_the_same(group: dist.ProcessGroup) -> None:
    """And so are blocks of equal size, in plans of exact size too."""
    cut = CUTS[dist.get_world_size(group)][0]
    for chunk_bytes, hidden in ((1, 16), (700, 128)):  # eight chunks, and few with FP8
        reference, nodes = both(group, cut, rail_chunk_bytes=chunk_bytes, max_tokens_per_rank=23)
        assert isinstance(nodes, HierarchicalBackend)
        with_equal_blocks(nodes, cut)
        nodes._planner.defers = True
        with host_waits() as waits:
            for step, tokens in enumerate((23, 0, 23)):
                own = tokens if step == 2 else tokens * (1 + nodes.rank) // nodes.world_size
                experts = 2 * nodes.world_size
                x, topk_idx, weights = random_batch(
                    100 * step + nodes.rank, own, hidden, 3, experts, torch.bfloat16, dropped=0.2
                )
                limits = {"max_recv": 23 * nodes.world_size + 1, "max_rows": 69 * nodes.world_size + 30}
                waits.clear()
                mine = nodes.plan(topk_idx, experts, alignment=4, **limits)
                assert waits.count(nodes._exchange) == (2 if step == 0 else 0)
                theirs = reference.plan(topk_idx, experts, alignment=4, **limits)
                compare(reference, nodes, (theirs, mine), x.detach(), weights.detach())
            plans = tuple(b.plan(topk_idx, experts, alignment=4) for b in (reference, nodes))
            compare(reference, nodes, plans, x.detach(), weights.detach())


@case(ranks=(4,))
def a_plan_waits_for_the_host_once(group: dist.ProcessGroup) -> None:
    nodes = both(group, 2)[1]
    assert isinstance(nodes, HierarchicalBackend)
    nodes._planner.agrees_first = False  # as on GPUs
    topk_idx = torch.arange(16, dtype=torch.int64).view(8, 2) % 8
    nodes.plan(topk_idx, 8)
    for fixed in ({}, {"max_recv": 40, "max_rows": 80}):
        with host_waits() as waits:
            nodes.plan(topk_idx, 8, **fixed)
        assert len([one for one in waits if one.group is not nodes.engine.group]) == 1


@case(ranks=(3, 4))
def messages_grow_with_the_batch_of_any_rank_and_stay_as_large(group: dist.ProcessGroup) -> None:
    """Exchanges of a plan: another one where experts change, and where routes need more room."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    reference, nodes = both(group, 1 if ranks == 3 else 2)
    assert isinstance(nodes, HierarchicalBackend)
    nodes._planner.agrees_first = False  # as on GPUs
    for tokens, local, topk, exchanges in (
        (4, 2, 1, 2),
        (4, 2, 1, 1),
        (2500, 2, 1, 2),
        (2600, 2, 1, 1),
        (900, 2, 3, 1),
        (4, 3, 1, 2),
        (2, 2, 1, 2),
    ):
        topk_idx = torch.full((tokens if rank == ranks - 1 else 1, topk), (ranks - 1) * local)
        wanted = reference.plan(topk_idx, ranks * local)
        with mock.patch.object(Exchange, "transfer", autospec=True, side_effect=Exchange.transfer) as transfer:
            plan = nodes.plan(topk_idx, ranks * local)
        assert_same_plan(plan, wanted)
        of_all = [call for call in transfer.call_args_list if call.args[0].group is group]
        assert len(of_all) == exchanges, (tokens, local, topk, len(of_all))


@case(ranks=(4,))
def a_call_that_differs_from_a_plan_without_a_host_wait_is_named_by_the_next_plan(group: dist.ProcessGroup) -> None:
    nodes = both(group, 2, max_tokens_per_rank=4)[1]
    nodes._planner.defers = True
    good, limits = torch.arange(8, dtype=torch.int64).view(4, 2), {"max_recv": 16, "max_rows": 64}
    nodes.plan(good, 8, **limits)
    other = nodes.rank == 3
    with raises(RankMismatchError, "calls before the plan differs between the ranks", "7 on rank 3"):
        nodes._history = 7 * other
        nodes.plan(good, 8, **limits)
        nodes.plan(good, 8, **limits)


@case(ranks=(4,))
def a_rank_that_refuses_a_plan_raises_at_once_where_the_others_make_it_without_a_host_wait(
    group: dist.ProcessGroup,
) -> None:
    topk_idx, fixed = torch.arange(8, dtype=torch.int64).view(4, 2), {"max_recv": 16, "max_rows": 64}

    def refuse(nodes: Backend) -> None:
        nodes.refuse("plan", InputError("x", 1, "a check of a layer above"))

    wrong: tuple[tuple[str, Callable[[Backend], Any]], ...] = (
        ("alignment = 0", lambda nodes: nodes.plan(topk_idx, 8, alignment=0, **fixed)),
        ("num_experts = [8]", lambda nodes: nodes.plan(topk_idx, [8], **fixed)),  # type: ignore[arg-type]
        ("a check of a layer above", refuse),
    )
    for told, call in wrong:
        nodes = get_backend(dist.new_group(), CPU, config(2, max_tokens_per_rank=4, timeout_seconds=20))
        assert isinstance(nodes, HierarchicalBackend)
        nodes._planner.defers, nodes._planner.agrees_first = True, False
        nodes.plan(topk_idx, 8, **fixed)
        began = time.monotonic()
        if nodes.rank == 3:
            with raises(InputError, told):
                call(nodes)
        else:
            with raises(PeerError, "rank 3 broke off plan", told):
                nodes.plan(topk_idx, 8, **fixed)
                nodes.plan(topk_idx, 8, **fixed)
        assert time.monotonic() - began < 10


@case(ranks=(4,))
def what_a_plan_without_a_host_wait_finds_out_is_raised_by_the_next(group: dist.ProcessGroup) -> None:
    nodes = both(group, 2, max_tokens_per_rank=16)[1]
    nodes._planner.defers = True
    good = torch.arange(26, dtype=torch.int64).view(13, 2) % 8
    limits = {"max_recv": 51, "max_rows": 103}
    for topk_idx, told in (
        (torch.zeros((13, 2), dtype=torch.int64), "52 received tokens, but num_worst_tokens"),
        (good, None),
    ):
        nodes.plan(good, 8, **limits)
        plan = nodes.plan(topk_idx, 8, **limits)
        rows = nodes.dispatch(plan, torch.ones(13, 8), layout=Layout.BY_EXPERT).x
        out = nodes.combine(plan, rows, layout=Layout.BY_EXPERT).x
        assert bool(out.isnan().all()) == (told is not None)
        if told is not None:
            with raises(CapacityError, "rank 0", told):
                nodes.plan(good, 8, **limits)
        nodes.check()


@case(ranks=(2, 4))
def auto_says_why_it_takes_collective(group: dist.ProcessGroup) -> None:
    with mock.patch("deepep_moe.backends._log.info") as log:
        backend = get_backend(group, CPU, DispatcherConfig(ranks_per_node=1, num_sms=9))
    assert backend.name == "collective"
    assert "on a CPU collective is the reference" in log.call_args.args[-1]


@case(ranks=(4,))
def a_mistake_of_one_rank_reaches_every_node(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 8, config(2))
    x, topk_idx, weights = random_batch(dispatcher.rank, 6, 8, 2, 8)
    wrong = dispatcher.rank == 3
    with raises(InputError if wrong else PeerError, "topk_idx", "must be -1 (dropped) or 0 to 7"):
        dispatcher.dispatch(x, topk_idx + 8 if wrong else topk_idx, weights)
    for far in (-(2**63), 2**63 - 1):
        outside = torch.full_like(topk_idx, far) if wrong else topk_idx
        with raises(InputError if wrong else PeerError, f"topk_idx = {far}"[:-3], "must be -1 (dropped) or 0 to 7"):
            dispatcher.dispatch(x, outside, weights)
    with raises(RankMismatchError, "hidden size", "4 on rank 3", "8 on rank 0, 1, 2"):
        dispatcher.dispatch(x[:, :4] if wrong else x, topk_idx, weights)
    dispatched = dispatcher.dispatch(x, topk_idx, weights)
    with raises(InputError if wrong else PeerError, "rows = shape (1", "must have"):
        dispatcher.combine(dispatched.rows[1:] if wrong else dispatched.rows, dispatched)
    dispatcher.combine(dispatched.rows, dispatched)


@case(ranks=(2, 3))
def ranks_in_calls_of_different_backends_of_one_group_are_told(group: dist.ProcessGroup) -> None:
    """gloo ends the process where ranks send messages of different sizes."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    collective, nodes = both(group, 1)
    one_node = get_backend(group, CPU, config(ranks))
    wide = get_backend(group, CPU, config(1, num_sms=9))
    buffer = Buffer(group, low_latency_mode=True)
    topk_idx = torch.arange(ranks, dtype=torch.int64).repeat(3, 1)
    x, backends = torch.ones((3, 128), dtype=torch.bfloat16), (collective, nodes, one_node)
    kept = [backend.plan(topk_idx, ranks) for backend in backends]
    wide.plan(topk_idx, 2 * ranks)
    calls: list[Callable[[], Any]] = [
        *(lambda backend=backend: backend.plan(topk_idx, ranks) for backend in backends),
        lambda: wide.plan(topk_idx, 2 * ranks),
        *(lambda b=b, p=p: b.dispatch(p, x, layout=Layout.BY_SOURCE) for b, p in zip(backends, kept)),
        lambda: buffer.low_latency_dispatch(x, topk_idx, 8, ranks, use_fp8=False),
        lambda: get_backend(group, CPU, config(1, num_sms=7)),
        nodes.barrier,
    ]
    for i, j in itertools.combinations(range(len(calls)), 2):
        with raises(RankMismatchError, "differs between the ranks of the group", "on rank 0"):
            calls[i if rank == 0 else j]()
    for backend, plan in zip(backends, kept):
        assert torch.equal(backend.dispatch(plan, x, layout=Layout.BY_SOURCE).x, x.repeat(ranks, 1))


@case(ranks=(2,))
def ranks_that_compare_other_values_are_told(group: dist.ProcessGroup) -> None:
    """Values that only one rank has are a difference, also where all that both have are equal."""
    first = dist.get_rank(group) == 0
    exchange = Exchange(group, CPU, 30)
    told = "number of values compared differs between the ranks of the group: 1 on rank 0; 2 on rank 1"
    with raises(RankMismatchError, told, "calls of different backends"), exchange.agreement("plan") as agreement:
        agreement.facts = {"one": 1} if first else {"one": 1, "other": 2}
