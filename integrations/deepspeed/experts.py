"""How the local experts compute their rows: any module in a loop, plain MLPs a linear layer of all experts at a time.

Two kinds of MLP are recognised: an ``nn.Sequential`` of linear layers and activations, and a gated MLP whose three
linear layers are named as in :data:`GATED`. The second kind has a forward of its own, so it is tried out against the
formula when a model is converted; a module that computes anything else stays in the loop. So does everything under
autocast, and modules with hooks. How the GEMMs are called is the business of :mod:`deepep_moe.grouped`.

Where a recognised MLP ends with a linear layer that has no bias and is wider than its input, the routing weights are
multiplied into that input: fewer numbers to weigh, and the backward pass needs no copy of the output.

Parameters stay where they are. Those of one kind are brought into one storage once, expert after expert, and ZeRO keeps
them at equal distances in its flat buffers: a grouped GEMM then reads them in place. Else it gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deepep_moe.grouped import Groups, grouped_linear, spacing
from deepep_moe.weigh import weigh_rows

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of the linear layers in ``down(activation(gate(x)) * up(x))``."""

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Sigmoid)
_PROBES = (0.01, 1.0, 100.0)  # sizes of the inputs that a gated MLP is tried with: limits show up at large ones

Linear = Callable[[str, Tensor], Tensor]
"""``linear(name, x)``: the linear layer of that name, of each row's own expert."""


@dataclass(frozen=True)
class Formula:
    """An MLP in terms of its linear layers."""

    compute: Callable[[Linear, Tensor], Tensor]
    last: str | None
    """The linear layer whose result is the MLP's; None if something follows it."""


class LocalExperts:
    """Runs the experts of one ``deepspeed.moe.experts.Experts``; holds no parameters."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts
        self.formula = recognise(experts[0]) if _alike(experts) else None
        # Found once: with many small experts, looking for modules would take the host longer than the GPU computes.
        names = [name for name, _ in _linears(experts[0])]
        self.layers = {name: [_layer(expert, name) for expert in experts] for name in names} if self.formula else {}
        self.modules = [module for expert in experts for module in expert.modules()]
        last = None if self.formula is None or self.formula.last is None else self.layers[self.formula.last][0]
        self.weighs_inside = last is not None and last.bias is None and last.in_features < last.out_features

    def __call__(
        self, rows: Tensor, counts: Tensor, counts_host: Tensor | None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Each expert on its rows.

        Args:
            rows: [M, H], those of expert 0, then of expert 1, ...; rows after the last group are nobody's.
            counts: [L] integers on the rows' device.
            counts_host: the same on the CPU; if None, the loop waits for the device to learn them.
            weights: [M] fp32, by which the results are to be multiplied.

        Returns:
            [M, H'], nobody's rows undefined; and ``weights``, or None if they are in the results already.
        """
        if self.formula is not None and self._nothing_watches(rows):
            groups = Groups(counts, counts_host)
            inside = weights if self.weighs_inside else None
            out = self.formula.compute(lambda name, x: self._linear(name, x, groups, inside), rows)
            return out, weights if inside is None else None
        sizes = (counts if counts_host is None else counts_host).tolist()
        parts = rows.split([*sizes, rows.shape[0] - sum(sizes)])
        outputs = [_call(expert, part) for expert, part in zip(self.experts, parts)]
        if len(parts[-1]):
            outputs.append(outputs[0].new_zeros(len(parts[-1]), outputs[0].shape[1]))
        return torch.cat(outputs), weights

    def pack(self) -> None:
        """Bring the weights that one grouped GEMM reads into one storage. The parameters stay the same objects."""
        for layers in self.layers.values():
            weights = [layer.weight for layer in layers]
            if not weights[0].is_cuda or spacing(weights) is not None:
                continue  # no grouped GEMM there, or done
            for weight, place in zip(weights, torch.stack([weight.detach() for weight in weights])):
                weight.data = place

    def _linear(self, name: str, x: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        layers = self.layers[name]
        if weights is not None and self.formula is not None and name == self.formula.last:
            x = weigh_rows(x, weights)
        biases = None if layers[0].bias is None else [layer.bias for layer in layers]
        return grouped_linear(x, [layer.weight for layer in layers], groups, biases)

    def _nothing_watches(self, rows: Tensor) -> bool:
        """Whether a call of the modules would add nothing to their formula: no casts, no hooks."""
        return (
            not torch.is_autocast_enabled(rows.device.type)
            and all(layers[0].weight.dtype == rows.dtype for layers in self.layers.values())
            and not _has_any_global_hook()
            and not any(
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                for module in self.modules
            )
        )


def _call(expert: nn.Module, part: Tensor) -> Tensor:
    """One expert on ``part [n, H]``, shaped [1, 1, n, H]: DeepSpeed's experts see four dimensions too."""
    out = expert(part[None, None])
    if isinstance(out, tuple):  # a bias beside the output is left out, as in DeepSpeed
        out = out[0]
    return out.reshape(part.shape[0], out.shape[-1])


def recognise(expert: nn.Module) -> Formula | None:
    """The formula of ``expert``, or None if it is not an MLP of a known kind."""
    if any(parameter.is_meta for parameter in expert.parameters()):
        return None
    if type(expert) is nn.Sequential:
        return _sequential(expert)
    return _gated(expert)


def _sequential(expert: nn.Sequential) -> Formula | None:
    children = list(expert.named_children())
    linear = {name for name, child in children if type(child) is nn.Linear}
    if not linear or any(name not in linear and type(child) not in _ACTIVATIONS for name, child in children):
        return None

    def compute(apply: Linear, x: Tensor) -> Tensor:
        for name, child in children:
            x = apply(name, x) if name in linear else child(x)
        return x

    last = children[-1][0]
    return Formula(compute, last if last in linear else None)


def _gated(expert: nn.Module) -> Formula | None:
    for gate, up, down in GATED:
        layers = {name for name, child in expert.named_children() if type(child) is nn.Linear}
        if layers == {gate, up, down} and len(_linears(expert)) == 3:
            break
    else:
        return None
    given = [getattr(expert, name, None) for name in ("act_fn", "act", "activation", "activation_fn")]
    activation = next((function for function in given if callable(function)), F.silu)

    def compute(apply: Linear, x: Tensor) -> Tensor:
        return apply(down, activation(apply(gate, x)) * apply(up, x))

    formula = Formula(compute, down)
    return formula if _computes(expert, formula) else None


@torch.no_grad()
def _computes(expert: nn.Module, formula: Formula) -> bool:
    """Whether the module's forward is the formula, as far as a few inputs can tell."""
    weight = next(expert.parameters())
    width = _linears(expert)[0][1].in_features
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        for size in _PROBES:
            x = (torch.randn(1, 1, 4, width, generator=generator) * size).to(weight.device, weight.dtype)
            expected = formula.compute(lambda name, value: _layer(expert, name)(value), x)
            try:
                got = expert(x)
            except (TypeError, RuntimeError):  # wants other arguments or shapes
                return False
            if isinstance(got, tuple):
                got = got[0]
            if not torch.equal(got, expected):
                return False
    return True


def _layer(expert: nn.Module, name: str) -> nn.Linear:
    layer = expert.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _linears(expert: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in expert.named_modules() if isinstance(module, nn.Linear)]


def _alike(experts: Sequence[nn.Module]) -> bool:
    """Whether all experts are copies but for their values: the same modules and parameters, by name, kind and shape."""
    kinds = [
        (
            [(name, type(module)) for name, module in expert.named_modules()],
            [(name, parameter.shape, parameter.dtype) for name, parameter in expert.named_parameters()],
        )
        for expert in experts
    ]
    return all(kind == kinds[0] for kind in kinds)
