"""How the local experts compute their rows: any module in a loop, plain MLPs a linear layer of all experts at a time.

All experts are computed together where they have one formula (:mod:`formula`): linear layers, activations, products and
sums, of parameters with the same shapes. That is looked at again in every forward pass, so adapters, replaced modules,
other settings or another mode count from the next one on. Everything else goes through the loop, which is what
DeepSpeed does: also modules with hooks, and everything under autocast. A line in the log says why.
How the GEMMs are called is the business of :mod:`deepep_moe.grouped`.

Where the formula ends with a linear layer that has no bias and is wider than its input, the routing weights are
multiplied into that input: fewer numbers to weigh, and the backward pass needs no copy of the output.

Parameters stay where they are. Those of one kind are brought into one storage once, expert after expert, and ZeRO keeps
them at equal distances in its flat buffers: a grouped GEMM then reads them in place. Else it gets a copy.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deepep_moe.grouped import Groups, grouped_linear, spacing
from deepep_moe.integrations.deepspeed.formula import Facts, Formula, Unproven, replaced, trace
from deepep_moe.row_scaling import scale_rows

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parameters:
    """Of one linear layer of all local experts."""

    weights: list[Tensor]
    biases: list[Tensor] | None


@dataclass(frozen=True)
class Together:
    """All local experts as one formula, for one call."""

    formula: Formula
    linears: dict[str, Parameters]

    @property
    def weighs_inside(self) -> bool:
        """Whether the routing weights had better be multiplied into the last linear layer's input."""
        last = None if self.formula.last is None else self.linears[self.formula.last]
        return last is not None and last.biases is None and last.weights[0].shape[1] < last.weights[0].shape[0]

    def compute(self, rows: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        def linear(path: str, x: Tensor) -> Tensor:
            if weights is not None and path == self.formula.last:
                x = scale_rows(x, weights)
            return grouped_linear(x, self.linears[path].weights, groups, self.linears[path].biases)

        return self.formula.compute(linear, rows)


class LocalExperts(Experts):  # type: ignore[misc]
    """DeepSpeed's ``Experts``, over rows that are grouped by expert. Made by :func:`of`; has no state of its own."""

    _recognised: Recognised | None = None

    @staticmethod
    def of(experts: Experts) -> LocalExperts:
        """``experts`` itself, with another ``forward``."""
        experts.__class__ = LocalExperts
        assert isinstance(experts, LocalExperts)
        return experts

    def forward(
        self, rows: Tensor, *, groups: Groups, together: Together | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Each expert on its rows.

        Args:
            rows: [M, H], those of expert 0, then of expert 1, ...; rows after the last group are padding.
            groups: how many rows each expert has; the loop needs the numbers on the host.
            together: from :meth:`together`; None: the loop.
            weights: [M] fp32, multiplied into the results; only where ``together.weighs_inside``.

        Returns:
            [M, H']; padding rows are undefined.
        """
        if together is not None:
            return together.compute(rows, groups, weights)
        *parts, padding = groups.split(rows)
        outputs = [_call(expert, part) for expert, part in zip(self.deepspeed_experts, parts, strict=True)]
        if len(padding):
            outputs.append(outputs[0].new_zeros(len(padding), outputs[0].shape[1]))
        return torch.cat(outputs)

    @property
    def formula(self) -> Formula | None:
        """What each local expert computes, if that is the same for all; None: they run one after another."""
        return self._look().formula

    def together(self, rows: Tensor) -> Together | None:
        """How to compute all experts on ``rows`` at once; None where a call of each is something else."""
        recognised = self._look()
        reason: str | None
        if recognised.formula is None:
            reason = recognised.reason
        elif torch.is_autocast_enabled(rows.device.type):
            reason = "autocast is on"
        elif _has_any_global_hook():
            reason = "there are global module hooks"
        elif (name := replaced()) is not None:
            reason = f"{name} is not PyTorch's own"
        elif recognised.facts.hooked is not None:
            reason = f"a {type(recognised.facts.hooked).__name__} has hooks"
        else:
            linears = {path: _parameters(layers, rows) for path, layers in recognised.layers.items()}
            unlike = [path for path, found in linears.items() if found is None]
            if not unlike:
                return Together(recognised.formula, linears)  # type: ignore[arg-type]
            reason = f"parameters of {unlike[0] or 'the Linear'!r} differ in shape, dtype or kind, or from the tokens"
        _say_once(f"{type(self.deepspeed_experts[0]).__name__} experts run one after another: {reason}")
        return None

    def pack(self) -> None:
        """Bring the weights that one grouped GEMM reads into one storage. The parameters stay the same objects."""
        for layers in self._look().layers.values():
            weights = [layer.weight for layer in layers]
            if not weights[0].is_cuda or spacing(weights) is not None or not movable(weights):
                continue  # no grouped GEMM there, done, or somebody else's memory
            for weight, place in zip(weights, torch.stack([weight.detach() for weight in weights])):
                weight.data = place

    def _look(self) -> Recognised:
        if "_recognised" not in vars(self):
            self._recognised = None  # now: an attribute that appears later would be a change of the module
        if self._recognised is None or not self._recognised.facts.hold():
            self._recognised = recognise(self)
            self._recognised.facts.hold()  # notes hooks
        return self._recognised

    def __getstate__(self) -> dict[str, Any]:  # for copies: what was recognised is about these modules
        return {name: value for name, value in vars(self).items() if name != "_recognised"}


@dataclass(frozen=True)
class Recognised:
    """What a look at the experts' modules told; good as long as ``facts`` hold."""

    formula: Formula | None
    reason: str
    """Why there is no formula."""
    layers: dict[str, list[nn.Linear]]
    """By their path in an expert, one of each."""
    facts: Facts


def recognise(local: Experts) -> Recognised:
    """The formula that all experts of ``local`` share, or why there is none."""
    facts = Facts()
    facts.module(local)
    facts.module(local.deepspeed_experts)
    experts: Sequence[nn.Module] = list(local.deepspeed_experts)
    formulas: list[Formula] = []
    try:
        for number, expert in enumerate(experts):
            formulas.append(trace(expert, facts))
            if formulas[-1] != formulas[0]:
                raise Unproven(f"expert {number} of the rank computes something else than expert 0")
    except Unproven as reason:
        return Recognised(None, str(reason), {}, facts)
    if not formulas or not formulas[0].linear_paths:
        return Recognised(None, "they have no Linear", {}, facts)
    layers = {path: [_layer(expert, path) for expert in experts] for path in formulas[0].linear_paths}
    return Recognised(formulas[0], "", layers, facts)


def movable(weights: Sequence[Tensor]) -> bool:
    """Whether they fit into one storage, and own theirs: weights in an optimizer's flat buffer must stay there."""
    alike = len({(w.shape, w.dtype, w.device) for w in weights}) == 1
    owned = all(w.untyped_storage().nbytes() == w.numel() * w.element_size() for w in weights)
    return alike and owned and len({id(w) for w in weights}) == len(weights)


def _parameters(layers: Sequence[nn.Linear], rows: Tensor) -> Parameters | None:
    """Weights and biases as ``layers`` have them now; None unless all are plain, alike, and of the rows' dtype."""
    own = [layer.__dict__["_parameters"] for layer in layers]
    weights, biases = _alike([p.get("weight") for p in own], rows), None
    if any(p.get("bias") is not None for p in own):
        biases = _alike([p.get("bias") for p in own], rows)
        if biases is None:
            return None
    return None if weights is None else Parameters(weights, biases)


def _alike(tensors: list[Tensor | None], rows: Tensor) -> list[Tensor] | None:
    """``tensors`` if they have one shape, the rows' dtype, and behave as tensors do (no subclass)."""
    dtype, shape = rows.dtype, None
    for tensor in tensors:
        if tensor is None or type(tensor) not in (nn.Parameter, Tensor) or tensor.dtype is not dtype:
            return None
        if shape is None:
            shape = tensor.shape
        elif tensor.shape != shape:
            return None
    return tensors  # type: ignore[return-value]


def _call(expert: nn.Module, part: Tensor) -> Tensor:
    """One expert on ``part [n, H]``, shaped [1, 1, n, H]: DeepSpeed's experts see four dimensions too."""
    out = expert(part[None, None])
    if isinstance(out, tuple):  # a bias beside the output is left out, as in DeepSpeed
        out = out[0]
    return out.reshape(part.shape[0], out.shape[-1])


def _layer(expert: nn.Module, path: str) -> nn.Linear:
    layer = expert.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


@functools.cache
def _say_once(text: str) -> None:
    _log.info("deepep_moe: %s", text)
