"""``CollectiveOnGPU`` over gloo, with tests/plan_kernels.py in place of kernels, against ``CollectiveBackend``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep_moe.backends import announcements
from deepep_moe.backends.announcements import Announcements
from deepep_moe.backends.base import Backward, Layout, Plan, Rows, Wire
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.collective_cuda import CollectiveOnGPU
from deepep_moe.backends.exchange import Exchange, Transfer
from deepep_moe.backends.headers import HEADER_WORDS
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import CapacityError, InputError, PeerError, RankMismatchError
from tests import plan_kernels
from tests.distributed.cases_dispatcher import raises
from tests.launch import case
from tests.plan_kernels import bits

CPU = torch.device("cpu")
CONFIG = DispatcherConfig(timeout_seconds=30)
SOON_SECONDS = 8.0
PLAN_TENSORS = ("topk_idx", "send_slot", "counted", "received", "row_recv", "expert_counts_host")


@contextmanager
def backends(
    group: dist.ProcessGroup, config: DispatcherConfig = CONFIG
) -> Iterator[tuple[CollectiveOnGPU, CollectiveBackend]]:
    """The backend under test, and the reference."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        plan_kernels.install(monkeypatch)
        yield CollectiveOnGPU(group, CPU, config), CollectiveBackend(group, CPU, config)


def assert_same(got: Any, wanted: Any, names: tuple[str, ...], what: str) -> None:
    for name in names:
        one, other = getattr(got, name), getattr(wanted, name)
        assert (one is None) == (other is None), (what, name)
        if one is not None:
            assert one.shape == other.shape and one.dtype == other.dtype, (what, name, one.shape, other.shape)
            assert torch.equal(bits(one), bits(other)), (what, name)


def assert_same_moves(
    gpu: CollectiveOnGPU,
    reference: CollectiveBackend,
    plans: tuple[Plan, Plan],
    generator: torch.Generator,
    hidden: int,
) -> None:
    """Dispatch and combine, with and without weights, in all layouts and forms that the plans have."""
    plan, wanted_plan = plans
    tokens, topk = plan.num_tokens, plan.num_topk
    weights = torch.rand((tokens, topk), generator=generator)
    for layout in Layout if topk else [Layout.BY_SOURCE]:
        for wire in list(Wire) if hidden % 128 == 0 else [Wire.AS_GIVEN]:
            x = torch.randn((tokens, hidden), generator=generator).bfloat16()
            for given in (weights, None):
                got = gpu.dispatch(plan, x, layout=layout, wire=wire, weights=given)
                wanted = reference.dispatch(wanted_plan, x, layout=layout, wire=wire, weights=given)
                assert_same(got, wanted, Rows._fields, f"dispatch {layout} {wire}")
        x, scales = torch.randn((tokens, hidden), generator=generator), torch.rand((3, tokens)).t()
        got = gpu.dispatch(plan, x, layout=layout, scales=scales)
        assert_same(got, reference.dispatch(wanted_plan, x, layout=layout, scales=scales), Rows._fields, "scales")
        rows = torch.randn((len(got.x), hidden), generator=generator).bfloat16()
        bias = (torch.ones((tokens, hidden)).bfloat16(),)
        shape = (len(rows),) if layout is Layout.BY_EXPERT else (len(rows), topk)
        row_weights = torch.rand(shape, generator=generator)
        for options in ({}, {"weights": row_weights, "bias": bias}, {"weights": row_weights, "apply_weights": True}):
            if "apply_weights" in options and layout is Layout.BY_SOURCE:
                continue
            back = gpu.combine(plan, rows, layout=layout, **options)  # type: ignore[arg-type]
            wanted_back = reference.combine(wanted_plan, rows, layout=layout, **options)  # type: ignore[arg-type]
            assert_same(back, wanted_back, ("x", "weights"), f"combine {layout} {list(options)}")


@case(ranks=(1, 2, 3, 4))
def plans_rows_and_sums_are_those_of_the_reference(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with backends(group) as (gpu, reference):
        cases = ((1, 1, 1, 8, False), (3, 4, 16, 256, False), (2, 3, 4, 3, True), (70, 2, 1, 128, False))
        for seed, (local, topk, alignment, hidden, fixed) in enumerate(cases):
            generator = torch.Generator().manual_seed(10 * seed + rank)
            tokens = (seed + 2 * rank) % 4 * 7  # none on some rank
            topk_idx = torch.randint(-1, local * ranks, (tokens, topk), generator=generator)
            most = 21 * ranks
            limits = {"max_recv": most, "max_rows": most * topk + local * alignment} if fixed else {}
            plans = tuple(b.plan(topk_idx, local * ranks, alignment=alignment, **limits) for b in (gpu, reference))
            assert_same(*plans, PLAN_TENSORS, f"plan {seed}")
            counts = (b.destinations(topk_idx, local * ranks) for b in (gpu, reference))
            names = ("num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank")
            assert_same(*counts, names, f"destinations {seed}")
            assert_same_moves(gpu, reference, plans, generator, hidden)  # type: ignore[arg-type]
            operators = TensorPlan.from_tensors(local * ranks, alignment, plans[0].tensors())
            assert_same_moves(gpu, reference, (operators, plans[1]), generator, hidden)


@case(ranks=(1, 2, 3))
def without_expert_indices(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(rank)
    in_rank = torch.rand((5 + rank, ranks), generator=generator) < 0.5
    counts = torch.randint(9, (2 * ranks,), dtype=torch.int32, generator=generator)
    with backends(group) as (gpu, reference):
        plans = tuple(
            b.plan(None, 2 * ranks, is_token_in_rank=in_rank, num_tokens_per_expert=counts) for b in (gpu, reference)
        )
        assert_same(*plans, PLAN_TENSORS, "plan")
        assert_same_moves(gpu, reference, plans, generator, 8)  # type: ignore[arg-type]


@case(ranks=(2,))
def the_host_waits_once_in_a_plan_and_never_later(group: dist.ProcessGroup) -> None:
    waits: list[str] = []
    with backends(group) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
        read = Exchange.read
        monkeypatch.setattr(
            Exchange, "read", lambda self, phase, tensor: waits.append(phase) or read(self, phase, tensor)
        )
        monkeypatch.setattr(Exchange, "to_host", lambda self, phase, tensor: waits.append(phase) or tensor)
        for limits in ({}, {"max_recv": 5, "max_rows": 9}):
            plan = gpu.plan(torch.tensor([[0, 1], [1, 2]]), 4, **limits)
            sent = gpu.dispatch(plan, torch.ones(2, 8), layout=Layout.BY_EXPERT, weights=torch.ones(2, 2))
            gpu.combine(plan, sent.x, layout=Layout.BY_EXPERT)
    assert waits == ["plan"] * 2


@case(ranks=(2, 3))
def a_lack_of_room_on_one_rank_is_an_error_on_all_without_another_exchange(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    last, topk_idx = ranks - 1, torch.tensor([[0, 2 * dist.get_world_size(group) - 1]] * 3)
    with backends(group) as (gpu, reference), pytest.MonkeyPatch.context() as monkeypatch:
        transfers: list[str] = []
        transfer = Exchange.transfer
        monkeypatch.setattr(
            Exchange, "transfer", lambda self, phase, moved: transfers.append(phase) or transfer(self, phase, moved)
        )
        padded = -(-3 * ranks // 4) * 4
        for max_recv, max_rows, said in (
            (3 * ranks - 1, padded, f"{3 * ranks} received tokens, but .* room for {3 * ranks - 1}"),
            (3 * ranks, padded - 1, f"{padded} expert rows, but .* room for {padded - 1}"),
        ):
            limits = (max_recv, max_rows) if rank == last else (100, 100)
            with pytest.raises(CapacityError, match=f"rank {last} needs room for {said}") as caught:
                gpu.plan(topk_idx, 2 * ranks, alignment=4, max_recv=limits[0], max_rows=limits[1])
            assert caught.value.needed == caught.value.room + 1
        assert transfers == ["plan"] * 2
        fits = {"alignment": 4, "max_recv": 3 * ranks, "max_rows": padded}
        assert_same(
            gpu.plan(topk_idx, 2 * ranks, **fits), reference.plan(topk_idx, 2 * ranks, **fits), PLAN_TENSORS, "fits"
        )


@case(ranks=(2, 3))
def messages_grow_with_the_batch_of_any_rank_and_stay_as_large(group: dist.ProcessGroup) -> None:
    rank, ranks, sizes = dist.get_rank(group), dist.get_world_size(group), []
    with backends(group) as (gpu, reference), pytest.MonkeyPatch.context() as monkeypatch:
        transfer = Exchange.transfer

        def counted(self: Exchange, phase: str, transfers: list[Transfer]) -> None:
            sizes.extend(moved.rows.shape[1] for moved in transfers)
            transfer(self, phase, transfers)

        last = rank == ranks - 1
        for tokens, local, topk, exchanges in (
            (4, 2, 1, 1),
            (2500, 2, 1, 2),
            (2600, 2, 1, 1),
            (2, 200, 3, 2),
            (2, 2, 3, 1),
        ):
            topk_idx = torch.full((tokens if last else 1, topk), (ranks - 1) * local)
            wanted = reference.plan(topk_idx, ranks * local)
            with monkeypatch.context() as counting:
                counting.setattr(Exchange, "transfer", counted)
                plan = gpu.plan(topk_idx, ranks * local)
            assert_same(plan, wanted, PLAN_TENSORS, f"{tokens} tokens")
            assert len(sizes) == exchanges, (tokens, local, topk, sizes)
            told: list[Any] = [None] * ranks
            dist.all_gather_object(told, sizes, group)
            assert all(other == sizes for other in told)
            sizes.clear()


@case(ranks=(2, 3))
def a_refused_plan_is_an_error_on_all_ranks_and_they_go_on(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    good, wrong = torch.arange(ranks).expand(4, -1), torch.full((4, ranks), ranks + 7)
    last = rank == ranks - 1
    with backends(group) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
        kind = InputError if last else PeerError
        with raises(kind, "topk_idx = torch.float32: must be int32 or int64", "" if last else f"rank {ranks - 1}: "):
            gpu.plan(good.float() if last else good, ranks)
        with raises(kind, "another check", "" if last else f"rank {ranks - 1}: "):
            if last:
                gpu.refuse("plan", InputError("x", 1, "another check"))
            gpu.plan(good, ranks)
        with raises(RankMismatchError, "num_experts differs", f"{2 * ranks} on rank 1"):
            gpu.plan(good, ranks * (2 if rank == 1 else 1))
        with raises(CapacityError, f"rank {ranks - 1} needs room for {4 * ranks} received"):
            gpu.plan(good, ranks, max_recv=0 if last else 4 * ranks)
        # On a GPU the values of indices are looked at by the kernel.
        monkeypatch.setattr("deepep_moe.backends.collective_cuda.check_plan_inputs", lambda *given: None)
        with raises(kind, f"topk_idx = {ranks + 7}: an expert must be -1 (dropped) or 0 to {ranks - 1}"):
            gpu.plan(wrong if last else good, ranks)
        with raises(kind, "topk_idx = -3: an expert must be -1 (dropped) or 0"):
            gpu.plan(-wrong + ranks + 4 if last else good, ranks)
        sent = gpu.dispatch(gpu.plan(good, ranks), torch.ones(4, 8), layout=Layout.BY_SOURCE)
        assert torch.equal(sent.x, torch.ones(4 * ranks, 8)) and gpu.usable


def found_by(gpu: CollectiveOnGPU, call: Callable[[], Any]) -> Exception:
    """The error of a call, raised by it or a moment later."""
    began = time.monotonic()
    try:
        call()
        while time.monotonic() - began < SOON_SECONDS:
            gpu.check()
            time.sleep(0.01)
    except Exception as error:
        return error
    raise AssertionError(f"nothing was found within {SOON_SECONDS:g} s")


@case(ranks=(2, 3))
def a_refused_dispatch_ends_the_group_with_the_reason(group: dist.ProcessGroup) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with backends(group) as (gpu, _):
        plan = gpu.plan(torch.arange(ranks).expand(4, -1), ranks)
        gpu.dispatch(plan, torch.ones(4, 8), layout=Layout.BY_SOURCE)  # the format is known from now on
        with raises(InputError, "x = shape (2, 8)"):  # on all ranks: nothing is in flight, so they go on
            gpu.dispatch(plan, torch.ones(2, 8), layout=Layout.BY_SOURCE)
        assert gpu.usable
        if rank == ranks - 1:
            with raises(InputError, "x = shape (3, 8)"):
                gpu.dispatch(plan, torch.ones(3, 8), layout=Layout.BY_SOURCE)
        else:
            error = found_by(gpu, lambda: gpu.dispatch(plan, torch.ones(4, 8), layout=Layout.BY_SOURCE))
            assert isinstance(error, PeerError), error
            assert f"rank {ranks - 1} broke off dispatch: InputError: x = shape (3, 8)" in str(error)
        with raises(PeerError, "given up after an earlier error"):
            gpu.plan(torch.arange(ranks).expand(4, -1), ranks)
        assert not gpu.usable


@case(ranks=(2,))
def ranks_in_different_formats_learn_of_it_and_results_are_nan(group: dist.ProcessGroup) -> None:
    other = dist.get_rank(group) == 1
    with backends(group) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Announcements, "_run", lambda self: None)  # it may find the error before any row moves
        plan = gpu.plan(torch.arange(2).expand(4, -1), 2)
        x = torch.ones(4, 8, dtype=torch.float16 if other else torch.bfloat16)
        sent = gpu.dispatch(plan, x, layout=Layout.BY_SOURCE)
        assert sent.x.isnan().all()
        with raises(RankMismatchError, "dispatch: dtype differs between the ranks", "torch.bfloat16 on rank 0"):
            gpu.check()
        with raises(RankMismatchError, "given up after an earlier error", "dtype differs"):
            gpu.combine(plan, sent.x, layout=Layout.BY_SOURCE)


@case(ranks=(2, 3))
def headers_go_ahead_of_the_rows_of_a_new_format_and_with_those_of_a_known_one(group: dist.ProcessGroup) -> None:
    ranks, moved = dist.get_world_size(group), []
    with backends(group) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
        transfer = Exchange.transfer

        def noted(self: Exchange, phase: str, transfers: list[Transfer]) -> None:
            headers = (ranks, 8 * HEADER_WORDS)
            moved.append([phase, *(t.rows.shape == headers for t in transfers)])
            transfer(self, phase, transfers)

        monkeypatch.setattr(Exchange, "transfer", noted)
        for dtype, known in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
            plan = gpu.plan(torch.arange(ranks).expand(4, -1), ranks)
            moved.clear()
            x = torch.ones((4, 8), dtype=dtype)
            rows = gpu.dispatch(plan, x, layout=Layout.BY_SOURCE).x
            assert torch.equal(gpu.combine(plan, rows, layout=Layout.BY_SOURCE).x, ranks * x)
            for phase in ("dispatch", "combine"):
                wanted = [[phase, True, False]] if known else [[phase, True], [phase, False]]
                assert [m for m in moved if m[0] == phase] == wanted
        for _ in range(3):  # memory of calls that are over serves those that follow
            gpu.check()
            gpu.combine(plan, rows, layout=Layout.BY_SOURCE)
        made = gpu._announcements._free + [copy for call in gpu._announcements._calls for copy in call.copies]
        assert 0 < len(made) <= 4 and all(copy.shape == (ranks, HEADER_WORDS) for copy in made)


@case(ranks=(2,))
def results_are_nan_where_nothing_arrived(group: dist.ProcessGroup) -> None:
    with backends(group) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
        plan, x = gpu.plan(torch.arange(2).expand(4, -1), 2), torch.ones(4, 8)
        for _ in range(3):  # leaves headers that agree in memory that is used again
            rows = gpu.dispatch(plan, x, layout=Layout.BY_SOURCE).x
            assert torch.equal(gpu.combine(plan, rows, layout=Layout.BY_SOURCE).x, 2 * x)
        monkeypatch.setattr(Exchange, "transfer", lambda *given: None)  # as if NCCL was aborted
        assert gpu.dispatch(plan, x, layout=Layout.BY_SOURCE).x.isnan().all()
        assert gpu.combine(plan, rows, layout=Layout.BY_SOURCE).x.isnan().all()


@case(ranks=(2,))
def ranks_in_different_known_formats_learn_of_it_while_the_call_does_not_end(group: dist.ProcessGroup) -> None:
    other = dist.get_rank(group) == 1
    with backends(group) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
        plan = gpu.plan(torch.arange(2).expand(4, -1), 2)
        formats = [torch.ones((4, 8), dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
        for x in formats:
            gpu.dispatch(plan, x, layout=Layout.BY_SOURCE)
        gpu.check()
        # As if NCCL waited forever, which it does where sizes differ.
        monkeypatch.setattr(announcements, "_is_written", lambda pinned: False)
        began = time.monotonic()
        sent = gpu.dispatch(plan, formats[other], layout=Layout.BY_SOURCE)
        assert sent.x.isnan().all()
        while gpu.usable and time.monotonic() - began < SOON_SECONDS:
            time.sleep(0.01)
        with raises(RankMismatchError, "dispatch: dtype differs between the ranks", "torch.bfloat16 on rank 1"):
            gpu.check()


@case(ranks=(2, 3))
def ranks_in_different_calls_learn_of_it_where_nccl_waits_forever(group: dist.ProcessGroup) -> None:
    """The last rank differs: in a plan that nobody else makes, in a known format of other size, in a new one; or it
    refuses its input."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    last = rank == ranks - 1
    topk_idx = torch.arange(ranks).expand(4, -1)

    def dispatched(gpu: CollectiveOnGPU, plan: Plan, hidden: int) -> None:
        sent = gpu.dispatch(plan, torch.ones(4, hidden), layout=Layout.BY_SOURCE).x
        assert gpu.usable or sent.isnan().all()

    def differ(gpu: CollectiveOnGPU, plan: Plan, how: str) -> None:
        if not last:
            return dispatched(gpu, plan, 8)
        if how == "plan":
            gpu.plan(topk_idx, ranks)
        elif how == "combine":
            gpu.combine(plan, torch.ones(4 * ranks, 16), layout=Layout.BY_SOURCE)
        elif how == "refused":
            with raises(InputError, "x = shape (3, 8)"):
                gpu.dispatch(plan, torch.ones(3, 8), layout=Layout.BY_SOURCE)
        else:
            dispatched(gpu, plan, {"known": 16, "new": 32}[how])

    others = ", ".join(map(str, range(ranks - 1)))
    for how, said in (
        ("plan", f"call differs between the ranks of the group: dispatch on rank {others}; plan on rank"),
        ("combine", f"call differs between the ranks of the group: dispatch on rank {others}; combine on rank"),
        ("known", f"hidden size differs between the ranks of the group: 8 on rank {others}; 16 on rank"),
        ("new", f"hidden size differs between the ranks of the group: 8 on rank {others}; 32 on rank"),
        ("refused", "x = shape (3, 8)"),
    ):
        fresh = dist.new_group()
        assert fresh is not None
        with backends(fresh) as (gpu, _), pytest.MonkeyPatch.context() as monkeypatch:
            plan_kernels.wait_where_sizes_differ(monkeypatch)
            plan = gpu.plan(topk_idx, ranks)
            dispatched(gpu, plan, 8)
            dispatched(gpu, plan, 16)
            began = time.monotonic()
            error = found_by(gpu, lambda gpu=gpu, plan=plan, how=how: differ(gpu, plan, how))  # type: ignore[misc]
            assert time.monotonic() - began < SOON_SECONDS, how
            assert isinstance(error, PeerError | RankMismatchError), (how, error)
            assert (said in str(error)) or (how == "refused" and last), (how, str(error))
            assert not gpu.usable


@case(ranks=(2,))
def ranks_that_differ_in_the_backward_learn_of_it(group: dist.ProcessGroup) -> None:
    with backends(group) as (gpu, _):
        plan = gpu.plan(torch.arange(2).expand(4, -1), 2)
        rows, backward = torch.ones(8, 8), Backward(dist.get_rank(group))
        error = found_by(gpu, lambda: gpu.combine(plan, rows, layout=Layout.BY_SOURCE, backward=backward))
        assert isinstance(error, RankMismatchError), error
        assert "what requires gradients must be the same on all ranks" in str(error)


@case(ranks=(2,))
def a_call_that_the_device_does_not_end_is_found_by_the_thread(group: dist.ProcessGroup) -> None:
    limit = 1.0
    with backends(group, DispatcherConfig(timeout_seconds=limit)) as (gpu, _), pytest.MonkeyPatch.context() as patch:
        plan = gpu.plan(torch.arange(2).expand(4, -1), 2)
        patch.setattr(announcements, "_is_written", lambda pinned: False)
        began = time.monotonic()
        gpu.dispatch(plan, torch.ones(4, 8), layout=Layout.BY_SOURCE)
        while gpu.usable and time.monotonic() - began < SOON_SECONDS:  # no call of this rank looks at the clock
            time.sleep(0.01)
        assert limit <= time.monotonic() - began < SOON_SECONDS
        with raises(PeerError, "dispatch: rank"):
            gpu.check()
