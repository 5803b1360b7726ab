"""Cases of mistakes on one rank: all ranks raise, by name, long before anybody's timeout."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from deepep_moe import Buffer, Dispatched, DispatcherConfig, ElasticBuffer, TokenDispatcher
from deepep_moe.backends import Layout
from deepep_moe.errors import (
    CapacityError,
    DeepEPMoEError,
    HandleError,
    InputError,
    PeerError,
    RankMismatchError,
    UnsupportedError,
)
from deepep_moe.overlap import Overlap
from tests.distributed.cases_buffer import Batch
from tests.distributed.cases_dispatcher import raises, random_batch
from tests.launch import case

AT_ONCE = 10.0  # seconds; timeouts here are 60
CONFIG = DispatcherConfig(timeout_seconds=60)


def one_errs(
    group: dist.ProcessGroup, right: Callable[[], Any], wrong: Callable[[], Any], kind: type[Exception], *told: str
) -> None:
    """The last rank makes the wrong call, the others the right one, and all are told in no time."""
    last = dist.get_world_size(group) - 1
    began = time.monotonic()
    if dist.get_rank(group) == last:
        with raises(kind, *told):
            wrong()
    else:
        with raises(PeerError, f"refused by another rank of the group: rank {last}", *told):
            right()
    assert time.monotonic() - began < AT_ONCE


def strange(group: dist.ProcessGroup, like: Tensor) -> list[tuple[Any, str]]:
    """What is no plain tensor, and what the error says of it."""
    mesh = DeviceMesh.from_group(group, "cpu")
    return [
        (None, "None: must be a torch.Tensor"),
        (like.tolist(), "a list: must be a torch.Tensor"),
        (np.zeros(tuple(like.shape)), "a ndarray: must be a torch.Tensor"),
        (like.detach().to_sparse(), "a tensor of layout torch.sparse_coo: must be dense"),
        (torch.nested.nested_tensor([like.detach()]), "a nested tensor: must be dense"),
        (DTensor.from_local(like.detach(), mesh, [Replicate()]), "a DTensor: must be a plain tensor"),
        (torch._neg_view(like.detach()), "a view with the negative bit: must be a plain tensor"),
        *((part, "a tensor without memory: must not have freed storage") for part in freed(like.detach())),
    ]


def freed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in one storage without memory, as FSDP and activation offloading leave them behind."""
    first, second = torch.stack([tensor, tensor]).unbind()
    first.untyped_storage().resize_(0)
    return first, second


@case(ranks=(1, 2, 3))
def strange_tensors_given_to_the_dispatcher(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), CONFIG)
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    sent = dispatcher.dispatch(x, topk_idx, weights)

    def dispatch(**other: Any) -> Any:
        given = {"x": x, "topk_idx": topk_idx, "topk_weights": weights, **other}
        return dispatcher.dispatch(*given.values())

    def combine(**other: Any) -> Any:
        given = {"rows": sent.rows, "weights": sent.weights, **other}
        return dispatcher.combine(given["rows"], sent, weights=given["weights"])

    for call, arguments in (
        (dispatch, {"x": x, "topk_idx": topk_idx, "topk_weights": weights}),
        (combine, {"rows": x}),
    ):
        for name, like in arguments.items():
            for value, told in strange(group, like):
                if value is not None or name != "topk_weights":
                    one_errs(group, call, lambda: call(**{name: value}), InputError, f"{name} = {told}")  # noqa: B023
    for value, told in strange(group, topk_idx):
        one_errs(group, lambda: dispatcher.plan(topk_idx), lambda: dispatcher.plan(value), InputError, told)  # noqa: B023
    one_errs(group, dispatch, lambda: dispatch(topk_weights=topk_idx), InputError, "topk_weights", "floating point")
    torch.testing.assert_close(dispatcher.combine(sent.rows, sent), 2 * x)  # and the group goes on


@case(ranks=(1, 2, 3))
def plans_and_results_of_others(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    dispatcher, wide = TokenDispatcher(group, 2 * world, CONFIG), TokenDispatcher(group, 4 * world, CONFIG)
    padded = TokenDispatcher(group, 2 * world, replace(CONFIG, expert_alignment=4))
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, 2 * world)
    plan, sent = dispatcher.plan(topk_idx), dispatcher.dispatch(x, topk_idx, weights)
    for made, told in (
        (wide.plan(topk_idx), f"made for {4 * world} experts with rows aligned to 1"),
        (padded.plan(topk_idx), "aligned to 4"),
        (dispatcher.backend.plan(topk_idx, 2 * world, alignment=8), "aligned to 8"),
    ):
        one_errs(
            group,
            lambda: dispatcher.dispatch(x, plan, weights),
            lambda: dispatcher.dispatch(x, made, weights),  # noqa: B023
            HandleError,
            told,
        )
    other = TokenDispatcher(group, 2 * world, replace(CONFIG, num_sms=9))
    foreign = other.dispatch(x, topk_idx, weights)
    for value, told in (
        (None, "dispatched is None"),
        (sent.rows, "dispatched is a Tensor"),
        (foreign, "another group or configuration"),
        (Dispatched(sent.rows, None, foreign.plan), "another group or configuration"),
        (Dispatched(sent.rows, None, None), "plan is None"),
    ):
        one_errs(
            group,
            lambda: dispatcher.combine(sent.rows, sent),
            lambda: dispatcher.combine(sent.rows, value),  # noqa: B023
            HandleError,
            told,
        )
    torch.testing.assert_close(dispatcher.combine(sent.rows, sent), 2 * x)


@case(ranks=(1, 2))
def a_layer_above_can_refuse_as_well(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), CONFIG)
    x, topk_idx, _ = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    sent = dispatcher.dispatch(x, topk_idx)
    for phase, right in (
        ("plan", lambda: dispatcher.dispatch(x, topk_idx)),
        ("combine", lambda: dispatcher.combine(sent.rows, sent)),
    ):
        error = ValueError("max_tokens_per_rank is 4")
        one_errs(group, right, lambda: dispatcher.refuse(phase, error), ValueError, "max_tokens_per_rank is 4")  # noqa: B023


@case(ranks=(1, 2, 3))
def mistakes_in_calls_of_a_buffer(group: dist.ProcessGroup) -> None:
    buffer, other, batch = Buffer(group), Buffer(group), Batch(group)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(batch.topk_idx, batch.experts)
    fixed = {"is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert, "topk_idx": batch.topk_idx}

    def dispatch(**given: Any) -> Any:
        return buffer.dispatch(**{"x": batch.x, **fixed, **given})

    recv_x, *_, handle, _ = dispatch()
    *_, foreign, _ = other.dispatch(batch.x, **fixed)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": None}, InputError, "x = None"),
        ({"x": (batch.x,)}, InputError, "x = 1 values"),
        ({"x": (batch.x, None)}, InputError, "x[1] = None"),
        ({"is_token_in_rank": None}, InputError, "get_dispatch_layout"),
        ({"is_token_in_rank": [True]}, InputError, "is_token_in_rank = a list"),
        ({"num_tokens_per_expert": per_expert.tolist()}, InputError, "num_tokens_per_expert = a list"),
        ({"num_tokens_per_expert": per_expert.sum()}, InputError, "num_tokens_per_expert = shape ()"),
        ({"topk_idx": None, "topk_weights": batch.topk_weights}, InputError, "needs topk_idx"),
        ({"topk_idx": batch.topk_idx.tolist()}, InputError, "topk_idx = a list"),
        ({"is_token_in_rank": in_rank.int()}, InputError, "is_token_in_rank = torch.int32: must be torch.bool"),
        ({"num_tokens_per_expert": per_expert + 1}, InputError, "num_tokens_per_expert[0] = "),
        ({"num_tokens_per_rank": per_rank + 1}, InputError, "num_tokens_per_rank[0] = "),
        ({"num_tokens_per_rank": per_rank[1:]}, InputError, "num_tokens_per_rank = shape"),
        ({"num_worst_tokens": -5}, InputError, "num_worst_tokens = -5: must be an integer from 0"),
        ({"num_worst_tokens": 2**40}, InputError, f"num_worst_tokens = {2**40}"),
        ({"num_worst_tokens": 1.5}, InputError, "num_worst_tokens = 1.5: must be an integer"),
        ({"expert_alignment": None}, InputError, "expert_alignment = None: must be an integer"),
        ({"expert_alignment": 0}, InputError, "expert_alignment = 0"),
        ({"previous_event": 3}, InputError, "previous_event = a int"),
        ({"allocate_on_comm_stream": True}, InputError, "allocate_on_comm_stream"),
    ]
    if len(batch.all[-1][0]):
        wrong.append(({"is_token_in_rank": ~in_rank}, InputError, " by topk_idx; pass what get_dispatch_layout"))
    for given, kind, told in wrong:
        one_errs(group, dispatch, lambda: dispatch(**given), kind, told)  # noqa: B023

    def cached(handle: Any = handle, x: Any = batch.x, **given: Any) -> Any:
        return buffer.dispatch(x, handle=handle, **given)

    def combine(handle: Any = handle, x: Any = recv_x, **given: Any) -> Any:
        return buffer.combine(x, handle, **given)

    for call in (cached, combine):
        for given, kind, told in (
            ({"handle": foreign}, HandleError, "made by another Buffer"),
            ({"handle": tuple(handle)}, HandleError, "handle is a tuple"),
            ({"x": None}, InputError, "x = None"),
            ({"previous_event": "now"}, InputError, "previous_event = a str"),
        ):
            one_errs(group, call, lambda: call(**given), kind, told)  # noqa: B023
    one_errs(group, cached, lambda: cached(topk_idx=batch.topk_idx), InputError, "neither topk_idx nor topk_weights")
    one_errs(group, combine, lambda: combine(handle=None), HandleError, "handle is None")
    one_errs(group, combine, lambda: combine(bias=5), InputError, "bias = a int")
    one_errs(group, combine, lambda: combine(bias=(batch.x, None)), InputError, "bias = None")
    one_errs(group, combine, lambda: combine(topk_weights=[1.0]), InputError, "topk_weights = a list")
    assert torch.equal(combine()[0], batch.times_its_ranks(handle))


@case(ranks=(1, 2, 3))
def mistakes_in_calls_of_an_elastic_buffer(group: dist.ProcessGroup) -> None:
    buffer, other, batch = ElasticBuffer(group), ElasticBuffer(group), Batch(group)

    def dispatch(**given: Any) -> Any:
        return buffer.dispatch(**{"x": batch.x, "topk_idx": batch.topk_idx, "num_experts": batch.experts, **given})

    x, _, _, handle, _ = dispatch()
    foreign = other.dispatch(batch.x, batch.topk_idx, num_experts=batch.experts)[3]
    local = batch.experts // buffer.num_ranks
    nine = {"x": batch.x.new_zeros(9, batch.x.shape[1]), "topk_idx": batch.topk_idx.new_zeros(9, 1)}
    too_many = [{**nine, "num_max_tokens_per_rank": 8, "do_cpu_sync": sync} for sync in (None, True, False)]
    for given, kind, told in (
        ({"x": None}, InputError, "x = None"),
        ({"topk_idx": None}, InputError, "give either topk_idx or handle"),
        ({"topk_idx": [[0]]}, InputError, "topk_idx = a list"),
        ({"num_experts": None}, InputError, "num_experts = None"),
        ({"num_experts": 1.0}, InputError, "num_experts = 1.0: must be an integer"),
        ({"expert_alignment": -1}, InputError, "expert_alignment = -1"),
        ({"num_max_tokens_per_rank": -1}, InputError, "num_max_tokens_per_rank = -1"),
        ({"do_cpu_sync": False}, InputError, "num_max_tokens_per_rank = 0: must be an integer from 1"),
        *((more, InputError, "x = 9 tokens: num_max_tokens_per_rank is 8") for more in too_many),
        ({"cumulative_local_expert_recv_stats": torch.zeros(9)}, InputError, "cumulative_local_expert_recv_stats"),
        *(
            ({"cumulative_local_expert_recv_stats": stats}, InputError, f"recv_stats = {told}")
            for stats, told in (
                *((torch.zeros(local, dtype=dtype), dtype) for dtype in (torch.bool, torch.uint8, torch.float32)),
                (torch.zeros(1, dtype=torch.int32).expand(local), "an expanded tensor"),
            )
        ),
        ({"previous_event_before_epilogue": 1}, InputError, "previous_event = a int"),
    ):
        one_errs(group, dispatch, lambda: dispatch(**given), kind, told)  # noqa: B023

    def combine(handle: Any = handle, x: Any = x, **given: Any) -> Any:
        return buffer.combine(x, handle, **given)

    one_errs(group, combine, lambda: combine(handle=foreign), HandleError, "another ElasticBuffer")
    one_errs(group, combine, lambda: combine(handle=None), HandleError, "handle is None")
    one_errs(group, combine, lambda: combine(x=3), InputError, "x = a int")
    combine()


@case(ranks=(1, 2))
def mistakes_in_a_pipeline(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), replace(CONFIG, num_chunks=2))
    overlap = Overlap(dispatcher)
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)

    def run(x: Any = x, topk_idx: Any = topk_idx, weights: Any = weights) -> Tensor:
        return overlap.pipeline(lambda sent: sent.rows, x, topk_idx, weights)

    one_errs(group, run, lambda: run(x=None), InputError, "x = None")
    one_errs(group, run, lambda: run(topk_idx=topk_idx[1:]), InputError, "topk_idx = shape (4, 2)")
    one_errs(group, run, lambda: run(weights=[1.0]), InputError, "topk_weights = a list")
    sent = overlap.begin_dispatch(x, topk_idx, weights).wait()
    one_errs(
        group,
        lambda: overlap.begin_dispatch(x, topk_idx),
        lambda: overlap.begin_dispatch([1.0], topk_idx),
        InputError,
        "x = a list",
    )
    one_errs(
        group,
        lambda: overlap.begin_combine(sent.rows, sent),
        lambda: overlap.begin_combine(sent.rows, None),
        HandleError,
        "dispatched is None",
    )
    torch.testing.assert_close(run(), x * weights.sum(1, keepdim=True))


@case(ranks=(2, 3))
def ranks_must_agree_on_what_requires_gradients(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), CONFIG)
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    first = dispatcher.rank == 0
    told = ("backward differs", "none on rank 0", "rows and weights on rank 1", "what requires gradients")
    with raises(RankMismatchError, *told):
        dispatcher.dispatch(x.detach() if first else x, topk_idx, weights.detach() if first else weights)
    with raises(RankMismatchError, "backward differs", "rows on rank 0", "rows and weights on rank 1"):
        dispatcher.dispatch(x, topk_idx, weights.detach() if first else weights)
    sent = dispatcher.dispatch(x, topk_idx, weights)
    with raises(RankMismatchError, "backward differs", "none on rank 0", "rows on rank 1"):
        dispatcher.combine(sent.rows.detach() if first else sent.rows, sent)
    # What makes no difference to the backward's traffic may differ.
    sent = dispatcher.dispatch(x.detach() if first else x, topk_idx, weights)
    dispatcher.combine(sent.rows, sent, weights=sent.weights.detach() if first else sent.weights).sum().backward()
    assert (x.grad is None) == first


@case(ranks=(2, 3))
def results_used_in_another_order(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), CONFIG)
    batches = [random_batch(dispatcher.rank + seed, 6, 8, 2, dispatcher.num_experts) for seed in (0, 10)]
    sent = [dispatcher.dispatch(*batch) for batch in batches]
    told = ("plan differs", "on rank 0", "on rank 1", "ranks call in another order")
    mine = sent[1] if dispatcher.rank == 1 else sent[0]
    with raises(RankMismatchError, *told):
        dispatcher.combine(mine.rows, mine)
    outs = [dispatcher.combine(s.rows, s) for s in sent]
    with raises(RankMismatchError, *told):  # one of two outputs is left out of the loss on rank 1
        (outs[1] if dispatcher.rank != 1 else outs[0]).sum().backward()
    # The same plan number of another dispatcher of this group is another plan too.
    others = [TokenDispatcher(group, dispatcher.num_experts, replace(CONFIG, num_sms=n)) for n in (11, 12)]
    made = [other.plan(batches[0][1]) for other in others]
    assert made[0].number != made[1].number
    chosen = int(dispatcher.rank == 1)
    with raises(RankMismatchError, *told):
        others[chosen].dispatch(batches[0][0], made[chosen])
    for s, batch in zip(sent, batches, strict=True):  # and the group goes on
        torch.testing.assert_close(dispatcher.combine(s.rows, s), 2 * batch[0])


@case(ranks=(2, 3))
def settings_that_change_what_travels_are_compared(group: dist.ProcessGroup) -> None:
    rank, experts = dist.get_rank(group), 2 * dist.get_world_size(group)
    x, topk_idx, weights = random_batch(rank, 5, 128, 2, experts, torch.bfloat16)
    for name, value in {
        "check_agreement": False,
        "fp8_dispatch": True,
        "fp8_dispatch_grad": True,
        "capacity_factor": 8.5,
        "max_tokens_per_rank": 77,
        "num_chunks": 3,
    }.items():
        config = replace(CONFIG, **{name: value}) if rank == 1 else CONFIG
        usual = getattr(CONFIG, name)
        with raises(RankMismatchError, f"{name} differs", f"{value} on rank 1", f"{usual} on rank 0"):
            TokenDispatcher(group, experts, config).dispatch(x, topk_idx, weights)
    own = replace(CONFIG, timeout_seconds=60 + rank, num_sms=rank, debug_waits=rank == 0)  # these may differ
    dispatcher = TokenDispatcher(group, experts, own)
    for config in (own, replace(own, check_agreement=False)):
        dispatcher = TokenDispatcher(group, experts, config)
        sent = dispatcher.dispatch(x, topk_idx, weights)
        with raises(RankMismatchError, "weights"):
            dispatcher.combine(sent.rows, sent, weights=sent.weights if rank == 1 else None)
        with raises(RankMismatchError, "dtype differs", "torch.float32 on rank 1"):
            dispatcher.combine(sent.rows.float() if rank == 1 else sent.rows, sent)
        assert dispatcher.combine(sent.rows, sent).shape == x.shape


@case(ranks=(2,))
def weights_multiplied_on_some_ranks_only(group: dist.ProcessGroup) -> None:
    """Nothing in the traffic differs, but the sums would be wrong."""
    dispatcher = TokenDispatcher(group, 4, CONFIG)
    x, topk_idx, weights = (t.detach() for t in random_batch(dispatcher.rank, 5, 8, 2, 4))
    sent = dispatcher.dispatch(x, topk_idx, weights)
    with raises(RankMismatchError, "weights differs", "True on rank 1", "False on rank 0"):
        dispatcher.combine(sent.rows, sent, weights=sent.weights if dispatcher.rank else None)
    with raises(RankMismatchError, "weights multiplied differs", "True on rank 1"):
        dispatcher.backend.combine(
            sent.plan, sent.rows, layout=Layout.BY_EXPERT, weights=sent.weights, apply_weights=dispatcher.rank == 1
        )


@case(ranks=(2,))
def a_rank_without_tokens_in_capacity_mode_learns_what_to_set(group: dist.ProcessGroup) -> None:
    tokens = 0 if dist.get_rank(group) else 4
    x, topk_idx = torch.ones(tokens, 8, dtype=torch.float32), torch.full((tokens, 1), 3, dtype=torch.int64)
    dispatcher = TokenDispatcher(group, 4, replace(CONFIG, capacity_factor=2.0))
    told = ("capacity_factor = 2 with max_tokens_per_rank = 0 (so the rank's own tokens", "gives room for 0")
    with raises(CapacityError, *told):
        dispatcher.dispatch(x, topk_idx)
    cured = TokenDispatcher(group, 4, replace(CONFIG, capacity_factor=2.0, max_tokens_per_rank=4))
    for _ in range(2):
        assert len(cured.dispatch(x, topk_idx).rows) == 8


@case(ranks=(1, 2))
def forward_mode_derivatives_are_refused(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), CONFIG)
    x, topk_idx, weights = (t.detach() for t in random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts))
    sent = dispatcher.dispatch(x, topk_idx, weights)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with raises(UnsupportedError, "x has a tangent"):
            dispatcher.dispatch(dual, topk_idx, weights)
        rows = torch.autograd.forward_ad.make_dual(sent.rows, torch.ones_like(sent.rows))
        with raises(UnsupportedError, "rows has a tangent"):
            dispatcher.combine(rows, sent)
        dispatcher.dispatch(x, topk_idx, weights)  # without a tangent it is as ever
    with raises(UnsupportedError, "x is inside a transform of torch.func"):
        torch.func.jvp(lambda x: dispatcher.dispatch(x, topk_idx).rows, (x,), (x,))


@case(ranks=(1, 2))
def an_error_lets_go_of_its_tensors(group: dist.ProcessGroup) -> None:
    """As soon as it has been handled, without waiting for the garbage collector."""
    world = dist.get_world_size(group)
    dispatcher = TokenDispatcher(group, 2 * world, CONFIG)
    buffer = Buffer(group)
    _, topk_idx, _ = random_batch(dispatcher.rank, 5, 8, 2, 2 * world)
    sent = dispatcher.dispatch(torch.ones(5, 8, dtype=torch.float32), topk_idx)
    bad = dist.get_rank(group) == world - 1

    def refused(call: Callable[[Tensor], Any], x: Tensor) -> weakref.ref[Tensor]:
        held = weakref.ref(x)
        try:
            call(x)
        except DeepEPMoEError:
            return held
        raise AssertionError("nothing was refused")

    gc.collect()
    gc.disable()
    try:
        for name, call, rows in (
            ("dispatch, found by the backend", lambda x: dispatcher.dispatch(x, topk_idx), 4 if bad else 5),
            ("dispatch, found before", lambda x: dispatcher.dispatch(x, None if bad else topk_idx), 5),
            ("combine, found by the backend", lambda x: dispatcher.combine(x, sent), len(sent.rows) + bad),
            ("combine, found before", lambda x: dispatcher.combine(x, None if bad else sent), len(sent.rows)),
            ("plan, found by the backend", lambda x: dispatcher.plan((x[:, :2] * (100 if bad else 1)).long()), 5),
            ("buffer", lambda x: buffer.combine(x, None), 5),
        ):
            held = refused(call, torch.ones(rows, 8, dtype=torch.float32))
            assert held() is None, name
    finally:
        gc.enable()
