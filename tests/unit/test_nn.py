"""deepep_moe.nn without ranks: experts and routers against one token at a time, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_moe.errors import InputError
from deepep_moe.nn import GroupedExperts, TopKRouter, load_balancing_loss

HIDDEN, FFN = 12, 20
COUNTS = torch.tensor([3, 0, 4])


def one_by_one(experts: GroupedExperts, rows: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """The formula of the class, for each row."""
    owner = torch.arange(3).repeat_interleave(COUNTS)
    outputs = []
    for m, expert in enumerate(owner.tolist()):
        hidden = experts.weight1[expert] @ rows[m]
        if experts.gated:
            gate, up = hidden[:FFN], hidden[FFN:]
            hidden = experts.activation(gate) * up
        else:
            hidden = experts.activation(hidden)
        outputs.append(experts.weight2[expert] @ hidden * (1.0 if row_weights is None else row_weights[m]))
    return torch.stack(outputs)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_experts_compute_their_formula(gated: bool, recompute: bool, weighed: bool, activation: Any) -> None:
    torch.manual_seed(3)
    experts = GroupedExperts(3, HIDDEN, FFN, activation=activation, gated=gated, recompute_activation=recompute)
    rows = torch.randn(7, HIDDEN, requires_grad=True)
    row_weights = torch.rand(7, requires_grad=True) if weighed else None
    inputs = [rows, *experts.parameters(), *([row_weights] if weighed else [])]
    out, expected = experts(rows, COUNTS, row_weights), one_by_one(experts, rows, row_weights)
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_recomputing_keeps_no_activation() -> None:
    rows = torch.randn(7, HIDDEN)
    kept = {}
    for recompute in (False, True):
        experts, shapes = GroupedExperts(3, HIDDEN, FFN, recompute_activation=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):  # noqa: B023
            experts(rows, COUNTS)
        kept[recompute] = shapes.count((7, FFN))
    assert kept[True] == 0 < kept[False]


def test_initial_values_do_not_depend_on_how_experts_are_spread() -> None:
    torch.manual_seed(5)
    together = GroupedExperts(6, HIDDEN, FFN)
    after = torch.rand(())
    for first in (0, 2, 4):
        torch.manual_seed(5)
        part = GroupedExperts(range(first, first + 2), HIDDEN, FFN)
        assert torch.rand(()) == after  # the global generator goes on equally on all ranks
        assert torch.equal(part.weight1, together.weight1[first : first + 2])
        assert torch.equal(part.weight2, together.weight2[first : first + 2])
    values = torch.cat([together.weight1.flatten(1)[:, :100], together.weight2.flatten(1)[:, :100]])
    assert len({tuple(row) for row in values.tolist()}) == len(values)  # no two matrices are equal
    for weight, inputs in ((together.weight1, HIDDEN), (together.weight2, FFN)):
        bound = inputs**-0.5  # as torch.nn.Linear
        assert 0.9 * bound < weight.abs().max() <= bound
        assert abs(weight.mean()) < 0.1 * bound
    before = together.weight1.clone()
    together.reset_parameters()
    assert not torch.equal(before, together.weight1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, HIDDEN, FFN), "experts = 0"),
        ((range(0), HIDDEN, FFN), "len(experts) = 0"),
        ((2.0, HIDDEN, FFN), "experts = 2.0: must be an integer"),
        ((2, 0, FFN), "hidden_size = 0"),
        ((2, HIDDEN, -1), "ffn_size = -1"),
    ],
)
def test_sizes_of_experts_are_checked(arguments: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        GroupedExperts(*arguments)
    assert told in str(caught.value)


def test_rows_of_experts_are_checked() -> None:
    experts, rows = GroupedExperts(3, HIDDEN, FFN), torch.randn(7, HIDDEN)
    for arguments, told in (
        ((rows[:, 1:], COUNTS), "rows = shape (7, 11): must be [M, 12]"),
        ((rows[0], COUNTS), "rows = shape (12,): must be [M, 12]"),
        ((rows.double(), COUNTS), "rows = torch.float64: must be torch.float32, the dtype of the experts' weights"),
        ((rows.to("meta"), COUNTS), "rows = meta: must be on cpu, the device of the experts"),
        ((None, COUNTS), "rows = None: must be a torch.Tensor"),
        ((rows, COUNTS[1:]), "tokens_per_expert = torch.int64 of shape (2,): must be integers of shape (3,)"),
        ((rows, COUNTS.float()), "tokens_per_expert = torch.float32 of shape (3,): must be integers"),
        ((rows, [3, 0, 4]), "tokens_per_expert = a list: must be a torch.Tensor"),
        ((rows, COUNTS * 2), "tokens_per_expert = 14 rows: must be at most the 7 of rows"),
        ((rows, COUNTS - 1), "tokens_per_expert = -1: must not be negative"),
        ((rows, COUNTS, torch.ones(3)), "weights = torch.float32 of shape (3,)"),
    ):
        with pytest.raises(InputError) as caught:
            experts(*arguments)
        assert told in str(caught.value)
    with pytest.raises(InputError, match="activation = 'silu': must be a function"):
        GroupedExperts(3, HIDDEN, FFN, activation="silu")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_router_takes_the_best_experts(score: str, normalize: bool) -> None:
    torch.manual_seed(0)
    router = TopKRouter(HIDDEN, 6, 2, score=score, normalize=normalize, scale=2.5, dtype=torch.bfloat16)
    x = torch.randn(9, HIDDEN, dtype=torch.bfloat16)
    for enabled in (False, True):  # fp32 under autocast, too
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            topk_idx, weights = router(x)
        assert topk_idx.dtype == torch.int64 and weights.dtype == torch.float32
        for t in range(9):
            logits = x[t].float() @ router.weight.float().T
            scores = logits.softmax(0) if score == "softmax" else logits.sigmoid()
            best = scores.argsort(descending=True)[:2]
            assert topk_idx[t].tolist() == best.tolist()
            chosen = scores[best]
            torch.testing.assert_close(weights[t], 2.5 * (chosen / chosen.sum() if normalize else chosen))
    empty = router(x[:0])
    assert empty[0].shape == empty[1].shape == (0, 2)


def test_router_adds_the_gradient_of_its_balance_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, HIDDEN)
    router = TopKRouter(HIDDEN, 6, 2, balance_loss=lambda scores, topk_idx: 3 * load_balancing_loss(scores, topk_idx))
    _, weights = router(x)
    weights.square().sum().backward()
    got = router.weight.grad.clone()
    scores = F.linear(x, router.weight).softmax(-1)
    values, topk_idx = scores.topk(2)
    loss = (values / values.sum(-1, keepdim=True)).square().sum() + 3 * load_balancing_loss(scores, topk_idx)
    (wanted,) = torch.autograd.grad(loss, router.weight)
    torch.testing.assert_close(got, wanted)

    def fails(*_: Tensor) -> Tensor:
        raise AssertionError("only training has a loss")

    router.balance_loss = fails
    router.eval()(x)
    with torch.no_grad():
        router.train()(x)


def test_load_balancing_loss() -> None:
    even = torch.arange(8).view(4, 2) % 4
    torch.testing.assert_close(load_balancing_loss(torch.ones(4, 4), even), torch.tensor(1.0))
    skewed = torch.tensor([[1.0, 0, 0, 0]] * 4)
    torch.testing.assert_close(load_balancing_loss(skewed, torch.zeros(4, 1, dtype=torch.int64)), torch.tensor(4.0))
    dropped = torch.tensor([[0], [-1], [-1], [-1]])  # routes that are dropped load nobody
    torch.testing.assert_close(load_balancing_loss(skewed, dropped), torch.tensor(1.0))
    assert load_balancing_loss(torch.ones(0, 4), torch.zeros(0, 2, dtype=torch.int64)) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"topk": 7}, "topk = 7: must be an integer from 1 to 6"),
        ({"topk": 0}, "topk = 0"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"hidden_size": 1.5}, "hidden_size = 1.5: must be an integer"),
        ({"score": "relu"}, "score = 'relu': must be one of softmax, sigmoid"),
    ],
)
def test_options_of_the_router_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        TopKRouter(**{"hidden_size": HIDDEN, "num_experts": 6, "topk": 2, **options})
    assert told in str(caught.value)
