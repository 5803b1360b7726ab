"""Native MoE of more than stock modules: every result and gradient is the stock layer's, or there is an error."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor, nn

from deepep_moe.errors import HandleError, InputError, PeerError, UnsupportedError
from deepep_moe.integrations.deepspeed import MoE, convert
from tests.deepspeed_experts import CHANGES, LOOPS, RECOGNISED, WIDTH, Gated, OnlyInTraining, WithDropout, mlp
from tests.distributed.cases_dispatcher import raises
from tests.distributed.deepspeed_util import device, near
from tests.launch import case

EXPERTS = 4
SETTINGS = {"timeout_seconds": 30.0}
Change = Callable[[Any], object]


def layer_of(
    ours: bool,
    make: Callable[[], nn.Module] = mlp,
    before: Change | None = None,
    after: Change | None = None,
    **options: Any,
) -> StockMoE:
    """A connected layer whose experts differ. ``before`` and ``after``: what happens to it around conversion."""
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False)
    torch.manual_seed(7)
    given = {"k": 2, "drop_tokens": False, "min_capacity": 0, "use_rts": False, "top2_2nd_expert_sampling": False}
    layer = StockMoE(WIDTH, make(), EXPERTS, **{"ep_size": dist.get_world_size(), **given, **options})
    local = len(layer.deepspeed_moe.experts.deepspeed_experts)
    for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        torch.manual_seed(100 + dist.get_rank() % layer.ep_size * local + index)
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.4)
    layer.to(device())
    torch.manual_seed(8)
    if before is not None:
        before(layer)
    layer.set_deepspeed_parallelism()
    if ours:
        convert(layer, SETTINGS)
        layer(tokens(), None)  # what was recognised is kept from here on
    torch.manual_seed(9)
    if after is not None:
        after(layer)
        layer.to(device())
    layer.zero_grad()
    return layer


def tokens(count: int = 13, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    return torch.randn(count, WIDTH, generator=generator).to(device())


def outcome(layer: nn.Module, x: Tensor | None = None, used_token: Tensor | None = None) -> dict[str, Tensor | None]:
    """All that a step gives: results, and every gradient, None where there is none."""
    x = (tokens() if x is None else x).clone().requires_grad_()
    torch.manual_seed(11)
    out, aux_loss, counts = layer(x, used_token)
    if out.requires_grad:
        (out.float().square().sum() + 0.1 * aux_loss.float()).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": out.detach(), "loss": aux_loss.detach(), "counts": counts, "x": x.grad, **gradients}


def same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float, what: str) -> None:
    assert got.keys() == expected.keys(), f"{what}: {got.keys() ^ expected.keys()}"
    for name, value in expected.items():
        found = got[name]
        assert (found is None) == (value is None), f"{what}: {name} is {found}, stock DeepSpeed has {value}"
        if found is not None and value is not None:
            assert found.dtype == value.dtype, f"{what}: {name} is {found.dtype}, stock DeepSpeed has {value.dtype}"
            near(found, value, tolerance, f"{what}: {name}")


def as_stock(what: str, tolerance: float = 1e-5, **how: Any) -> None:
    same(outcome(layer_of(True, **how)), outcome(layer_of(False, **how)), tolerance, what)


def experts_of(layer: StockMoE) -> Experts:
    return layer.deepspeed_moe.experts


# ------------------------------------------------------------------------------------------------------- experts


@case(ranks=(2,))
def experts_of_all_kinds(group: dist.ProcessGroup) -> None:
    """With weights of their own each; Dropout and the like as in evaluation, since no two masks are the same."""
    for number, make in enumerate([*RECOGNISED, *(make for make, _ in LOOPS)]):
        if not list(make().parameters()):
            continue  # all experts are the same: gradients of the gate are nothing but rounding
        others = ({"drop_tokens": True, "capacity_factor": 0.7}, {"use_residual": True, "k": 1})
        for options in ({}, others[number % 2]):
            as_stock(f"expert {number}", make=make, before=lambda layer: layer.eval(), **options)


@case(ranks=(2,))
def experts_that_change_after_conversion(group: dist.ProcessGroup) -> None:
    """Adapters, replaced modules, parametrizations, hooks, other settings: on both sides the same change."""
    for number, (change, _) in enumerate(CHANGES):
        as_stock(
            f"change {number}",
            make=lambda: mlp(nn.LeakyReLU()),
            after=lambda layer, change=change: change(experts_of(layer)),
            ep_size=1,
        )


@case(ranks=(2,))
def dropout_of_experts_that_were_converted_in_evaluation(group: dist.ProcessGroup) -> None:
    """from_pretrained leaves a model in evaluation mode; all that is dropped makes zeros."""
    for make in (WithDropout, OnlyInTraining, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(1.0))):
        layer = layer_of(True, make, before=lambda layer: layer.eval())
        assert layer(tokens())[0].abs().sum() > 0
        layer.train()
        assert layer(tokens())[0].abs().sum() == 0
        layer.eval()
        assert layer(tokens())[0].abs().sum() > 0


@case(ranks=(2,))
def frozen_and_shared_parameters(group: dist.ProcessGroup) -> None:
    def freeze_one(layer: StockMoE) -> None:
        experts_of(layer).deepspeed_experts[0].requires_grad_(False)

    def freeze_all(layer: StockMoE) -> None:
        experts_of(layer).requires_grad_(False)

    def share_modules(layer: StockMoE) -> None:
        for expert in experts_of(layer).deepspeed_experts:
            expert[0] = experts_of(layer).deepspeed_experts[0][0]

    def share_weights(layer: StockMoE) -> None:
        for expert in experts_of(layer).deepspeed_experts:
            expert[2].weight = experts_of(layer).deepspeed_experts[0][2].weight

    for change in (freeze_one, freeze_all, share_modules, share_weights):
        for when in ("before", "after"):
            as_stock(f"{change.__name__}, {when}", ep_size=1, **{when: change})


# --------------------------------------------------------------------------------------------------------- hooks


def hooks_on(module: nn.Module, name: str, seen: Counter[str]) -> None:
    module.register_forward_pre_hook(lambda *_: seen.update([f"{name} pre"]))
    module.register_forward_hook(lambda *_: seen.update([f"{name} forward"]))
    module.register_full_backward_hook(lambda *_: seen.update([f"{name} backward"]))


@case(ranks=(2,))
def hooks_are_called_as_often_as_in_stock(group: dist.ProcessGroup) -> None:
    """On every module of a layer, one at a time and together, with and without capacity."""
    names = [name for name, _ in layer_of(False).named_modules()]
    for options in ({}, {"drop_tokens": True}):
        for chosen in (*([name] for name in names), names):
            found = []
            for ours in (False, True):
                seen: Counter[str] = Counter()

                def register(layer: StockMoE, chosen: list[str] = chosen, seen: Counter[str] = seen) -> None:
                    for name in chosen:
                        hooks_on(layer.get_submodule(name), name, seen)

                found.append((outcome(layer_of(ours, after=register, **options)), seen))
            (expected, stock_seen), (got, seen) = found
            assert seen == stock_seen, f"{chosen}: {seen} instead of {stock_seen}"
            same(got, expected, 1e-5, f"hooks on {chosen}")


@case(ranks=(2,))
def hooks_that_change_what_passes(group: dist.ProcessGroup) -> None:
    def twice(layer: StockMoE, path: str) -> None:
        layer.get_submodule(path).register_forward_hook(lambda module, given, out: out * 2)

    def weights_halved(layer: StockMoE) -> None:
        layer.deepspeed_moe.gate.register_forward_hook(lambda module, given, out: (*out[:5], out[5] / 2, *out[6:]))

    inside = "deepspeed_moe.experts"
    for path in (f"{inside}.deepspeed_experts.0.2", f"{inside}.deepspeed_experts.1", inside, "deepspeed_moe"):
        as_stock(f"hook on {path}", after=lambda layer, path=path: twice(layer, path), make=narrow)
    for k in (1, 2, 3):
        as_stock("hook on the gate", after=weights_halved, k=k)


def narrow() -> nn.Module:
    """Routing weights are multiplied in before the last layer, where nobody looks."""
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.GELU(), nn.Linear(4, WIDTH, bias=False))


@case(ranks=(2, 4))
def hooks_on_one_rank_only(group: dist.ProcessGroup) -> None:
    """As for logging: the others must not meet another collective."""
    seen: list[object] = []

    def watch(layer: StockMoE) -> None:
        if dist.get_rank() == 0:
            for module in layer.modules():
                module.register_forward_hook(lambda module, *_: seen.append(module))

    same(outcome(layer_of(True, after=watch)), outcome(layer_of(False)), 1e-5, "hooks on rank 0")
    assert bool(seen) == (dist.get_rank() == 0)
    seen.clear()  # else the garbage collector has to end this layer, later on rank 0 than elsewhere


# --------------------------------------------------------------------------------------------------------- gates


class NearestGate(TopKGate):
    """A user's gate: other experts than DeepSpeed's, in DeepSpeed's form."""

    def forward(
        self, input: Tensor, used_token: Any = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Any:
        logits = nn.functional.linear(input.float(), self.wg.weight.float())
        weights, chosen = torch.softmax(-logits.abs(), 1).topk(2, dim=1)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        capacity = counts.max().clone()
        dist.all_reduce(capacity, dist.ReduceOp.MAX, group=self.ep_group)
        one_hot = nn.functional.one_hot(chosen, EXPERTS).flatten(0, 1)
        places = ((one_hot.cumsum(0) - 1) * one_hot).sum(1).view(chosen.shape)
        loss = logits.square().mean()
        return loss, capacity, EXPERTS, chosen.t().int(), places.t().int(), weights.t(), counts


@case(ranks=(2,))
def gates_of_other_kinds(group: dist.ProcessGroup) -> None:
    def other_class(layer: StockMoE) -> None:
        layer.deepspeed_moe.gate.__class__ = NearestGate

    def own_forward(layer: StockMoE) -> None:
        gate = layer.deepspeed_moe.gate
        gate.forward = lambda *given: NearestGate.forward(gate, *given)

    class Parametrized(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.tanh() * 2

    def parametrized(layer: StockMoE) -> None:
        nn.utils.parametrize.register_parametrization(layer.deepspeed_moe.gate.wg, "weight", Parametrized())

    for change in (other_class, own_forward, parametrized):
        for when in ("before", "after"):
            as_stock(f"{change.__name__}, {when}", **{when: change})
    as_stock("use_tutel without Tutel", use_tutel=True)
    for k, options in ((1, {"noisy_gate_policy": "RSample"}), (1, {"noisy_gate_policy": "Jitter"}), (3, {})):
        as_stock(f"noise, top-{k}", k=k, **options)


@case(ranks=(2,))
def a_gate_that_is_patched(group: dist.ProcessGroup) -> None:
    """As programs do that change DeepSpeed's gating."""
    from unittest import mock

    from deepspeed.moe import sharded_moe

    real = sharded_moe.top2gating

    def halved(*given: Any, **named: Any) -> Any:
        loss, capacity, experts, chosen, places, weights, counts = real(*given, **named)
        return loss * 3, capacity, experts, chosen, places, weights / 2, counts

    with mock.patch.object(sharded_moe, "top2gating", halved):
        as_stock("top2gating of the program's own")


# ------------------------------------------------------------------------------------------------------ autocast


@case(ranks=(2,))
def autocast(group: dist.ProcessGroup) -> None:
    """Results of stock's dtypes, and as near to fp32's as stock's: it rounds more often than we do."""
    kind = device().type
    for number, options in enumerate(
        ({}, {"k": 1}, {"k": 3}, {"drop_tokens": True}, {"use_residual": True}, {"make": Gated}, {"make": narrow})
    ):
        exact = outcome(layer_of(False, **options))
        for dtype in (torch.bfloat16, torch.float16):
            found = []
            for ours in (False, True):
                layer = layer_of(ours, **options)
                with torch.autocast(kind, dtype):
                    found.append(outcome(layer))
            stock, got = found
            for name, value in stock.items():
                what = f"autocast {number} to {dtype}: {name}"
                assert got[name] is not None and got[name].dtype == value.dtype, what
                if torch.equal(stock["counts"], exact["counts"]):  # else rounding sent a token elsewhere
                    errors = [(one[name].double() - exact[name].double()).norm() for one in (got, stock)]
                    one_rounding = torch.finfo(dtype).eps / 2 * exact[name].double().norm()  # stock's may cancel out
                    assert errors[0] <= 2 * errors[1] + one_rounding, f"{what}: {errors}"
                near(got[name], value, 3e-2 if dtype == torch.bfloat16 else 4e-3, what)


@case(ranks=(2,))
def autocast_of_a_model_in_bf16_and_around_the_forward_alone(group: dist.ProcessGroup) -> None:
    def to_bf16(layer: StockMoE) -> None:
        layer.bfloat16()
        layer.deepspeed_moe.gate.wg.float()

    for k in (1, 2):
        found = []
        for ours in (False, True):
            layer = layer_of(ours, after=to_bf16, k=k)
            x = tokens().bfloat16()
            with torch.autocast(device().type, torch.bfloat16):
                out, aux_loss, _ = layer(x)
            (out.float().square().sum() + aux_loss.float()).backward()
            found.append((out, aux_loss, experts_of(layer).deepspeed_experts[0][0].weight.grad))
        for got, expected in zip(found[1], found[0], strict=True):
            assert got.dtype == expected.dtype
            near(got, expected, 3e-2, f"model in bf16, top-{k}")


@case(ranks=(2,))
def no_tokens_on_a_rank_whose_gate_is_called(group: dist.ProcessGroup) -> None:
    """Autocast and hooks take another way through the gate; a rank without tokens stays possible."""
    watched = {"after": lambda layer: layer.deepspeed_moe.gate.register_forward_hook(lambda *_: None)}
    x = tokens(0 if dist.get_rank() else 3)
    for k in (1, 2, 3):
        expected = outcome(layer_of(True, k=k), x)
        same(outcome(layer_of(True, k=k, min_capacity=4, **watched), x), expected, 1e-5, f"hooks, top-{k}")
        layer = layer_of(True, k=k, min_capacity=4)
        with torch.autocast(device().type, torch.bfloat16):
            got = outcome(layer, x)
        for name, value in expected.items():
            near(got[name], value, 3e-2, f"autocast, top-{k}: {name}")


# ------------------------------------------------------------------------------------------------------ refusals


def refused_on_all(layer: nn.Module, bad: Callable[[], object], kind: type[Exception], *texts: str) -> None:
    """``bad`` on the last rank is an error there and a PeerError elsewhere, at once; the layer works afterwards."""
    last = dist.get_world_size() - 1
    started = time.monotonic()
    if dist.get_rank() == last:
        with raises(kind, *texts):
            bad()
    else:
        with raises(PeerError, f"rank {last}", *texts):
            layer(tokens())
    assert time.monotonic() - started < 5
    gc.collect()  # an error's traceback keeps its layer on one rank only, and with it the backend that others make anew
    assert layer(tokens())[0].shape == (13, WIDTH)


@case(ranks=(2, 4))
def a_rank_that_cannot_go_on_tells_the_others(group: dist.ProcessGroup) -> None:
    layer = layer_of(True, after=lambda layer: convert(layer, {**SETTINGS, "max_tokens_per_rank": 20}))
    refused_on_all(layer, lambda: layer(tokens(21)), InputError, "max_tokens_per_rank = 20", "21 tokens")
    refused_on_all(layer, lambda: layer(torch.ones(3, WIDTH + 1, device=device())), RuntimeError, "shapes")
    refused_on_all(layer, lambda: layer(tokens().double()), InputError, "x = torch.float64")
    for wrong, said in (([[1.0]], "a list"), (None, "None"), (torch.tensor(1.0, device=device()), "a scalar")):
        refused_on_all(layer, lambda: layer(wrong), InputError, f"hidden_states = {said}")  # noqa: B023
    refused_on_all(layer, lambda: layer(tokens(), [1]), InputError, "used_token = a list")

    experts = experts_of(layer).deepspeed_experts

    def with_an_expert_less() -> None:
        taken = experts.pop(len(experts) - 1)
        try:
            layer(tokens())
        finally:
            experts.append(taken)

    refused_on_all(
        layer,
        with_an_expert_less,
        InputError,
        "experts.deepspeed_experts = 0 modules" if len(experts) == 1 else "must be 2",
    )

    for settings in (SETTINGS, {**SETTINGS, "num_chunks": 2}):
        convert(layer, settings)

        def fail(*_: object) -> None:
            raise ArithmeticError("this expert does not work")

        def with_a_failing_expert() -> None:
            handle = experts[0].register_forward_pre_hook(fail)
            try:
                layer(tokens())
            finally:
                handle.remove()

        refused_on_all(layer, with_a_failing_expert, ArithmeticError, "this expert does not work")

    layer = layer_of(True, k=1, drop_tokens=True, min_capacity=4)
    refused_on_all(layer, lambda: layer(tokens(3)), AssertionError, "min_capacity")
    layer = layer_of(True, k=1)
    refused_on_all(layer, lambda: layer(tokens(), torch.ones(4, device=device())), RuntimeError, "size")


class OwnLayer(MOELayer):
    def forward(self, *input: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(*input, **kwargs) * 2


class OwnExperts(Experts):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * 2


@case(ranks=(2,))
def layers_with_code_of_their_own_are_refused(group: dist.ProcessGroup) -> None:
    """A forward that this library's would replace in silence."""

    def other_layer(layer: StockMoE) -> None:
        layer.deepspeed_moe.__class__ = OwnLayer

    def other_experts(layer: StockMoE) -> None:
        layer.deepspeed_moe.experts.__class__ = OwnExperts

    def forward_of_the_layer(layer: StockMoE) -> None:
        layer.deepspeed_moe.forward = lambda *given: given[0]

    def batch_norm(layer: StockMoE) -> None:
        experts_of(layer).deepspeed_experts[0].append(nn.BatchNorm2d(1))

    for change, text in (
        (other_layer, "OwnLayer has a forward of its own"),
        (other_experts, "OwnExperts has a forward of its own"),
        (forward_of_the_layer, "MOELayer has a forward of its own"),
        (batch_norm, "BatchNorm2d in experts.deepspeed_experts.0.3"),
    ):
        model = nn.ModuleList([layer_of(False), layer_of(False, before=change)])
        with raises(UnsupportedError, text):
            convert(model)
        assert type(model[0].deepspeed_moe) is MOELayer  # nothing was changed
    layer = layer_of(True, after=other_experts)
    with raises(UnsupportedError, "OwnExperts has a forward of its own"):
        layer(tokens())
    with raises(HandleError, "set_deepspeed_parallelism"):
        MoE(WIDTH, mlp(), EXPERTS)(tokens())
