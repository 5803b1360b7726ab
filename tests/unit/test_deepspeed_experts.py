"""Which experts of DeepSpeed's native MoE are computed together: those whose code is a formula, while it is one."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from deepspeed.moe.experts import Experts

from deepep_moe.grouped import Groups
from deepep_moe.integrations.deepspeed import experts as module
from deepep_moe.integrations.deepspeed.experts import LocalExperts, movable
from tests import deepspeed_experts
from tests.deepspeed_experts import (
    CHANGES,
    LOOPS,
    RECOGNISED,
    WIDTH,
    ByGlobal,
    Counting,
    Gated,
    Lora,
    OnlyInTraining,
    WithDefault,
    WithDropout,
    WithLimit,
    mlp,
)


def local(make: Callable[[], nn.Module], number: int = 3) -> LocalExperts:
    """Experts with weights of their own."""
    made = LocalExperts.of(Experts(make(), number))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return made


def run(experts: LocalExperts, fast: bool) -> list[Tensor]:
    """Results and all gradients; in the loop, or as it is chosen."""
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    groups = Groups(torch.tensor([4, 0, 5]))
    rows = x * 1  # a leaf cannot be changed in place, which an activation may do
    together = experts.together(rows) if fast else None
    experts.zero_grad()
    out = experts(rows, groups=groups, together=together)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in (x, *experts.parameters()) if p.grad is not None)]


def assert_equal_to_the_loop(experts: LocalExperts) -> None:
    for got, expected in zip(run(experts, True), run(experts, False), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make", RECOGNISED)
def test_a_formula_computes_what_the_module_does(make: Callable[[], nn.Module]) -> None:
    experts = local(make)
    assert experts.formula is not None, experts._look().reason
    assert experts.together(torch.randn(1, WIDTH)) is not None
    assert_equal_to_the_loop(experts)


@pytest.mark.parametrize(("make", "reason"), LOOPS)
def test_all_else_stays_in_the_loop(make: Callable[[], nn.Module], reason: str) -> None:
    experts = local(make)
    experts.eval()  # as from_pretrained leaves a model: nothing is dropped now, but later
    if make is OnlyInTraining:
        assert experts.formula is not None
        experts.train()
    assert experts.formula is None
    assert reason in experts._look().reason


@pytest.mark.parametrize(("change", "together"), CHANGES)
def test_changes_count_from_the_next_call_on(change: Callable[[LocalExperts], object], together: bool) -> None:
    experts = local(lambda: mlp(nn.LeakyReLU()))
    assert experts.together(torch.randn(1, WIDTH)) is not None
    change(experts)
    assert (experts.together(torch.randn(1, WIDTH)) is not None) is together
    assert_equal_to_the_loop(experts)


def test_changes_that_are_taken_back() -> None:
    experts = local(mlp)
    first = experts.deepspeed_experts[0]
    handle = first[0].register_forward_hook(lambda *_: None)
    assert experts.together(torch.randn(1, WIDTH)) is None
    handle.remove()
    assert experts.together(torch.randn(1, WIDTH)) is not None
    first[0] = Lora(first[0])
    assert experts.together(torch.randn(1, WIDTH)) is None
    first[0] = first[0].base  # merged
    assert experts.together(torch.randn(1, WIDTH)) is not None


def test_settings_and_flags_that_the_code_reads() -> None:
    experts = local(lambda: WithLimit(None))
    assert experts.formula is not None
    for expert in experts.deepspeed_experts:
        expert.limit = 1.0
    assert experts.formula is None
    experts = local(OnlyInTraining)
    experts.eval()
    assert experts.formula is not None
    experts.deepspeed_experts[1].train()
    assert experts.formula is None
    experts = local(WithDefault)
    assert experts.formula is not None
    assert_equal_to_the_loop(experts)
    with mock.patch.object(WithDefault.forward, "__defaults__", (3.0,)):
        assert_equal_to_the_loop(experts)
    experts = local(ByGlobal)
    assert experts.formula is not None
    with mock.patch.object(deepspeed_experts, "LIMIT", 3):
        assert [step.operation.path for step in experts.formula.steps] == ["gate_proj", "down_proj"]
        assert_equal_to_the_loop(experts)
    assert len(experts.formula.steps) == 5


@pytest.mark.parametrize(
    ("owner", "name"), [(F, "linear"), (nn.Linear, "forward"), (nn.GELU, "forward"), (nn.Module, "__call__")]
)
def test_what_profilers_put_in_pytorchs_place_is_called(owner: object, name: str) -> None:
    experts = local(mlp)
    real = getattr(owner, name)
    calls = 0

    @functools.wraps(real)
    def counting(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    assert experts.together(torch.randn(1, WIDTH)) is not None
    with mock.patch.object(owner, name, counting):
        assert experts.together(torch.randn(1, WIDTH)) is None
        run(experts, True)
    assert calls >= 3
    assert experts.together(torch.randn(1, WIDTH)) is not None


def test_global_hooks_autocast_and_dtypes() -> None:
    experts, rows = local(mlp), torch.randn(1, WIDTH)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert experts.together(rows) is None
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.together(rows) is None
    assert experts.together(rows.bfloat16()) is None
    assert experts.together(rows) is not None
    experts.deepspeed_experts[2].to(torch.bfloat16)  # after the others, which is where only the first was looked at
    assert experts.together(rows) is None


def test_a_parameter_of_another_shape() -> None:
    experts = local(mlp)
    experts.deepspeed_experts[2][0] = nn.Linear(WIDTH, 7)
    experts.deepspeed_experts[2][2] = nn.Linear(7, WIDTH)
    assert experts.formula is not None
    assert experts.together(torch.randn(1, WIDTH)) is None
    assert_equal_to_the_loop(experts)


def test_weights_shared_by_experts_get_the_gradient_of_all() -> None:
    experts = local(mlp)
    for expert in experts.deepspeed_experts:
        expert[0] = experts.deepspeed_experts[0][0]
        expert[2].weight = experts.deepspeed_experts[0][2].weight
    assert experts.together(torch.randn(1, WIDTH)) is not None
    assert_equal_to_the_loop(experts)


def test_a_look_leaves_everything_as_it_was() -> None:
    experts = local(Counting)
    state = torch.random.get_rng_state()
    assert experts.formula is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in experts.parameters())
    assert all("calls" not in vars(expert) for expert in experts.deepspeed_experts)


def test_nothing_is_traced_again_while_nothing_changes() -> None:
    for make in (mlp, Gated, WithDropout, lambda: WithLimit(7.0)):
        experts = local(make)
        experts.together(torch.randn(1, WIDTH))
        with mock.patch.object(module, "trace", side_effect=AssertionError("traced again")):
            experts.together(torch.randn(1, WIDTH))


def test_a_copy_looks_at_its_own_modules() -> None:
    experts = local(mlp)
    assert experts.formula is not None
    copied = copy.deepcopy(experts)
    copied.deepspeed_experts[0][1] = nn.PReLU()
    assert copied.formula is None
    assert experts.formula is not None


def test_the_log_says_once_why_experts_run_one_after_another(caplog: pytest.LogCaptureFixture) -> None:
    module._say_once.cache_clear()
    experts = local(lambda: Gated(nn.PReLU()))
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(3):
            experts.together(torch.randn(1, WIDTH))
    (line,) = caplog.messages
    assert "Gated experts run one after another" in line and "prelu" in line


def test_only_weights_that_nothing_else_shares_are_moved() -> None:
    own = [nn.Linear(4, 4).weight for _ in range(2)]
    assert movable(own)
    flat = torch.zeros(64)  # as ZeRO's
    in_a_buffer = [nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[32:48].view(4, 4))]
    assert not movable(in_a_buffer)
    assert not movable([own[0], own[0]])
    assert not movable([own[0], nn.Linear(4, 5).weight])
