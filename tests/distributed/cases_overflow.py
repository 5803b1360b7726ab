"""Forwards that overflow their fixed sizes run again (deepep_moe/overflow.py), against exact sizes: nothing is lost."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepep_moe import DispatcherConfig, TokenDispatcher, notices
from deepep_moe.errors import CapacityError, InputError
from deepep_moe.overflow import Replay, replay_on_overflow
from tests.launch import case

HIDDEN, EXPERTS, TOPK, LAYERS = 16, 8, 2, 3


class Layer(nn.Module):
    """A MoE layer whose router likes the first experts, more and more from step to step."""

    def __init__(self, group: dist.ProcessGroup, config: DispatcherConfig, recompute: bool) -> None:
        super().__init__()
        self.dispatcher = TokenDispatcher(group, EXPERTS, config)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        local = EXPERTS // dist.get_world_size(group)
        self.experts = nn.Parameter(torch.randn(local, HIDDEN, HIDDEN) / 4)
        self.dropout = nn.Dropout(0.1)
        self.recompute = recompute
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out = checkpoint(self.moe, x, use_reentrant=False) if self.recompute else self.moe(x)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * out.detach().sum()  # a new tensor
        return x + out

    def moe(self, x: Tensor) -> Tensor:
        bias = torch.arange(EXPERTS, 0, -1) * 2e-4 * self.seen
        weights, topk_idx = (self.router(x) + bias).softmax(-1).topk(TOPK)
        sent = self.dispatcher.dispatch(x, topk_idx, weights)
        counts = sent.tokens_per_expert.tolist()
        rows = sent.rows.split([*counts, len(sent.rows) - sum(counts)])
        done = [F.gelu(part @ weight) for part, weight in zip(rows, self.experts)] + [rows[-1]]
        return self.dropout(self.dispatcher.combine(torch.cat(done), sent, weights=sent.weights))


def build(group: dist.ProcessGroup, factor: float, *, recompute: bool = False, **settings: int) -> nn.Module:
    torch.manual_seed(5 + dist.get_rank())
    config = DispatcherConfig(capacity_factor=factor, **settings)
    model = nn.Sequential(*[Layer(group, config, recompute) for _ in range(LAYERS)])
    for layer in model:
        dist.broadcast(layer.router.weight.data, 0)
    return model


def train(model: nn.Module, tokens: list[int], meets: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Losses, gradients and what the model is after a step per number of tokens; ``meets``: ranks with one loss."""
    torch.manual_seed(11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, Tensor] = {}
    for step, count in enumerate(tokens):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(count, HIDDEN, generator=generator, requires_grad=True)
        out = model(x)
        loss = out.square().mean() if count else out.sum()
        if meets is not None:
            total = loss.detach().clone()
            dist.all_reduce(total, group=meets)
            loss = loss * (1 + total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen |= {f"loss {step}": loss.detach(), f"input gradient {step}": x.grad, f"random {step}": torch.rand(3)}
    return {**seen, **{name: value.detach().clone() for name, value in model.state_dict().items()}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def same_on_all_ranks(replay: Replay) -> None:
    found: list[tuple[float, int, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (replay.capacity_factor, replay.replays, replay.forwards))
    assert len(set(found)) == 1


@case(ranks=(1, 2, 4))
def nothing_is_lost_and_the_factor_adapts(group: dist.ProcessGroup) -> None:
    tokens = [24, 24, 40, 40, 40]
    for recompute, backend in ((False, "collective"), (True, "collective"), (False, "hierarchical")):
        if backend == "hierarchical" and dist.get_world_size() < 4:
            continue
        nodes = {"backend": backend, "ranks_per_node": 2 if backend == "hierarchical" else 0}
        expected = train(build(group, 0.0, recompute=recompute, **nodes), tokens)
        model = build(group, 0.3, recompute=recompute, **nodes)
        replay = replay_on_overflow(model)
        assert_same(train(model, tokens), expected)
        assert replay.forwards == len(tokens)
        assert replay.replays >= min(2, dist.get_world_size())
        assert 0.3 < replay.capacity_factor <= dist.get_world_size() * 1.2
        same_on_all_ranks(replay)

        before = replay.replays
        train(model, [40, 40])
        assert replay.replays == before  # it has learnt the size


@case(ranks=(4,))
def ranks_outside_of_the_dispatchers_group_replay_too(group: dist.ProcessGroup) -> None:
    """Two groups of two ranks: one overflows, the other has few tokens. Forwards communicate over all four."""
    pairs = [dist.new_group(ranks) for ranks in ((0, 1), (2, 3))]
    own = pairs[dist.get_rank() // 2]

    class Meeting(Layer):
        def forward(self, x: Tensor) -> Tensor:
            mean = self.router.weight.detach().mean().clone()
            dist.all_reduce(mean, group=group)
            return super().forward(x) + mean

    def meeting(factor: float) -> nn.Module:
        model = build(own, factor, max_tokens_per_rank=40)
        for layer in model:
            layer.__class__ = Meeting
        return model

    tokens = [4, 40, 40] if dist.get_rank() < 2 else [2, 2, 2]
    expected = train(meeting(0.0), tokens, meets=group)
    model = meeting(0.4)
    replay = replay_on_overflow(model, group=group)
    assert_same(train(model, tokens, meets=group), expected)
    assert replay.replays >= 1
    same_on_all_ranks(replay)


@case(ranks=(2,))
def a_rank_without_tokens_gets_room(group: dist.ProcessGroup) -> None:
    """Its room follows from its own tokens: no factor makes it more."""
    tokens = [(0, 24), (24, 0), (24, 3)]
    own = [pair[dist.get_rank()] for pair in tokens]
    expected = train(build(group, 0.0), own)
    model = build(group, 0.5)
    replay = replay_on_overflow(model)
    assert_same(train(model, own), expected)
    assert replay.replays > 0
    same_on_all_ranks(replay)


@case(ranks=(2,))
def copies_replay_with_their_own_weights(group: dist.ProcessGroup) -> None:
    model = build(group, 0.3)
    replay = replay_on_overflow(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    expected = build(group, 0.0)
    expected.load_state_dict(copied.state_dict())
    x = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    for one in (expected, copied):
        one.eval()
    with torch.no_grad():
        torch.testing.assert_close(copied(x), expected(x))
    assert replay.replays > 0


@case(ranks=(2,))
def errors_are_raised_as_without_it(group: dist.ProcessGroup) -> None:
    model = build(group, 4.0)
    replay_on_overflow(model)
    x = torch.randn(6, HIDDEN)
    model(x)
    with pytest.raises(InputError, match=r"x = torch\.float64") if dist.get_rank() else pytest.raises(RuntimeError):
        model.double()(x.double()) if dist.get_rank() else model(x)
    model.float()
    model(x)  # the ranks are still in step
    with pytest.raises(InputError, match="replays already"):
        replay_on_overflow(model)
    with pytest.raises(InputError, match=r"model = int: must be a torch\.nn\.Module"):
        replay_on_overflow(3)
    empty = nn.Linear(2, 2)
    replay_on_overflow(empty)
    with pytest.raises(InputError, match="model = Linear: has no TokenDispatcher"):
        empty(torch.ones(2))

    exact = build(group, 0.0)  # capacity_factor = 0: there is nothing to do
    replay = replay_on_overflow(exact)
    exact(x)
    assert (replay.forwards, replay.replays, replay.capacity_factor) == (0, 0, 0)


@case(ranks=(1, 2))
def a_model_that_refuses_nan_runs_again(group: dist.ProcessGroup) -> None:
    class Finite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not x.isfinite().all():
                raise FloatingPointError("not finite")
            return x

    exact, layers = build(group, 0.0), build(group, 0.5)
    model = nn.Sequential(layers[0], Finite(), *layers[1:])
    replay = replay_on_overflow(model)
    x = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for net in (exact, model):
        torch.manual_seed(11)
        results.append(net(x))
    torch.testing.assert_close(results[1], results[0])
    assert replay.replays > 0
    with pytest.raises(FloatingPointError, match="not finite"):  # without an overflow it is the model's own error
        model(torch.full((12, HIDDEN), math.inf))


@case(ranks=(2,))
def without_it_an_overflow_is_an_error_on_every_rank(group: dist.ProcessGroup) -> None:
    model = build(group, 0.2)
    with pytest.raises(CapacityError, match=r"needs room for \d+ .*capacity_factor = 0\.2 with max_tokens") as raised:
        model(torch.randn(30, HIDDEN))
    assert raised.value.needed > raised.value.room > 0
    assert not raised.value.staging


@case(ranks=(2,))
def what_runs_the_layers_may_be_any_function(group: dist.ProcessGroup) -> None:
    """As a captured graph does it, without calling the model: forward and backward, both repeated."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(40, HIDDEN, generator=generator)
    nets = [build(group, factor).eval() for factor in (0.0, 0.3)]
    replay, calls = replay_on_overflow(nets[1]), 0

    def step(net: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        net.zero_grad()
        loss = nn.Sequential.forward(net, x).square().mean()
        loss.backward()
        return loss.detach()

    expected = step(nets[0])
    calls = 0
    torch.testing.assert_close(replay.run(nets[1], lambda: step(nets[1])), expected)
    assert calls == replay.replays + 1 > 1
    assert str(replay).startswith(f"replays {replay.replays}, capacity factor ")
    for got, wanted in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


@case(ranks=(1,))
def the_setting_alone_is_said_to_have_no_effect(group: dist.ProcessGroup) -> None:
    told = "replay_on_overflow has no effect on a TokenDispatcher by itself"
    config = DispatcherConfig(capacity_factor=1.0, replay_on_overflow=True)
    for replays in (True, False):
        net = nn.Sequential(Layer(group, config, recompute=False))
        if replays:
            replay_on_overflow(net)
        with mock.patch.object(notices, "_warned", set()):
            net(torch.randn(8, HIDDEN))
            assert replays != any(told in text for text in notices._warned)
