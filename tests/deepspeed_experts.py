"""Experts for the tests of DeepSpeed's native MoE: some that a formula expresses, and some that none does."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from deepspeed.moe.experts import Experts
from torch import Tensor, nn
from torch.nn.utils import parametrizations

WIDTH = 8
LIMIT = None  # a global that an expert reads


class Gated(nn.Module):
    def __init__(self, act_fn: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 6, bias=False), nn.Linear(WIDTH, 6, bias=False)
        self.down_proj = nn.Linear(6, WIDTH, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class TwoStatements(Gated):
    """As Mixtral's expert is written; the other factor first."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.up_proj(hidden_states) * self.act_fn(self.gate_proj(hidden_states))
        hidden = self.down_proj(hidden)
        return hidden


class WithDefault(Gated):
    def forward(self, x: Tensor, slope: float = 0.2) -> Tensor:
        return self.down_proj(F.leaky_relu(self.gate_proj(x), slope) * self.up_proj(x))


class WithLimit(Gated):
    limit: float | None

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
        return self.down_proj(F.silu(gate) * self.up_proj(x))


class OnlyInTraining(Gated):
    def forward(self, x: Tensor) -> Tensor:
        out = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(out, 1.0) if self.training else out


class WithDropout(Gated):
    def __init__(self, p: float = 1.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) * self.scale


class PlainSiLU(nn.Module):
    """An activation class of a model's own, as transformers has them."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)


class WithMethod(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def activation(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.slope

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Counting(Gated):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ByShape(Gated):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 100:
            return self.down_proj(self.gate_proj(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Catching(Gated):
    """Code that a symbol which asks for too much would send another way than a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.down_proj(x.abs() * self.up_proj(x))
        except Exception:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ByGlobal(Gated):
    def forward(self, x: Tensor) -> Tensor:
        if LIMIT is not None:
            return self.down_proj(self.gate_proj(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ByIdentity(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj
        same = gate is self.gate_proj
        return self.down_proj(F.silu(gate(x)) * self.up_proj(x)) if same else self.down_proj(gate(x))


class InPlace(Gated):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate_proj(x)
        other = hidden
        hidden *= self.up_proj(x)
        return self.down_proj(other)


class NoGrad(Gated):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.t()) @ self.b.t()


class LinearSubclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def mlp(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 6), activation or nn.GELU(), nn.Linear(6, WIDTH))


def tied() -> nn.Sequential:
    linear, activation = nn.Linear(WIDTH, WIDTH), nn.Tanh()
    return nn.Sequential(linear, activation, linear, activation, nn.Linear(WIDTH, WIDTH, bias=False))


def replaced_forward() -> nn.Module:
    expert = mlp()
    expert[0].forward = lambda x: F.linear(x, expert[0].weight) * 3  # type: ignore[method-assign]
    return expert


def plain_tensor_as_weight() -> nn.Module:
    expert = mlp()
    weight = expert[0].weight.detach()
    del expert[0].weight
    expert[0].weight = weight * 2  # type: ignore[assignment]
    return expert


RECOGNISED = [
    mlp,
    lambda: mlp(nn.GELU(approximate="tanh")),
    lambda: mlp(nn.ReLU(inplace=True)),
    lambda: mlp(nn.Identity()),
    lambda: nn.Linear(WIDTH, WIDTH),
    tied,
    lambda: nn.Sequential(mlp(), nn.SiLU(inplace=True), mlp()),
    Gated,
    lambda: Gated(nn.SiLU()),
    lambda: Gated(PlainSiLU()),
    lambda: Gated(F.gelu),
    TwoStatements,
    WithDefault,
    lambda: WithLimit(None),
    ByGlobal,
]

LOOPS = [
    (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)), "dropout"),
    (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)), "layer_norm"),
    (lambda: nn.Sequential(nn.ReLU()), "no Linear"),
    (lambda: WithLimit(7.0), ".clamp"),
    (OnlyInTraining, "dropout"),
    (WithDropout, "dropout"),
    (lambda: Gated(nn.PReLU()), "prelu"),
    (lambda: Gated(Swish()), "'beta', which is a parameter or buffer of Swish"),
    (lambda: Gated(Scaled()), "'scale', which is a parameter or buffer of Scaled"),
    (lambda: Gated(lambda x: F.silu(x)), "act_fn"),
    (WithMethod, "WithMethod.activation"),
    (Counting, "Counting.calls"),
    (ByShape, ".shape"),
    (Catching, "plain statements"),
    (ByIdentity, "plain statements"),
    (InPlace, "in place"),
    (NoGrad, "not a plain function"),
    (lambda: nn.Sequential(Lora(nn.Linear(WIDTH, WIDTH))), "parameter or buffer of Lora"),
    (lambda: nn.Sequential(LinearSubclass(WIDTH, WIDTH)), "LinearSubclass"),
    (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), "linear"),
    (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))), "linear"),
    (replaced_forward, "forward of a Linear is replaced"),
    (plain_tensor_as_weight, "no parameter"),
]


def different_slopes(experts: Experts) -> None:
    for number, expert in enumerate(experts.deepspeed_experts):
        expert[1].negative_slope = 0.1 * number


def replace_expert(experts: Experts) -> None:
    experts.deepspeed_experts[1] = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH))


def replace_list(experts: Experts) -> None:
    experts.deepspeed_experts = nn.ModuleList(Lora(nn.Linear(WIDTH, WIDTH)) for _ in experts.deepspeed_experts)


def set_item(path: int, make: Callable[[nn.Module], nn.Module]) -> Callable[[Experts], None]:
    def change(experts: Experts) -> None:
        experts.deepspeed_experts[1][path] = make(experts.deepspeed_experts[1][path])

    return change


def on_linear(change: Callable[[nn.Linear], object]) -> Callable[[Experts], object]:
    return lambda experts: change(experts.deepspeed_experts[1][0])


CHANGES: list[tuple[Callable[[Experts], object], bool]] = [
    # what changes, and whether the formula is still used
    (set_item(0, Lora), False),
    (set_item(1, lambda _: nn.PReLU()), False),
    (set_item(1, lambda _: nn.Tanh()), False),
    (set_item(1, lambda _: nn.LeakyReLU(0.3)), False),
    (set_item(2, lambda _: nn.Linear(6, WIDTH)), True),
    (different_slopes, False),
    (replace_expert, False),
    (replace_list, False),
    (on_linear(parametrizations.weight_norm), False),
    (on_linear(nn.utils.weight_norm), False),
    (on_linear(lambda one: one.register_forward_hook(lambda *_: None)), False),
    (on_linear(lambda one: one.register_forward_pre_hook(lambda _, x: (x[0] * 2,))), False),
    (on_linear(lambda one: one.register_full_backward_hook(lambda *_: None)), False),
    (on_linear(lambda one: setattr(one, "forward", types.MethodType(nn.Linear.forward, one))), False),
    (on_linear(lambda one: setattr(one, "__class__", LinearSubclass)), False),
    (on_linear(lambda one: setattr(one, "bias", None)), False),
    (on_linear(lambda one: setattr(one, "weight", nn.Parameter(torch.randn(6, WIDTH)))), True),
    (on_linear(lambda one: one.weight.requires_grad_(False)), True),
    (on_linear(lambda one: one.__dict__.update(note="nobody reads this")), True),
    (lambda experts: experts.deepspeed_experts[0].register_forward_hook(lambda *_: None), False),
    (lambda experts: experts.deepspeed_experts[0].compile(backend="eager"), False),
    (lambda experts: experts.eval(), True),
    (lambda experts: experts.train(), True),
]
