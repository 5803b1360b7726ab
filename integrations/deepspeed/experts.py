"""How the local experts compute their rows: any module in a loop, plain MLPs as one grouped GEMM per layer.

Two kinds of MLP are recognised: an ``nn.Sequential`` of linear layers and activations, and a gated MLP whose three
linear layers are named as in :data:`GATED`. The second kind has a forward of its own, so it is tried out against the
formula when a model is converted; a module that computes anything else stays in the loop. So does everything where
``grouped_mm`` has no kernel, everything under autocast, and modules with forward hooks.

Parameters stay where they are. Those of one kind are brought into one storage once, expert after expert, and ZeRO keeps
them at equal distances in its flat buffers: the grouped GEMM then reads them in place. Else they are copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of the linear layers in ``down(activation(gate(x)) * up(x))``."""

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Sigmoid)
_PROBES = (0.01, 1.0, 100.0)  # sizes of the inputs that a gated MLP is tried with: limits show up at large ones
_grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

Linear = Callable[[str, Tensor], Tensor]
"""``linear(name, x)``: the linear layer of that name, of each row's own expert."""
Formula = Callable[[Linear, Tensor], Tensor]
"""An MLP in terms of its linear layers."""


class LocalExperts:
    """Runs the experts of one ``deepspeed.moe.experts.Experts``; holds no parameters."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts
        self.formula = recognise(experts[0]) if _alike(experts) else None
        # Found once: with many small experts, looking for modules would take the host longer than the GPU computes.
        names = [name for name, _ in _linears(experts[0])]
        self.layers = {name: [_layer(expert, name) for expert in experts] for name in names} if self.formula else {}
        self.modules = [module for expert in experts for module in expert.modules()]

    def __call__(self, rows: Tensor, counts: Tensor, counts_host: Tensor | None) -> Tensor:
        """Each expert on its rows.

        Args:
            rows: [M, H], those of expert 0, then of expert 1, ...; rows after the last group are nobody's.
            counts: [L] integers on the rows' device.
            counts_host: the same on the CPU; if None, the loop waits for the device to learn them.

        Returns:
            [M, H']; nobody's rows are undefined.
        """
        if self.formula is not None and _fits_grouped_mm(self, rows):
            ends = counts.cumsum(0).to(torch.int32)
            return self.formula(lambda name, x: self._grouped_linear(name, x, ends), rows)
        sizes = (counts if counts_host is None else counts_host).tolist()
        parts = rows.split([*sizes, rows.shape[0] - sum(sizes)])
        outputs = [_call(expert, part) for expert, part in zip(self.experts, parts)]
        if len(parts[-1]):
            outputs.append(outputs[0].new_zeros(len(parts[-1]), outputs[0].shape[1]))
        return torch.cat(outputs)

    def pack(self) -> None:
        """Bring the weights that one grouped GEMM reads into one storage. The parameters stay the same objects."""
        for layers in self.layers.values():
            weights = [layer.weight for layer in layers]
            if not weights[0].is_cuda or _distance(weights) is not None:
                continue  # no grouped GEMM there, or done
            for weight, place in zip(weights, torch.stack([weight.detach() for weight in weights])):
                weight.data = place

    def _grouped_linear(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        layers = self.layers[name]
        weight = _Together.apply(*(layer.weight for layer in layers))
        assert _grouped_mm is not None
        out = _grouped_mm(x, weight.transpose(1, 2), offs=ends)
        if layers[0].bias is None:
            return out
        # A last row of zeros for the rows that are nobody's: what comes back for them must reach no bias.
        biases = torch.stack([*(layer.bias for layer in layers), torch.zeros_like(layers[0].bias)])
        owner = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
        return out + biases.index_select(0, owner)


def _call(expert: nn.Module, part: Tensor) -> Tensor:
    """One expert on ``part [n, H]``, shaped [1, 1, n, H]: DeepSpeed's experts see four dimensions too."""
    out = expert(part[None, None])
    if isinstance(out, tuple):  # a bias beside the output is left out, as in DeepSpeed
        out = out[0]
    return out.reshape(part.shape[0], out.shape[-1])


class _Together(torch.autograd.Function):
    """[L, ...] from L equal parameters: a view where they lie at equal distances in one storage, else a copy."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        distance = _distance(parameters)
        if distance is None:
            return torch.stack(parameters)
        first = parameters[0].detach()
        return first.as_strided((len(parameters), *first.shape), (distance, *first.stride()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.unbind(0)


def _distance(parameters: Sequence[Tensor]) -> int | None:
    """Elements from one parameter's start to the next's, if that is one number and fit for a grouped GEMM."""
    first = parameters[0]
    storage = first.untyped_storage().data_ptr()
    starts = [
        int(p.storage_offset()) for p in parameters if p.untyped_storage().data_ptr() == storage and p.is_contiguous()
    ]
    distance = starts[1] - starts[0] if len(starts) > 1 else first.numel()
    fits = distance >= first.numel() and distance * first.element_size() % 16 == 0 and first.data_ptr() % 16 == 0
    regular = starts == [starts[0] + i * distance for i in range(len(parameters))] if starts else False
    return distance if fits and regular else None


def _fits_grouped_mm(local: LocalExperts, rows: Tensor) -> bool:
    """BF16 on a GPU that has the kernel, sizes it takes, and nothing that a call of the modules would add."""
    return (
        _grouped_mm is not None
        and rows.is_cuda
        and rows.shape[0] > 0
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
        and not torch.is_autocast_enabled(rows.device.type)
        and all(
            first.weight.dtype == torch.bfloat16 and first.in_features % 8 == 0 and first.out_features % 8 == 0
            for first, *_ in local.layers.values()
        )
        and not any(module._forward_hooks or module._forward_pre_hooks for module in local.modules)
    )


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

    def formula(apply: Linear, x: Tensor) -> Tensor:
        for name, child in children:
            x = apply(name, x) if name in linear else child(x)
        return x

    return formula


def _gated(expert: nn.Module) -> Formula | None:
    for gate, up, down in GATED:
        layers = {name for name, child in expert.named_children() if type(child) is nn.Linear}
        if layers == {gate, up, down} and len(_linears(expert)) == 3:
            break
    else:
        return None
    given = [getattr(expert, name, None) for name in ("act_fn", "act", "activation", "activation_fn")]
    activation = next((function for function in given if callable(function)), F.silu)

    def formula(apply: Linear, x: Tensor) -> Tensor:
        return apply(down, activation(apply(gate, x)) * apply(up, x))

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
            expected = formula(lambda name, value: _layer(expert, name)(value), x)
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
