"""Cases of TokenDispatcher over gloo: properties on random shapes, framework features, bad input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepep_moe import Dispatched, DispatcherConfig, TokenDispatcher, ops
from deepep_moe.backends import Backward, Layout, Wire
from deepep_moe.errors import CapacityError, HandleError, InputError, PeerError, RankMismatchError
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from tests.launch import case
from tests.reference import dense_moe, expert_rows

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-2, 5e-2), torch.float16: (6e-3, 6e-3)}


def together(group: dist.ProcessGroup, check: Callable[[], None]) -> None:
    """Run ``check`` on all ranks; if it fails on one, fail on all, so that hypothesis shrinks in step."""
    try:
        check()
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    assert errors == [None] * len(errors), errors


def raises(kind: type[Exception], *parts: str) -> Any:
    """Context that needs ``kind`` with every one of ``parts`` in its message."""

    class Expect:
        def __enter__(self) -> None: ...

        def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
            assert isinstance(error, kind), f"expected {kind.__name__}, got {error!r}"
            for part in parts:
                assert part in str(error), f"{part!r} is not in {str(error)!r}"
            return True

    return Expect()


def random_batch(
    seed: int, tokens: int, hidden: int, topk: int, experts: int, dtype: torch.dtype = torch.float32, dropped: float = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, expert indices (an expert may come twice in a token) and weights that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    topk_idx = torch.randint(experts, (tokens, topk), generator=generator)
    topk_idx[torch.rand(tokens, topk, generator=generator) < dropped] = -1
    weights = torch.rand(tokens, topk, generator=generator).requires_grad_()
    return x, topk_idx, weights


def run_experts(rows: Tensor, dispatched: Dispatched, matrices: Tensor) -> Tensor:
    """Expert e is ``tanh(rows @ matrices[e])``, in a loop over the groups."""
    sizes = dispatched.tokens_per_expert.tolist()
    used, unused = rows.split([sum(sizes), len(rows) - sum(sizes)])
    outs = [torch.tanh(r.float() @ m.float()) for r, m in zip(used.split(sizes), matrices, strict=True)]
    return torch.cat([*outs, unused.float()]).to(rows.dtype)


def local_matrices(dispatcher: TokenDispatcher, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Matrices of all experts (the same on every rank), and of the experts of this rank."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(dispatcher.num_experts, hidden, hidden, generator=generator) / hidden**0.5
    first = dispatcher.rank * dispatcher.num_local_experts
    return matrices, matrices[first : first + dispatcher.num_local_experts]


def moe(dispatcher: TokenDispatcher, x: Tensor, topk_idx: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    dispatched = dispatcher.dispatch(x, topk_idx, weights)
    return dispatcher.combine(
        run_experts(dispatched.rows, dispatched, matrices), dispatched, weights=dispatched.weights
    )


SHAPES = st.fixed_dictionaries(
    {
        "tokens": st.lists(st.integers(0, 9), min_size=4, max_size=4),
        "hidden": st.integers(1, 20),
        "topk": st.integers(1, 5),
        "local_experts": st.integers(1, 4),
        "alignment": st.sampled_from([1, 2, 8, 5]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "dropped": st.sampled_from([0.0, 0.3, 1.0]),
        "seed": st.integers(0, 1000),
    }
)
PROPERTY = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@case()
def matches_the_dense_reference_in_values_and_gradients(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    @PROPERTY
    @given(SHAPES)
    def run(shape: dict[str, Any]) -> None:
        def check() -> None:
            experts = world * shape["local_experts"]
            config = DispatcherConfig(expert_alignment=shape["alignment"], timeout_seconds=20)
            dispatcher = TokenDispatcher(group, experts, config)
            matrices, own = local_matrices(dispatcher, shape["hidden"])
            x, topk_idx, weights = random_batch(
                shape["seed"] + rank,
                shape["tokens"][rank],
                shape["hidden"],
                shape["topk"],
                experts,
                shape["dtype"],
                shape["dropped"],
            )
            out = moe(dispatcher, x, topk_idx, weights, own)
            expected = dense_moe(x, topk_idx, weights, matrices)
            grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
            got = torch.autograd.grad(out, (x, weights), grad)
            wanted = torch.autograd.grad(expected, (x, weights), grad.float(), allow_unused=True)
            rtol, atol = TOLERANCE[shape["dtype"]]
            assert out.dtype == shape["dtype"]
            assert out.shape == x.shape
            torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=atol)
            for mine, reference in zip(got, wanted, strict=True):
                torch.testing.assert_close(mine.float(), reference.float(), rtol=rtol, atol=atol * shape["topk"])

        together(group, check)

    run()


@case()
def rows_come_in_the_promised_order_with_counts_and_padding(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    @PROPERTY
    @given(SHAPES)
    def run(shape: dict[str, Any]) -> None:
        def check() -> None:
            experts = world * shape["local_experts"]
            config = DispatcherConfig(expert_alignment=shape["alignment"], timeout_seconds=20)
            dispatcher = TokenDispatcher(group, experts, config)
            routing = [
                random_batch(shape["seed"] + r, shape["tokens"][r], 1, shape["topk"], experts, dropped=shape["dropped"])
                for r in range(world)
            ]
            _, topk_idx, weights = routing[rank]
            tokens = torch.arange(shape["tokens"][rank], dtype=torch.float32)
            names = torch.stack([torch.full_like(tokens, rank + 1), tokens], dim=1)  # row (rank + 1, token)
            dispatched = dispatcher.dispatch(names, topk_idx.int(), weights)

            groups = expert_rows([r[1] for r in routing], rank, shape["local_experts"], shape["alignment"])
            flat = [row for rows in groups for row in rows]
            padding = (0.0, 0.0)
            assert [tuple(r) for r in dispatched.rows.tolist()] == [
                padding if row is None else (row[0] + 1.0, float(row[1])) for row in flat
            ]
            assert dispatched.weights is not None
            assert dispatched.weights.tolist() == [
                0.0 if row is None else routing[row[0]][2][row[1], row[2]].item() for row in flat
            ]
            assert dispatched.tokens_per_expert.tolist() == [len(rows) for rows in groups]
            assert dispatched.tokens_per_expert_host is not None
            assert dispatched.tokens_per_expert_host.tolist() == [len(rows) for rows in groups]

        together(group, check)

    run()


@case()
def repeats_bit_for_bit(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 4 * dist.get_world_size(group))
    x, topk_idx, weights = random_batch(dispatcher.rank, 33, 16, 6, dispatcher.num_experts, torch.bfloat16)
    _, own = local_matrices(dispatcher, 16)
    results = []
    for _ in range(2):
        out = moe(dispatcher, x, topk_idx, weights, own)
        results.append((out, *torch.autograd.grad(out, (x, weights), torch.ones_like(out))))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@case()
def weights_may_be_applied_by_the_experts_instead(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    x, topk_idx, weights = random_batch(dispatcher.rank, 9, 8, 3, dispatcher.num_experts, dropped=0.2)
    matrices, own = local_matrices(dispatcher, 8)
    dispatched = dispatcher.dispatch(x, topk_idx, weights)
    assert dispatched.weights is not None
    weighted = run_experts(dispatched.rows, dispatched, own) * dispatched.weights.unsqueeze(1)
    out = dispatcher.combine(weighted, dispatched)
    expected = dense_moe(x, topk_idx, weights, matrices)
    torch.testing.assert_close(out, expected)
    for mine, reference in zip(
        torch.autograd.grad(out.sum(), (x, weights)), torch.autograd.grad(expected.sum(), (x, weights)), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@case()
def gradients_are_computed_only_where_asked(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    x, topk_idx, weights = random_batch(dispatcher.rank, 9, 8, 2, dispatcher.num_experts)
    matrices, own = local_matrices(dispatcher, 8)
    reference = dense_moe(x, topk_idx, weights, matrices).sum()
    for wanted in ((x,), (weights,)):
        inputs = [t if any(t is w for w in wanted) else t.detach() for t in (x, weights)]
        out = moe(dispatcher, inputs[0], topk_idx, inputs[1], own)
        (got,) = torch.autograd.grad(out.sum(), wanted)
        torch.testing.assert_close(got, torch.autograd.grad(reference, wanted, retain_graph=True)[0])
    with torch.no_grad():
        assert not moe(dispatcher, x, topk_idx, weights, own).requires_grad


@case()
def checkpointing_gives_the_same_gradients(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    x, topk_idx, weights = random_batch(dispatcher.rank, 7 + dispatcher.rank, 8, 2, dispatcher.num_experts)
    _, own = local_matrices(dispatcher, 8)
    expected = torch.autograd.grad(moe(dispatcher, x, topk_idx, weights, own).square().sum(), (x, weights))
    for reentrant in (False, True):
        x_leaf, w_leaf = x.detach().requires_grad_(), weights.detach().requires_grad_()
        out = checkpoint(moe, dispatcher, x_leaf, topk_idx, w_leaf, own, use_reentrant=reentrant)
        out.square().sum().backward()
        assert torch.equal(x_leaf.grad, expected[0])
        assert torch.equal(w_leaf.grad, expected[1])


@case()
def interleaved_micro_batches_do_not_mix(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    matrices, own = local_matrices(dispatcher, 8)
    batches = [random_batch(10 * i + dispatcher.rank, 3 + 4 * i, 8, 2, dispatcher.num_experts) for i in range(2)]
    sent = [dispatcher.dispatch(*batch) for batch in batches]
    outs = [dispatcher.combine(run_experts(d.rows, d, own), d, weights=d.weights) for d in sent]
    for out, (x, topk_idx, weights) in zip(outs, batches, strict=True):  # backward in forward order, as 1F1B does
        expected = dense_moe(x, topk_idx, weights, matrices)
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(
            torch.autograd.grad(out.sum(), (x, weights)), torch.autograd.grad(expected.sum(), (x, weights)), strict=True
        ):
            torch.testing.assert_close(got, wanted)


@case(ranks=(2,))
def compiles_into_one_graph(group: dist.ProcessGroup) -> None:
    """The same code for several dispatchers: what differs between them becomes symbolic in the traces."""

    def layer(dispatcher: TokenDispatcher, x: Tensor, topk_idx: Tensor, weights: Tensor) -> Tensor:
        dispatched = dispatcher.dispatch(x, topk_idx, weights)
        return dispatcher.combine(torch.tanh(dispatched.rows), dispatched, weights=dispatched.weights)

    for number in range(1, 4):
        experts = 2 * number * dist.get_world_size(group)
        dispatcher = TokenDispatcher(group, experts, DispatcherConfig(expert_alignment=number))
        x, topk_idx, weights = random_batch(dispatcher.rank, 9 + number, 8, 2, experts)
        compiled = torch.compile(partial(layer, dispatcher), fullgraph=True, backend="aot_eager")
        expected, out = layer(dispatcher, x, topk_idx, weights), compiled(x, topk_idx, weights)
        torch.testing.assert_close(out, expected)
        for got, wanted in zip(
            torch.autograd.grad(out.sum(), (x, weights)), torch.autograd.grad(expected.sum(), (x, weights)), strict=True
        ):
            torch.testing.assert_close(got, wanted)


@case(ranks=(2,))
def operators_pass_opcheck(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), DispatcherConfig(expert_alignment=4))
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    number, experts = ops.register_backend(dispatcher.backend), dispatcher.num_experts
    # Without the checks that compare two calls: plans have numbers. compiles_into_one_graph covers the tracing.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.plan, (topk_idx, number, experts, 4, -1, -1), test_utils=checks)
    dispatched = dispatcher.dispatch(x, topk_idx, weights)
    plan = dispatched.plan.tensors()
    rows, row_weights = (t.detach().requires_grad_() for t in (dispatched.rows, dispatched.weights))
    operators = torch.ops.deepep_moe
    for routed in (weights, None):  # differentiable, and the opaque operators that these decompose into
        torch.library.opcheck(operators.dispatch_with_gradient.default, (x, routed, plan, number, experts, 4, False))
        opaque = (
            x.detach(),
            None if routed is None else routed.detach(),
            plan,
            number,
            experts,
            4,
            Backward.NONE,
            False,
        )
        torch.library.opcheck(operators.dispatch.default, opaque)
    for routed, apply_weights in ((row_weights, False), (row_weights, True), (None, False)):
        arguments = (rows, routed, plan, number, experts, 4, apply_weights, False)
        torch.library.opcheck(operators.combine_with_gradient.default, arguments)
        routed = None if routed is None else routed.detach()
        opaque = (rows.detach(), routed, plan, number, experts, 4, Backward.NONE, apply_weights)
        torch.library.opcheck(operators.combine.default, opaque)


@case()
def fp8_dispatch_is_close_and_halves_nothing_else(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 12, 256, 3, 2 * world, torch.bfloat16)
    exact = TokenDispatcher(group, 2 * world)
    coarse = TokenDispatcher(group, 2 * world, DispatcherConfig(fp8_dispatch=True, fp8_dispatch_grad=True))
    outs, grads = [], []
    for dispatcher in (exact, coarse):
        dispatched = dispatcher.dispatch(x, topk_idx, weights)
        outs.append(dispatched.rows)
        out = dispatcher.combine(dispatched.rows * 2, dispatched, weights=dispatched.weights)
        grads.append(torch.autograd.grad(out.float().square().sum(), x)[0])
    assert outs[1].dtype == torch.bfloat16
    assert not torch.equal(outs[0], outs[1])
    for a, b in (outs, grads):
        error = (a.float() - b.float()).norm() / a.float().norm()
        assert error < 0.06, f"relative error {error}"
    rounded = exact.dispatch(dequantize_e4m3(*quantize_e4m3(x.detach()), x.dtype), topk_idx, weights).rows
    assert torch.equal(outs[1], rounded)
    with raises(InputError, "hidden size", "multiple of 128"):
        coarse.dispatch(x[:, :100], topk_idx, weights)


@case()
def fp8_does_not_care_how_small_gradients_are(group: dist.ProcessGroup) -> None:
    """A loss times a power of two has gradients times that power, to the last bit: its scales take it up."""
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 12, 256, 3, 2 * world, torch.bfloat16)
    dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(fp8_dispatch=True, fp8_dispatch_grad=True))
    grads = []
    for factor in (1.0, 2.0**-40, 2.0**-90):
        dispatched = dispatcher.dispatch(x, topk_idx, weights)
        out = dispatcher.combine(dispatched.rows * 2, dispatched, weights=dispatched.weights)
        loss = (out * torch.sin(torch.arange(256, dtype=torch.float32, device=x.device)).to(x.dtype)).sum() * factor
        grads.append([grad.double() / factor for grad in torch.autograd.grad(loss, (x, weights))])
    assert all(grad.abs().max() > 0.1 for grad in grads[0])
    for small in grads[1:]:
        for grad, wanted in zip(small, grads[0]):
            assert torch.equal(grad, wanted)


@case()
def what_crosses_as_fp8_is_rounded_and_nothing_else(group: dist.ProcessGroup) -> None:
    """In both layouts, with sizes known or fixed, and where a rank has no tokens."""
    world = dist.get_world_size(group)
    backend = TokenDispatcher(group, 2 * world).backend
    for tokens in (12, 0):
        x, topk_idx, weights = random_batch(backend.rank, tokens, 384, 3, 2 * world, torch.bfloat16)
        x, weights = x.detach(), weights.detach()
        rounded = dequantize_e4m3(*quantize_e4m3(x), x.dtype)
        for limits in ({}, {"max_recv": 12 * world + 3, "max_rows": 36 * world + 8}):
            plan = backend.plan(topk_idx, 2 * world, alignment=4, **limits)
            for layout in Layout:
                sent = backend.dispatch(plan, x, layout=layout, wire=Wire.E4M3_TO_BF16, weights=weights)
                wanted = backend.dispatch(plan, rounded, layout=layout, weights=weights)
                assert sent.x.dtype == torch.bfloat16 and sent.scales is None
                assert torch.equal(sent.x, wanted.x)
                assert torch.equal(sent.weights, wanted.weights)
    with raises(InputError, "wire = e4m3", "needs bfloat16 tokens", "torch.float32"):
        backend.dispatch(plan, x.float(), layout=Layout.BY_EXPERT, wire=Wire.E4M3)
    with raises(InputError, "wire = True", "must be a Wire"):
        backend.dispatch(plan, x, layout=Layout.BY_EXPERT, wire=True)
    with raises(InputError, "layout = True", "Layout.BY_SOURCE or Layout.BY_EXPERT"):
        backend.dispatch(plan, x, layout=True)


@case()
def capacity_mode_has_fixed_sizes_and_reports_overflow(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 16, 8, 2, 2 * world)
    roomy = TokenDispatcher(group, 2 * world, DispatcherConfig(capacity_factor=float(2 * world), expert_alignment=4))
    matrices, own = local_matrices(roomy, 8)
    dispatched = roomy.dispatch(x, topk_idx, weights)
    assert dispatched.tokens_per_expert_host is None
    assert dispatched.rows.shape[0] == 16 * 2 * 2 * world + 8
    assert dispatched.plan.num_recv == 16 * min(2, world) * 2 * world  # a token comes once per rank
    assert dispatched.rows[dispatched.tokens_per_expert.sum() :].abs().sum() == 0
    out = roomy.combine(run_experts(dispatched.rows, dispatched, own), dispatched, weights=dispatched.weights)
    torch.testing.assert_close(out, dense_moe(x, topk_idx, weights, matrices))
    roomy.backend.check()

    tight = TokenDispatcher(group, 2 * world, DispatcherConfig(capacity_factor=0.25))
    for _ in range(2):  # all to rank 0
        with raises(CapacityError, "rank 0 needs room for", "capacity_factor = 0.25"):
            tight.dispatch(x, torch.zeros_like(topk_idx), weights)
    dropped = tight.dispatch(x, torch.full_like(topk_idx, -1), weights)  # and it goes on
    assert dropped.rows.shape == (8, 8)
    assert not tight.combine(dropped.rows, dropped).any()

    huge = TokenDispatcher(group, 2 * world, DispatcherConfig(capacity_factor=1e6, max_tokens_per_rank=10**6))
    with raises(InputError, "capacity_factor = 1000000", f"{2 * 10**12} rows, at most {2**31 - 1}"):
        huge.dispatch(x, topk_idx, weights)


@case(ranks=(1, 2))
def counts_on_the_host_are_those_on_the_device(group: dist.ProcessGroup) -> None:
    for alignment in (1, 2, 3, 8):
        dispatcher = TokenDispatcher(
            group, 2 * dist.get_world_size(group), DispatcherConfig(expert_alignment=alignment)
        )
        x, topk_idx, _ = random_batch(dispatcher.rank, 9, 8, 2, dispatcher.num_experts)
        sent = dispatcher.dispatch(x, topk_idx)
        assert sent.tokens_per_expert_host is not None
        assert sent.tokens_per_expert_host.tolist() == sent.tokens_per_expert.tolist()


@case(ranks=(1, 2))
def combine_takes_weights_of_any_float_type(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    x, topk_idx, weights = random_batch(dispatcher.rank, 9, 8, 2, dispatcher.num_experts)
    sent = dispatcher.dispatch(x, topk_idx, weights)
    assert sent.weights is not None
    for dtype in (torch.bfloat16, torch.float64):
        given = sent.weights.detach().to(dtype).requires_grad_()
        exact = given.detach().float().requires_grad_()
        out, wanted = (dispatcher.combine(sent.rows, sent, weights=each) for each in (given, exact))
        assert torch.equal(out, wanted)
        (gradient,), (exact_gradient,) = (
            torch.autograd.grad(y.square().sum(), w) for y, w in ((out, given), (wanted, exact))
        )
        assert gradient.dtype == dtype and torch.equal(gradient, exact_gradient.to(dtype))
    with raises(InputError, "weights = torch.int64: must be floating point"):
        dispatcher.combine(sent.rows, sent, weights=sent.weights.long())


@case(ranks=(1, 2, 3))
def bad_input_raises_on_every_rank(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    dispatcher = TokenDispatcher(group, 4 * world, DispatcherConfig(timeout_seconds=20))
    x, topk_idx, weights = random_batch(rank, 6, 8, 2, 4 * world)
    too_high = torch.full_like(topk_idx, 4 * world)
    wrong: list[tuple[tuple[Any, ...], str, str]] = [
        ((x, too_high, weights), "topk_idx", str(4 * world)),
        ((x, topk_idx.clone().fill_(-2), weights), "topk_idx", "-2"),
        ((x, topk_idx[:, :0], weights[:, :0]), "topk_idx", "top-k must be at least 1"),
        ((x, topk_idx.float(), weights), "topk_idx", "torch.float32"),
        ((x, topk_idx[0], weights), "topk_idx", "shape"),
        ((x[:-1], topk_idx, weights), "x", "6 rows"),
        ((x.double(), topk_idx, weights), "x", "torch.float64"),
        ((x[:, :0], topk_idx, weights), "x", "hidden size must be at least 1"),
        ((x, topk_idx, weights[:, :1]), "topk_weights", "shape"),
    ]
    for arguments, name, told in wrong:
        if rank == world - 1:  # one rank errs, all must learn why
            with raises(InputError, name, told):
                dispatcher.dispatch(*arguments)
        else:
            with raises(PeerError, f"rank {world - 1}", name, told):
                dispatcher.dispatch(x, topk_idx, weights)
    dispatched = dispatcher.dispatch(x, topk_idx, weights)  # the group still works
    with raises(InputError, "rows = shape", "as many as dispatched.rows"):
        dispatcher.combine(dispatched.rows[1:], dispatched)
    with raises(InputError, "weights", "shape"):
        dispatcher.combine(dispatched.rows, dispatched, weights=torch.ones(1000))
    other = TokenDispatcher(group, 4 * world, DispatcherConfig(timeout_seconds=21))
    with raises(HandleError, "another group or configuration"):
        other.combine(dispatched.rows, dispatched)
    with raises(InputError, "num_experts", str(4 * world + 1)) if world > 1 else raises(InputError, "num_experts"):
        TokenDispatcher(group, 4 * world + 1 if world > 1 else 0)


@case(ranks=(2, 3))
def disagreement_names_ranks_and_values(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    config = DispatcherConfig(timeout_seconds=20)
    dispatcher = TokenDispatcher(group, 4 * world, config)
    x, topk_idx, weights = random_batch(rank, 6, 8, 2, 4 * world)
    odd = rank == 1
    with raises(RankMismatchError, "top-k", "1 on rank 1", "2 on rank 0"):
        dispatcher.dispatch(x, topk_idx[:, :1] if odd else topk_idx, weights[:, :1] if odd else weights)
    with raises(RankMismatchError, "hidden size", "4 on rank 1", "8 on rank 0"):
        dispatcher.dispatch(x[:, :4] if odd else x, topk_idx, weights)
    with raises(RankMismatchError, "dtype", "torch.bfloat16 on rank 1", "torch.float32 on rank 0"):
        dispatcher.dispatch(x.bfloat16() if odd else x, topk_idx, weights)
    with raises(RankMismatchError, "weights"):
        dispatcher.dispatch(x, topk_idx, None if odd else weights)
    with raises(RankMismatchError, "num_experts", f"{2 * world} on rank 1", f"{4 * world} on rank 0"):
        experts = 2 * world if odd else 4 * world
        TokenDispatcher(group, experts, config).dispatch(x, topk_idx.clamp(max=experts - 1), weights)
    dispatched = dispatcher.dispatch(x, topk_idx, weights)
    with raises(RankMismatchError, "call differs", "plan on rank 1", "combine on rank 0"):
        if odd:
            dispatcher.dispatch(x, topk_idx, weights)
        else:
            dispatcher.combine(dispatched.rows, dispatched)
    sent = dispatcher.dispatch(x, topk_idx, weights)  # and the group goes on
    torch.testing.assert_close(dispatcher.combine(sent.rows, sent), 2 * x)


@case(ranks=(1, 2))
def autocast_changes_dtypes_of_what_it_should_only(group: dist.ProcessGroup) -> None:
    """Routing weights and rows come in bfloat16, tokens and master weights stay fp32."""
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), DispatcherConfig(expert_alignment=4))
    x, topk_idx, scores = random_batch(dispatcher.rank, 9, 16, 2, dispatcher.num_experts)
    matrices, own = local_matrices(dispatcher, 16)
    with torch.autocast("cpu", torch.bfloat16):
        dispatched = dispatcher.dispatch(x, topk_idx, (scores @ torch.eye(2)).to(torch.bfloat16))
        assert dispatched.rows.dtype == torch.float32
        assert dispatched.weights is not None and dispatched.weights.dtype == torch.float32
        rows = torch.cat(
            [torch.tanh(r @ m) for r, m in zip(dispatched.rows.split(dispatched.tokens_per_expert.tolist()), own)]
        )
        assert rows.dtype == torch.bfloat16
        out = dispatcher.combine(rows, dispatched, weights=dispatched.weights)
    assert out.dtype == torch.bfloat16
    expected = dense_moe(x, topk_idx, scores, matrices)
    torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=5e-2)
    for got, wanted in zip(
        torch.autograd.grad(out.float().sum(), (x, scores)),
        torch.autograd.grad(expected.sum(), (x, scores)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=5e-2, atol=1e-1)


@case()
def agreement_check_can_be_switched_off(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), DispatcherConfig(check_agreement=False))
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    matrices, own = local_matrices(dispatcher, 8)
    torch.testing.assert_close(moe(dispatcher, x, topk_idx, weights, own), dense_moe(x, topk_idx, weights, matrices))


@case(ranks=(4,))
def non_contiguous_groups_work_side_by_side(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own_group = groups[rank % 2]
    dispatcher = TokenDispatcher(own_group, 4)
    x, topk_idx, weights = random_batch(rank, 5 + rank, 8, 2, 4)
    matrices, own = local_matrices(dispatcher, 8, seed=rank % 2)
    torch.testing.assert_close(moe(dispatcher, x, topk_idx, weights, own), dense_moe(x, topk_idx, weights, matrices))
    with raises(InputError, "group", "belongs to"):
        TokenDispatcher(groups[1 - rank % 2], 4)


@case(ranks=(1, 2))
def a_dispatcher_that_is_gone_is_named(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group), DispatcherConfig(num_sms=7))
    x, topk_idx, weights = random_batch(dispatcher.rank, 5, 8, 2, dispatcher.num_experts)
    rows = dispatcher.dispatch(x, topk_idx, weights).rows
    del dispatcher
    with raises(HandleError, "gone"):
        rows.sum().backward()
