"""Linear layers of a rank's experts, over rows that are grouped by expert: :func:`grouped_linear`.

All GEMMs are PyTorch's. There are two ways to call them, the same in the forward and the backward pass:

* One GEMM per expert, written straight into that expert's rows of the output. The fastest where each of them fills the
  GPU. The host has to know the group sizes; any device and dtype.
* All experts in one ``grouped_mm``. The fastest for small experts, whose launches would cost more than their work, and
  the only way that needs no group sizes on the host. BF16, on GPUs of compute capability 9.0 or newer.

The choice is made per call, by :func:`_in_one_call`. Nothing is concatenated or copied either way, but for weights of
separate parameters that one ``grouped_mm`` shall read (see :func:`stacked`).

The GEMMs write into ``out=`` tensors, which autocast leaves alone; so :func:`grouped_linear` casts its arguments, as
autocast casts those of ``torch.nn.functional.linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

_LARGE = 4e10
"""FLOPs from which a GEMM of its own is the faster way. On an H200, ``grouped_mm`` was faster by 23 % at 1.5e10 FLOPs
per expert and by 4 % at 3e10; one GEMM each by 1 % at 6e10 and by 9 % at 2.4e11."""


class Groups:
    """How many rows each expert has: the first rows are expert 0's, then come expert 1's, ...

    Rows after the last group are nobody's: nothing is computed from them, and what an output has there is undefined.

    Args:
        counts: [L] integers on any device.
        counts_host: the same on the CPU, if the host knows them.
    """

    def __init__(self, counts: Tensor, counts_host: Tensor | None = None) -> None:
        self._counts = counts
        if counts_host is None and counts.device.type == "cpu":
            counts_host = counts
        self._sizes: list[int] | None = None if counts_host is None else counts_host.tolist()
        self._ends: Tensor | None = None

    @property
    def on_host(self) -> bool:
        """Whether :meth:`sizes` needs no waiting."""
        return self._sizes is not None

    def sizes(self) -> list[int]:
        """Rows of each group. Waits for the device where the host does not know them yet."""
        if self._sizes is None:
            self._sizes = self._counts.tolist()
        return self._sizes

    def ends(self, device: torch.device) -> Tensor:
        """[L] int32 on ``device``: the row after each group's last."""
        if self._ends is None or self._ends.device != device:
            self._ends = self._counts.to(device, non_blocking=True).cumsum(0).to(torch.int32)
        return self._ends

    def cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each group's rows of ``rows [M, ...]``, as views, then nobody's."""
        sizes = self.sizes()
        return rows.split([*sizes, rows.shape[0] - sum(sizes)])


def grouped_linear(
    rows: Tensor, weight: Tensor | Sequence[Tensor], groups: Groups, bias: Sequence[Tensor] | None = None
) -> Tensor:
    """Each group's rows times the transposed weight of its expert, plus its bias. Differentiable once.

    Args:
        rows: [M, I].
        weight: [L, O, I], or the L experts' parameters of [O, I].
        bias: L parameters of [O].

    Returns:
        [M, O]; under autocast in autocast's dtype.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    parameters = [autocast(parameter) for parameter in (*weights, *(bias or ()))]
    result: Tensor = _GroupedLinear.apply(autocast(rows), groups, len(weights), *parameters)
    return result


def autocast(argument: Tensor) -> Tensor:
    """What autocast makes of a linear layer's argument: in its dtype where it is on for the device, but for fp64."""
    device = argument.device.type
    if not torch.is_autocast_enabled(device) or argument.dtype == torch.float64:
        return argument
    return argument.to(torch.get_autocast_dtype(device))


def project(rows: Tensor, weights: Sequence[Tensor], groups: Groups, biases: Sequence[Tensor] = ()) -> Tensor:
    """:func:`grouped_linear` without gradients; ``weights`` is L matrices, or one tensor of L."""
    one_call = _in_one_call(rows, weights, groups)
    if one_call is not None:
        out = one_call(rows, stacked(weights).transpose(1, 2), offs=groups.ends(rows.device))
        if biases:
            out += _of_each_row(biases, groups, rows)
        return out
    matrices = _matrices(weights)
    out = rows.new_empty(rows.shape[0], matrices[0].shape[0])
    *inputs, _ = groups.cut(rows)
    *outputs, nobodys = groups.cut(out)
    _multiply(inputs, [matrix.t() for matrix in matrices], outputs, biases)
    nobodys.zero_()
    return out


def input_gradient(gradient: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    """[M, I]: of the rows, from ``gradient [M, O]`` of the output."""
    one_call = _in_one_call(gradient, weights, groups)
    if one_call is not None:
        return one_call(gradient, stacked(weights), offs=groups.ends(gradient.device))
    matrices = _matrices(weights)
    result = gradient.new_empty(gradient.shape[0], matrices[0].shape[1])
    *parts, _ = groups.cut(gradient)
    *places, nobodys = groups.cut(result)
    _multiply(parts, matrices, places)
    nobodys.zero_()
    return result


def weight_gradients(gradient: Tensor, rows: Tensor, weights: Sequence[Tensor], groups: Groups) -> Sequence[Tensor]:
    """One for each of ``weights``, of its shape."""
    one_call = _in_one_call(gradient, weights, groups)
    if one_call is not None:
        together = one_call(gradient.t(), rows, offs=groups.ends(rows.device))
        return (together,) if weights[0].dim() == 3 else together.unbind(0)
    results = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    *parts, _ = groups.cut(gradient)
    *inputs, _ = groups.cut(rows)
    _multiply([part.t() for part in parts], inputs, _matrices(results))
    return results


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[L, ...] from L equal tensors: a view where they lie at equal distances in one storage, else a copy."""
    if weights[0].dim() == 3:
        return weights[0]
    step = spacing(weights)
    if step is None:
        return torch.stack([weight.detach() for weight in weights])
    first = weights[0].detach()
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()))


def spacing(tensors: Sequence[Tensor]) -> int | None:
    """Elements from one tensor's start to the next's, if that is one number and fit for ``grouped_mm``."""
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    starts = [
        int(t.storage_offset()) for t in tensors if t.untyped_storage().data_ptr() == storage and t.is_contiguous()
    ]
    step = starts[1] - starts[0] if len(starts) > 1 else first.numel()
    fits = step >= first.numel() and step * first.element_size() % 16 == 0 and first.data_ptr() % 16 == 0
    regular = starts == [first.storage_offset() + i * step for i in range(len(tensors))]
    return step if fits and regular else None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Groups, num_weights: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:num_weights], parameters[num_weights:]
        ctx.groups, ctx.num_biases = groups, len(biases)
        ctx.save_for_backward(rows, *weights)
        return project(rows, weights, groups, biases)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        needs = ctx.needs_input_grad
        grad_rows = input_gradient(gradient, weights, ctx.groups) if needs[0] else None
        grads: Sequence[Tensor | None] = [None] * len(weights)
        if any(needs[3 : 3 + len(weights)]):
            grads = weight_gradients(gradient, rows, weights, ctx.groups)
        bias_grads: Sequence[Tensor | None] = [None] * ctx.num_biases
        if any(needs[3 + len(weights) :]):
            bias_grads = _sums(gradient, weights, ctx.groups)
        return grad_rows, None, None, *grads, *bias_grads


def _in_one_call(rows: Tensor, weights: Sequence[Tensor], groups: Groups) -> Callable[..., Tensor] | None:
    """``grouped_mm`` where it can be used and is the better way, by the work of the average expert."""
    weight = weights[0]
    if _grouped_mm is None or not _takes(rows, weight):
        return None
    experts = len(weights) if weight.dim() == 2 else weight.shape[0]
    work = 2.0 * rows.shape[0] / experts * weight.shape[-2] * weight.shape[-1]
    return None if groups.on_host and work >= _LARGE else _grouped_mm


def _takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` has a kernel for these: BF16 on a new enough GPU, and rows of 16 bytes or a multiple."""
    return (
        rows.is_cuda
        and rows.shape[0] > 0
        and rows.dtype == weight.dtype == torch.bfloat16
        and weight.shape[-2] % 8 == 0
        and weight.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )


def _multiply(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], places: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> None:
    """``places[i] = lefts[i] @ rights[i]``, plus ``biases[i]`` to each row if given."""
    for i, (left, right, place) in enumerate(zip(lefts, rights, places)):
        if biases:
            torch.addmm(biases[i], left, right, out=place)
        else:
            torch.mm(left, right, out=place)


def _matrices(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    return weights[0].unbind(0) if weights[0].dim() == 3 else weights


def _of_each_row(biases: Sequence[Tensor], groups: Groups, rows: Tensor) -> Tensor:
    """[M, O]: the bias of each row's expert; zeros for the rows that are nobody's."""
    table = torch.stack([*biases, torch.zeros_like(biases[0])])
    ends = groups.ends(rows.device)
    owner = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype), right=True)
    return table.index_select(0, owner)


def _sums(gradient: Tensor, weights: Sequence[Tensor], groups: Groups) -> Sequence[Tensor]:
    """[O] for each expert: the sum of its rows, in fp32 and rounded once."""
    one_call = _in_one_call(gradient, weights, groups)
    if one_call is None:
        *parts, _ = groups.cut(gradient)
        return [part.sum(0) for part in parts]
    ones = gradient.new_ones(gradient.shape[0], 8)  # the narrowest that grouped_mm takes
    return one_call(gradient.t(), ones, offs=groups.ends(gradient.device))[..., 0].contiguous().unbind(0)
