"""Linear layers of a rank's experts over rows that are grouped by expert: :func:`grouped_linear`, :func:`grouped_mlp`.

All GEMMs are PyTorch's. There are two ways to call them, in the forward and in the backward pass:

* One GEMM per expert, written directly into that expert's rows of the output. Fastest where each GEMM fills the GPU.
  The host must know the group sizes; any device and dtype.
* All experts in one ``grouped_mm``. Fastest for small experts, where kernel launches would take longer than the work,
  and the only way that needs no group sizes on the host. BF16, on GPUs of compute capability 9.0 or newer.

:func:`_in_one_call` chooses per call. Nothing is concatenated or copied, except weights in separate parameters that are
read by one ``grouped_mm`` (see :func:`stacked`).

The GEMMs write into ``out=`` tensors, which autocast does not cast; so :func:`grouped_linear` casts its arguments as
autocast casts those of ``torch.nn.functional.linear``.

Under torch.compile a linear layer is one opaque operator, ``deepep_moe::grouped_linear``, because the group sizes are
data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepep_moe.tracing import is_traced

_grouped_mm: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

_LARGE = 4e10
"""FLOPs per expert from which one GEMM per expert is faster. On an H200, ``grouped_mm`` was faster by 23 % at 1.5e10
FLOPs and by 4 % at 3e10; one GEMM per expert by 1 % at 6e10 and by 9 % at 2.4e11."""


class Groups:
    """The number of rows of each expert: the first rows are expert 0's, then come expert 1's, ...

    Rows after the last group are padding: nothing is computed from them, and their output is undefined.

    Args:
        counts: [L] integers on any device.
        counts_host: the same numbers on the CPU, if the host knows them.
    """

    def __init__(self, counts: Tensor, counts_host: Tensor | None = None) -> None:
        self._counts = counts
        if counts_host is None and counts.device.type == "cpu":
            counts_host = counts
        self._counts_host = counts_host
        self._sizes: list[int] | None = None
        self._ends: Tensor | None = None

    @property
    def on_host(self) -> bool:
        """Whether :meth:`sizes` returns without waiting for the device."""
        return self._sizes is not None or self._counts_host is not None

    @property
    def counts(self) -> Tensor:
        """[L] integers, on the CPU if the host knows them."""
        return self._counts if self._counts_host is None else self._counts_host

    def sizes(self) -> list[int]:
        """Rows of each group. Waits for the device if the host does not know them yet."""
        if self._sizes is None:
            self._sizes = self.counts.tolist()
        return self._sizes

    def ends(self, device: torch.device) -> Tensor:
        """[L] int32 on ``device``: the row after each group's last."""
        if self._ends is None or self._ends.device != device:
            ends = self._counts.cumsum(0).to(torch.int32)
            if ends.device.type == "cpu" and device.type == "cuda":
                ends = ends.pin_memory()  # a copy from pageable memory would wait for the stream
            self._ends = ends.to(device, non_blocking=True)
        return self._ends

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """L + 1 views of ``rows [M, ...]``: each group's rows, then the padding after the last group."""
        sizes = self.sizes()
        return rows.split([*sizes, rows.shape[0] - sum(sizes)])


def grouped_linear(
    rows: Tensor, weight: Tensor | Sequence[Tensor], groups: Groups, bias: Sequence[Tensor] | None = None
) -> Tensor:
    """Each group's rows times the transposed weight of its expert, plus its bias. Differentiable once.

    Args:
        rows: [M, I], any dtype that PyTorch multiplies.
        weight: [L, O, I], or L matrices of [O, I], in the dtype of the rows.
        groups: the rows of each of the L experts.
        bias: L vectors of [O], in the dtype of the rows.

    Returns:
        [M, O]; under autocast in autocast's dtype. Padding rows are undefined.
    """
    if isinstance(weight, Tensor) and bias is None and is_traced(rows):
        return _grouped_linear_op(autocast(rows), autocast(weight), groups.counts)  # type: ignore[no-any-return]
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    parameters = [autocast(parameter) for parameter in (*weights, *(bias or ()))]
    result: Tensor = _GroupedLinear.apply(autocast(rows), groups, len(weights), *parameters)
    return result


def grouped_mlp(
    rows: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    groups: Groups,
    activate: Callable[[Tensor, Tensor | None], Tensor],
    row_weights: Tensor | None = None,
    *,
    recompute_activation: bool = False,
) -> Tensor:
    """Two grouped linear layers with an activation between them. Differentiable once.

    Args:
        rows: [M, H].
        weight1: [L, O, H].
        weight2: [L, H', I].
        groups: the rows of each of the L experts.
        activate: from the first layer's output [M, O] and ``row_weights`` to the second layer's input [M, I].
        row_weights: [M], passed to ``activate``.
        recompute_activation: do not keep the output of ``activate`` for the backward pass but compute it again there.

    Returns:
        [M, H']; under autocast in autocast's dtype. Padding rows are undefined.
    """
    hidden = grouped_linear(rows, weight1, groups)
    if not recompute_activation or is_traced(rows):  # torch.compile decides itself what to recompute
        return grouped_linear(activate(hidden, row_weights), weight2, groups)
    # The cast of weight2 is outside of the function, where autograd casts the gradient back.
    output: Tensor = _ActivateAndProject.apply(activate, hidden, row_weights, autocast(weight2), groups)
    return output


def autocast(argument: Tensor) -> Tensor:
    """``argument`` as autocast passes it to a linear layer: in autocast's dtype if it is enabled, except fp64."""
    device = argument.device.type
    if not torch.is_autocast_enabled(device) or argument.dtype == torch.float64:
        return argument
    return argument.to(torch.get_autocast_dtype(device))


def project(rows: Tensor, weights: Sequence[Tensor], groups: Groups, biases: Sequence[Tensor] = ()) -> Tensor:
    """:func:`grouped_linear` without autograd: [M, O].

    Args:
        rows: [M, I].
        weights: L matrices of [O, I], or one tensor of [L, O, I].
        groups: the rows of each of the L experts.
        biases: L vectors of [O], or none.
    """
    one_call = _in_one_call(rows, weights, groups)
    if one_call is not None:
        out = one_call(rows, stacked(weights).transpose(1, 2), offs=groups.ends(rows.device))
        if biases:
            out += _bias_per_row(biases, groups, rows)
        return out
    matrices = _matrices(weights)
    out = rows.new_empty(rows.shape[0], matrices[0].shape[0])
    *inputs, _ = groups.split(rows)
    *outputs, padding = groups.split(out)
    _multiply(inputs, [matrix.t() for matrix in matrices], outputs, biases)
    padding.zero_()
    return out


def input_gradient(gradient: Tensor, weights: Sequence[Tensor], groups: Groups) -> Tensor:
    """The gradient of the rows, [M, I], from ``gradient [M, O]`` of the output."""
    one_call = _in_one_call(gradient, weights, groups)
    if one_call is not None:
        return one_call(gradient, stacked(weights), offs=groups.ends(gradient.device))
    matrices = _matrices(weights)
    result = gradient.new_empty(gradient.shape[0], matrices[0].shape[1])
    *parts, _ = groups.split(gradient)
    *outputs, padding = groups.split(result)
    _multiply(parts, matrices, outputs)
    padding.zero_()
    return result


def weight_gradients(gradient: Tensor, rows: Tensor, weights: Sequence[Tensor], groups: Groups) -> Sequence[Tensor]:
    """The gradient of each of ``weights``, in its shape."""
    one_call = _in_one_call(gradient, weights, groups)
    if one_call is not None:
        together = one_call(gradient.t(), rows, offs=groups.ends(rows.device))
        return (together,) if weights[0].dim() == 3 else together.unbind(0)
    results = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    *parts, _ = groups.split(gradient)
    *inputs, _ = groups.split(rows)
    _multiply([part.t() for part in parts], inputs, _matrices(results))
    return results


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[L, ...] from L tensors of one shape: a view if they lie at equal distances in one storage, else a copy."""
    if weights[0].dim() == 3:
        return weights[0]
    step = spacing(weights)
    if step is None:
        return torch.stack([weight.detach() for weight in weights])
    first = weights[0].detach()
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()))


def spacing(tensors: Sequence[Tensor]) -> int | None:
    """Elements from one tensor's start to the next's; None unless it is one number that ``grouped_mm`` can use."""
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


class _ActivateAndProject(torch.autograd.Function):
    """The activation and the second linear layer; keeps ``hidden`` and computes the activation again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        activate: Callable[[Tensor, Tensor | None], Tensor],
        hidden: Tensor,
        row_weights: Tensor | None,
        weight: Tensor,
        groups: Groups,
    ) -> Tensor:
        ctx.activate, ctx.groups = activate, groups
        device = hidden.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
        ctx.save_for_backward(hidden, row_weights, weight)
        return project(autocast(activate(hidden, row_weights)), (weight,), groups)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        _, *wants_inputs, wants_weight, _ = ctx.needs_input_grad
        with torch.enable_grad(), torch.autocast(gradient.device.type, **ctx.autocast):  # as in the forward
            inputs = [
                None if tensor is None else tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(saved, wants_inputs)
            ]
            activated = autocast(ctx.activate(*inputs))
        grad_weight = weight_gradients(gradient, activated.detach(), (weight,), ctx.groups)[0] if wants_weight else None
        grads: list[Tensor | None] = [None, None]
        if any(wants_inputs):
            found = iter(
                torch.autograd.grad(
                    activated,
                    [tensor for tensor, wanted in zip(inputs, wants_inputs) if tensor is not None and wanted],
                    input_gradient(gradient, (weight,), ctx.groups),
                )
            )
            grads = [next(found) if wanted else None for wanted in wants_inputs]
        return None, *grads, grad_weight, None


@torch.library.custom_op("deepep_moe::grouped_linear", mutates_args=())
def _grouped_linear_op(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return project(rows, (weight,), Groups(counts))


@_grouped_linear_op.register_fake
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@torch.library.custom_op("deepep_moe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward_op(
    gradient: Tensor, rows: Tensor, weight: Tensor, counts: Tensor, wants_rows: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    groups, gradient, empty = Groups(counts), gradient.contiguous(), rows.new_empty(0)
    grad_rows = input_gradient(gradient, (weight,), groups) if wants_rows else empty
    grad_weight = weight_gradients(gradient, rows, (weight,), groups)[0] if wants_weight else empty.clone()
    return grad_rows, grad_weight


@_grouped_linear_backward_op.register_fake
def _(
    gradient: Tensor, rows: Tensor, weight: Tensor, counts: Tensor, wants_rows: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_rows = rows.new_empty(rows.shape if wants_rows else (0,))
    return grad_rows, weight.new_empty(weight.shape if wants_weight else (0,))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    wants_rows, wants_weight, _ = ctx.needs_input_grad
    grads = _grouped_linear_backward_op(gradient, *ctx.saved_tensors, wants_rows, wants_weight)
    return grads[0] if wants_rows else None, grads[1] if wants_weight else None, None


_grouped_linear_op.register_autograd(_backward, setup_context=_save_for_backward)


def _in_one_call(rows: Tensor, weights: Sequence[Tensor], groups: Groups) -> Callable[..., Tensor] | None:
    """``grouped_mm`` if it supports these tensors and is faster, by the work of the average expert; else None."""
    weight = weights[0]
    if _grouped_mm is None or not _takes(rows, weight):
        return None
    experts = len(weights) if weight.dim() == 2 else weight.shape[0]
    work = 2.0 * rows.shape[0] / experts * weight.shape[-2] * weight.shape[-1]
    return None if groups.on_host and work >= _LARGE else _grouped_mm


def _takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` has a kernel: BF16, compute capability 9.0, and row sizes in multiples of 16 bytes."""
    return (
        rows.is_cuda
        and rows.shape[0] > 0
        and rows.dtype == weight.dtype == torch.bfloat16
        and weight.shape[-2] % 8 == 0
        and weight.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )


def _multiply(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], outputs: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> None:
    """``outputs[i] = lefts[i] @ rights[i]``, plus ``biases[i]`` to each row if given."""
    for i, (left, right, output) in enumerate(zip(lefts, rights, outputs)):
        if biases:
            torch.addmm(biases[i], left, right, out=output)
        else:
            torch.mm(left, right, out=output)


def _matrices(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    return weights[0].unbind(0) if weights[0].dim() == 3 else weights


def _bias_per_row(biases: Sequence[Tensor], groups: Groups, rows: Tensor) -> Tensor:
    """[M, O]: the bias of each row's expert; zeros for padding rows."""
    table = torch.stack([*biases, torch.zeros_like(biases[0])])
    ends = groups.ends(rows.device)
    owner = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype), right=True)
    return table.index_select(0, owner)


def _sums(gradient: Tensor, weights: Sequence[Tensor], groups: Groups) -> Sequence[Tensor]:
    """[O] for each expert: the sum of its rows, in fp32, rounded once."""
    one_call = _in_one_call(gradient, weights, groups)
    if one_call is None:
        *parts, _ = groups.split(gradient)
        return [part.sum(0) for part in parts]
    ones = gradient.new_ones(gradient.shape[0], 8)  # the narrowest that grouped_mm takes
    return one_call(gradient.t(), ones, offs=groups.ends(gradient.device))[..., 0].contiguous().unbind(0)
