"""Forwards that overflow on the nvlink backend run again (deepep_moe/overflow.py), against exact sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepep_moe import DispatcherConfig, TokenDispatcher
from deepep_moe.errors import CapacityError
from deepep_moe.overflow import Replay, replay_on_overflow
from tests.gpu.conftest import TIMEOUT_SECONDS, Ranks

HIDDEN, TOPK, LAYERS = 64, 2, 3


class Layer(nn.Module):
    """A MoE layer whose router prefers the first experts, more and more from forward to forward."""

    def __init__(self, ranks: Ranks, factor: float) -> None:
        super().__init__()
        config = DispatcherConfig(
            backend="nvlink", capacity_factor=factor, num_sms=ranks.num_sms, timeout_seconds=TIMEOUT_SECONDS
        )
        self.num_experts = 4 * ranks.size
        self.dispatcher = TokenDispatcher(ranks.group, self.num_experts, config, device=ranks.device)
        self.router = nn.Linear(HIDDEN, self.num_experts, bias=False)
        self.experts = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN) / 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        bias = torch.arange(self.num_experts, 0, -1, device=x.device) * 1e-4 * self.seen
        weights, topk_idx = (self.router(x) + bias).softmax(-1).topk(TOPK)
        sent = self.dispatcher.dispatch(x, topk_idx, weights)
        places = torch.arange(sent.rows.shape[0], device=x.device)
        expert = torch.searchsorted(sent.tokens_per_expert.cumsum(0), places, right=True).clamp(max=3)
        rows = torch.bmm(sent.rows[:, None], self.experts[expert])[:, 0]
        return x + self.dispatcher.combine(rows, sent, weights=sent.weights)


def build(ranks: Ranks, factor: float) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(*[Layer(ranks, factor) for _ in range(LAYERS)]).to(ranks.device)


def train(model: nn.Module, ranks: Ranks, tokens: list[int], rate: float = 0.05) -> list[Tensor]:
    seen = []
    for step, count in enumerate(tokens):
        generator = torch.Generator(ranks.device).manual_seed(100 * step + ranks.rank)
        x = torch.randn(count, HIDDEN, generator=generator, device=ranks.device, requires_grad=True)
        loss = model(x).square().mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
        seen += [loss.detach(), x.grad]
    return [*seen, *(value.clone() for value in model.state_dict().values())]


def in_step(ranks: Ranks, replay: Replay) -> None:
    found: list[tuple[float, int, int] | None] = [None] * ranks.size
    torch.distributed.all_gather_object(found, (replay.capacity_factor, replay.replays, replay.forwards))
    assert len(set(found)) == 1, found


def test_nothing_is_lost(ranks: Ranks) -> None:
    tokens = [48, 48, 200, 200]  # the third needs more staging memory as well
    expected = train(build(ranks, 0.0), ranks, tokens)
    model = build(ranks, 0.3)
    replay = replay_on_overflow(model)
    for got, wanted in zip(train(model, ranks, tokens), expected, strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert replay.forwards == len(tokens)
    assert replay.replays >= 2
    in_step(ranks, replay)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    counts = []
    for _ in range(2):  # the same forward twice: the second time it knows the size
        model.load_state_dict(state)
        train(model, ranks, [300], rate=0.0)
        counts.append(replay.replays)
    assert counts[0] == counts[1]
    in_step(ranks, replay)


def test_many_forwards_with_overflows_at_random(ranks: Ranks) -> None:
    """Hosts are ahead of their GPUs by different amounts when an overflow comes to light."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 300, (25,), generator=generator).tolist()
    # With a rate of 0 a step does not depend on how those before it were rounded.
    expected = train(build(ranks, 0.0), ranks, tokens, rate=0.0)
    model = build(ranks, 0.2)
    replay = replay_on_overflow(model)
    for step, (got, wanted) in enumerate(zip(train(model, ranks, tokens, rate=0.0), expected, strict=True)):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, s=step: f"{s}: {text}")
    in_step(ranks, replay)


def test_without_replay_it_is_an_error(ranks: Ranks) -> None:
    model = build(ranks, 0.2)
    x = torch.randn(64, HIDDEN, device=ranks.device)
    if ranks.size == 1:
        pytest.skip("needs several ranks")

    def forwards() -> None:
        for _ in range(20):
            model(x)
            torch.cuda.synchronize()

    with pytest.raises(CapacityError) as raised:
        forwards()
    assert raised.value.needed > raised.value.room > 0
