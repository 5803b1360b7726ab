"""Cases of what autograd sees of TokenDispatcher over gloo: autocast, gradients that travel as FP8, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from deepep_moe import DispatcherConfig, TokenDispatcher, ops
from deepep_moe.errors import InputError, PeerError, UnsupportedError
from deepep_moe.fp8 import dequantize_e4m3, quantize_e4m3
from deepep_moe.grouped import Groups, grouped_linear
from deepep_moe.row_scaling import scale_rows
from tests.distributed.cases_dispatcher import raises, random_batch
from tests.launch import case

HIDDEN = 128
# The error of e4m3: three bits of mantissa. A gradient that is lost is off by 1.
FP8_ERROR = 0.05


@case(ranks=(1, 2))
def autocast_computes_what_a_loop_over_experts_does(group: dist.ProcessGroup) -> None:
    """Router and experts are ``torch.nn.functional.linear``, which autocast casts; rows travel as they are given."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    dispatcher = TokenDispatcher(group, 2 * world)
    generator = torch.Generator().manual_seed(3)
    all_experts = torch.randn(2 * world, 16, 16, generator=generator) / 4
    router = torch.randn(2 * world, 16, generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, x_dtype in ((6 + rank, torch.float32), (6 * (1 - rank), torch.float32), (5, dtype)):
            for one_module, inside in ((False, False), (True, False), (True, True)):
                given = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(rank)).to(x_dtype)
                x, gate = given.clone().requires_grad_(), router.clone().requires_grad_()
                own = all_experts[2 * rank : 2 * rank + 2].clone().requires_grad_()
                with torch.autocast("cpu", dtype):
                    weights, topk_idx = linear(x, gate).softmax(-1).topk(2, dim=-1)
                    sent = dispatcher.dispatch(x, topk_idx, weights)
                    assert sent.rows.dtype == x_dtype
                    if one_module:
                        groups = Groups(sent.tokens_per_expert, sent.tokens_per_expert_host)
                        rows = scale_rows(grouped_linear(sent.rows, own, groups), sent.weights)
                        out = dispatcher.combine(rows, sent)
                    else:
                        parts = sent.rows.split(sent.tokens_per_expert.tolist())
                        rows = torch.cat([linear(part, expert) for part, expert in zip(parts, own, strict=True)])
                        out = dispatcher.combine(rows, sent, weights=sent.weights)
                assert rows.dtype == out.dtype == dtype
                with torch.autocast("cpu", dtype, enabled=inside):
                    out.backward(torch.ones_like(out))

                exact = [t.clone().requires_grad_() for t in (given, router, all_experts)]
                with torch.autocast("cpu", dtype):
                    weights, again = linear(exact[0], exact[1]).softmax(-1).topk(2, dim=-1)
                    assert torch.equal(again, topk_idx)
                    rows = torch.stack([linear(exact[0], expert) for expert in exact[2]], 1)  # [T, E, H]
                    chosen = rows.gather(1, topk_idx.unsqueeze(-1).expand(-1, -1, 16))
                    expected = (chosen.float() * weights.float().unsqueeze(-1)).sum(1)
                expected.backward(torch.ones_like(expected))
                dist.all_reduce(exact[2].grad, group=group)  # experts get gradients from all ranks
                tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
                for name, got, wanted in (
                    ("output", out, expected),
                    ("x", x.grad, exact[0].grad),
                    ("router", gate.grad, exact[1].grad),
                    ("experts", own.grad, exact[2].grad[2 * rank : 2 * rank + 2]),
                ):
                    error = (got.float() - wanted.float()).norm()
                    assert error <= tolerance * wanted.float().norm() + 1e-6, f"{name}: off by {error}"
                assert x.grad.dtype == x_dtype
                assert gate.grad.dtype == own.grad.dtype == torch.float32


def gradients_of_combine(group: dist.ProcessGroup, fp8: bool, scale: float) -> tuple[Tensor, Tensor, Callable]:
    """A BF16 output gradient of this size, what the rows get of it, and what dispatches tensors as they are."""
    world = dist.get_world_size(group)
    dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(fp8_dispatch_grad=fp8))
    x, topk_idx, weights = random_batch(dispatcher.rank, 24, HIDDEN, 2, 2 * world, torch.bfloat16)
    sent = dispatcher.dispatch(x, topk_idx, weights)
    rows = sent.rows.detach().requires_grad_()
    grad = (torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(99)) * scale).to(torch.bfloat16)
    dispatcher.combine(rows, sent).backward(grad)
    return grad, rows.grad, lambda value: dispatcher.dispatch(value, sent.plan).rows


@case(ranks=(1, 2))
def gradients_travel_as_fp8_only_if_asked(group: dist.ProcessGroup) -> None:
    grad, exact, send = gradients_of_combine(group, fp8=False, scale=1.0)
    assert torch.equal(exact, send(grad))
    grad, rounded, send = gradients_of_combine(group, fp8=True, scale=1.0)
    assert torch.equal(rounded, send(dequantize_e4m3(*quantize_e4m3(grad), grad.dtype)))
    assert not torch.equal(rounded, exact)


@case(ranks=(1, 2))
def gradients_that_travel_as_fp8_are_the_only_thing_rounded(group: dist.ProcessGroup) -> None:
    """Not the tokens, not the backward of dispatch, and the other way round."""
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 24, HIDDEN, 2, 2 * world, torch.bfloat16)
    plain = TokenDispatcher(group, 2 * world)
    for settings in ({"fp8_dispatch_grad": True}, {"fp8_dispatch": True}):
        dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(**settings))
        results = []
        for each in (plain, dispatcher):
            sent = each.dispatch(x, topk_idx, weights)
            grad = torch.sin(torch.arange(sent.rows.numel(), dtype=torch.float32).view_as(sent.rows)).to(x.dtype)
            (of_x,) = torch.autograd.grad(sent.rows, x, grad)  # a combine
            rows = grad.clone().requires_grad_()
            out = each.combine(rows, sent)
            (of_rows,) = torch.autograd.grad(out, rows, out.detach())  # a dispatch
            results.append({"rows": sent.rows, "x": of_x, "out": out, "gradient of rows": of_rows})
        rounded = {"gradient of rows"} if "fp8_dispatch_grad" in settings else {"rows"}
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]) is (name not in rounded), f"{name} with {settings}"


class Recorder(TorchDispatchMode):
    """Makes calls go through registered operators, and lists those of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deepep_moe":
            self.calls.append(func._opname)
        return func(*args, **(kwargs or {}))


@case(ranks=(1, 2))
def operators_give_the_same_bits_as_direct_calls(group: dist.ProcessGroup) -> None:
    """Also with FP8 in either direction, and where only the weights or only the rows require gradients."""
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 24, HIDDEN, 2, 2 * world, torch.bfloat16)

    def results(dispatcher: TokenDispatcher, wanted: list[Tensor]) -> list[Tensor]:
        for tensor in (x, weights):
            tensor.requires_grad_(any(tensor is each for each in wanted))
        sent = dispatcher.dispatch(x, topk_idx, weights)
        rows = torch.tanh(sent.rows)
        out = dispatcher.combine(rows, sent, weights=sent.weights) + dispatcher.combine(rows, sent)
        gradients = torch.autograd.grad(out, wanted, torch.cos(out.detach().float()).to(out.dtype)) if wanted else ()
        return [sent.rows, sent.weights, out, *gradients]

    for settings, requires_grad in (
        ({}, ([], [x], [weights], [x, weights])),
        ({"fp8_dispatch": True}, ([x, weights],)),
        ({"fp8_dispatch_grad": True}, ([x, weights],)),
        ({"capacity_factor": 4.0}, ([x, weights],)),
    ):
        dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(**settings))
        for wanted in requires_grad:
            direct = results(dispatcher, wanted)
            with Recorder() as recorder:
                recorded = results(dispatcher, wanted)
            for index, (got, expected) in enumerate(zip(recorded, direct, strict=True)):
                assert torch.equal(got, expected), f"result {index} with {settings}"
            assert recorder.calls[:4] == ["plan", "dispatch", "combine", "combine"]
            # The backward of a combine is a dispatch, and the other way round.
            assert sorted(recorder.calls[4:]) == (["combine", "dispatch", "dispatch"] if wanted else [])
    for wanted in ([], [x]):  # a rank under a dispatch mode agrees with ranks that call directly
        with Recorder() if dispatcher.rank == 0 else nullcontext():
            results(dispatcher, wanted)


@case(ranks=(1, 2))
def weights_that_come_back_beside_the_rows_have_gradients(group: dist.ProcessGroup) -> None:
    dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
    number = ops.register_backend(dispatcher.backend)
    x, topk_idx, weights = random_batch(dispatcher.rank, 9, 8, 2, dispatcher.num_experts)
    factors = torch.linspace(1, 2, weights.numel()).view_as(weights)
    for mode in (nullcontext(), Recorder()):
        with mode:
            sent = dispatcher.dispatch(x, topk_idx, weights)
            out, returned = ops.combine(sent.rows, sent.weights, sent.plan, number, False, False)
            torch.testing.assert_close(out, 2 * x)
            torch.testing.assert_close(returned, weights)
            for given, apply_weights in ((sent.weights, True), (None, False)):  # nothing else comes back
                assert ops.combine(sent.rows, given, sent.plan, number, apply_weights, False)[1] is None
            assert dispatcher.dispatch(x, sent.plan).weights is None
            of_x, of_weights = torch.autograd.grad((returned * factors).sum() + out.sum(), (x, weights))
        torch.testing.assert_close(of_x, torch.full_like(x, 2.0))
        torch.testing.assert_close(of_weights, factors)


@case(ranks=(2,))
def compiled_layers_send_gradients_as_fp8(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    x, topk_idx, weights = random_batch(dist.get_rank(group), 24, HIDDEN, 2, 2 * world, torch.bfloat16)
    dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig(fp8_dispatch_grad=True))

    def layer(x: Tensor) -> Tensor:
        sent = dispatcher.dispatch(x, topk_idx, weights)
        return dispatcher.combine(sent.rows, sent, weights=sent.weights)

    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    (got,) = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum(), x)
    assert torch.equal(got, expected)


@case(ranks=(1, 2))
def small_gradients_keep_the_accuracy_of_fp8(group: dist.ProcessGroup) -> None:
    """A loss that is a mean over many tokens has gradients far below one."""
    for scale in (1.0, 1e-6, 1e-9, 1e-12, 1e-30):
        grad, rounded, send = gradients_of_combine(group, fp8=True, scale=scale)
        exact = send(grad).double()
        error = (rounded.double() - exact).norm() / exact.norm()
        assert 1e-3 < error < FP8_ERROR, f"gradients of {scale:g}: relative error {error:g}"


class Layer(nn.Module):
    """One weight instead of experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.dispatcher = TokenDispatcher(group, 2 * dist.get_world_size(group))
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor, topk_idx: Tensor) -> Tensor:
        sent = self.dispatcher.dispatch(x, topk_idx)
        return self.dispatcher.combine(sent.rows * self.weight, sent)


@case(ranks=(1, 2))
def a_copied_layer_has_weights_of_its_own_and_the_same_dispatcher(group: dist.ProcessGroup) -> None:
    layer = Layer(group)
    x, topk_idx, _ = random_batch(layer.dispatcher.rank, 6, HIDDEN, 2, layer.dispatcher.num_experts)
    average = copy.deepcopy(layer)
    with torch.no_grad():
        average.weight.mul_(3.0)
    assert average.dispatcher is layer.dispatcher
    torch.testing.assert_close(average(x, topk_idx), 3 * layer(x, topk_idx))
    average(x, topk_idx).sum().backward()
    assert average.weight.grad is not None and layer.weight.grad is None
    with raises(UnsupportedError, "TokenDispatcher cannot be pickled", "state_dict"):
        torch.save(layer, io.BytesIO())


@case(ranks=(2,))
def a_rank_whose_experts_get_no_rows_takes_part_in_a_compiled_backward(group: dist.ProcessGroup) -> None:
    """Inductor leaves out what computes gradients of no rows; a dispatch among it would be missed by the other rank."""
    dispatcher = TokenDispatcher(group, 2, DispatcherConfig(timeout_seconds=60))

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        topk_idx = torch.zeros((len(x), 1), dtype=torch.int64)  # all to the expert of rank 0
        sent = dispatcher.dispatch(x, topk_idx, weights)
        return dispatcher.combine(torch.sin(sent.rows), sent, weights=sent.weights)

    given = (torch.randn(4, 8, requires_grad=True), torch.rand(4, 1, requires_grad=True))
    wanted = torch.autograd.grad(layer(*given).sum(), given)
    for got, grad in zip(torch.autograd.grad(torch.compile(layer)(*given).sum(), given), wanted, strict=True):
        torch.testing.assert_close(got, grad)


@case(ranks=(2,))
def what_a_compiled_layer_refuses_is_an_error_on_all_ranks(group: dist.ProcessGroup) -> None:
    """Nothing is converted in silence, and a rank with bad input does not leave its peer behind."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    x, topk_idx, weights = random_batch(rank, 24, HIDDEN, 2, 2 * world, torch.float32)
    dispatcher = TokenDispatcher(group, 2 * world, DispatcherConfig())

    def layer(x: Tensor, topk_idx: Tensor) -> Tensor:
        sent = dispatcher.dispatch(x, topk_idx, weights)
        return dispatcher.combine(sent.rows, sent, weights=sent.weights)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x, topk_idx)
    for name, given in (
        ("topk_idx", (x, topk_idx.float() + 0.7)),
        ("topk_idx", (x, topk_idx > 0)),
        ("x = torch.float64", (x.double(), topk_idx)),
    ):
        with raises(InputError if rank == 0 else PeerError, name, "must be"):
            compiled(*given) if rank == 0 else compiled(x, topk_idx)
    torch.testing.assert_close(compiled(x, topk_idx), expected)
    torch.testing.assert_close(compiled(x, topk_idx.int()), expected)
