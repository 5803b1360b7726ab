"""The differentiable operators ``deepep_moe::plan``, ``::dispatch`` and ``::combine``.

They wrap a backend's verbs as torch.library custom ops, so autograd, activation checkpointing, torch.compile and
FakeTensor all see three opaque calls with known shapes. The one fact behind the gradients: **dispatch and combine
are transposes of each other on the same plan**, so the backward of one is the other. A combine that multiplies
rows by weights first is ``combine(w * rows)``, and its gradients follow by the product rule.

A plan passes through the ops as its list of tensors. A backend passes as a number from :func:`register_backend`:
the registry is weak, whoever made the number keeps the backend alive.

Where a tensor is absent an output has no rows (``[0]``): operators cannot return None.

``dispatch`` and ``combine`` register their autograd as a kernel of their own, a plain autograd.Function: per call
that costs the host a third of what torch.library.register_autograd does, and a layer makes four such calls.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from deepep_moe.backends.base import Backend, Plan
from deepep_moe.errors import HandleError
from deepep_moe.fp8 import dequantize_e4m3
from deepep_moe.watched import watched
from deepep_moe.weigh import weigh_gradients

NO_LIMIT = -1

_by_number: WeakValueDictionary[int, Backend] = WeakValueDictionary()
_numbers: WeakKeyDictionary[Backend, int] = WeakKeyDictionary()
_next_number = itertools.count()


def register_backend(backend: Backend) -> int:
    """The number under which the ops find ``backend``; it ends with the backend's last reference."""
    number = _numbers.get(backend)
    if number is None:
        number = _numbers[backend] = next(_next_number)
        _by_number[number] = backend
    return number


def _backend(number: int) -> Backend:
    try:
        return _by_number[number]
    except KeyError:
        raise HandleError("the dispatcher that made this plan is gone; keep it until the backward is done") from None


def make_plan(topk_idx: Tensor, backend: int, num_experts: int, alignment: int, max_recv: int, max_rows: int) -> Plan:
    """The :class:`Plan` of ``topk_idx``; through the operator where something watches. Limits of -1: exact sizes."""
    if watched(topk_idx):
        topk_idx = topk_idx.to(torch.int64)
        outputs = plan(topk_idx, backend, num_experts, alignment, max_recv, max_rows)
        return plan_from_outputs(topk_idx, outputs, num_experts, alignment)
    with torch.no_grad():
        return _backend(backend).plan(
            topk_idx,
            num_experts,
            alignment=alignment,
            max_recv=None if max_recv == NO_LIMIT else max_recv,
            max_rows=None if max_rows == NO_LIMIT else max_rows,
        )


@torch.library.custom_op("deepep_moe::plan", mutates_args=())
def plan(
    topk_idx: Tensor, backend: int, num_experts: int, alignment: int, max_recv: int, max_rows: int
) -> list[Tensor]:
    """The tensors of the :class:`Plan` of ``topk_idx``, without ``topk_idx`` itself; limits of -1 mean exact sizes."""
    made = _backend(backend).plan(
        topk_idx,
        num_experts,
        alignment=alignment,
        max_recv=None if max_recv == NO_LIMIT else max_recv,
        max_rows=None if max_rows == NO_LIMIT else max_rows,
    )
    return [torch.empty(0, dtype=torch.int64) if t is None else t for t in made.tensors()[1:]]


@plan.register_fake
def _(topk_idx: Tensor, backend: int, num_experts: int, alignment: int, max_recv: int, max_rows: int) -> list[Tensor]:
    tokens, topk = topk_idx.shape
    ranks = _backend(backend).world_size
    local = num_experts // ranks
    context = torch.library.get_ctx()
    received = context.new_dynamic_size() if max_recv == NO_LIMIT else max_recv
    rows = context.new_dynamic_size() if max_rows == NO_LIMIT else max_rows
    exact = max_recv == NO_LIMIT and max_rows == NO_LIMIT

    def made(*shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return topk_idx.new_empty(shape, dtype=dtype)

    return [
        made(tokens, ranks),
        made(ranks, ranks),
        made(received, topk, dtype=torch.int64),
        made(received),
        made(received, topk),
        made(rows),
        made(local, dtype=torch.int64),
        made(local + 1, dtype=torch.int64),
        torch.empty(local if exact else 0, dtype=torch.int64, device="cpu"),
    ]


def plan_from_outputs(topk_idx: Tensor, outputs: list[Tensor], num_experts: int, alignment: int) -> Plan:
    """Put together what :func:`plan` returned for ``topk_idx`` (int64)."""
    host = outputs[-1]
    tensors = [topk_idx, *outputs[:-1], host if host.shape[0] else None]
    return Plan.from_tensors(num_experts, alignment, tensors)


_PLAN = "Tensor?[] plan, int backend, int num_experts, int alignment"
torch.library.define("deepep_moe::dispatch", f"(Tensor x, Tensor? weights, {_PLAN}, bool fp8) -> (Tensor, Tensor)")
torch.library.define(
    "deepep_moe::combine",
    f"(Tensor rows, Tensor? weights, {_PLAN}, bool apply_weights, bool fp8_grad) -> (Tensor, Tensor)",
)
_dispatch_op = torch.ops.deepep_moe.dispatch.default
_combine_op = torch.ops.deepep_moe.combine.default


def dispatch(
    x: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    backend: int,
    num_experts: int,
    alignment: int,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    """``x [T, H]``, ``weights [T, K]`` fp32 -> expert layout ``[M, H]``, ``[M]`` (``[0]`` without weights).

    ``fp8``: BF16 tokens travel as e4m3.
    """
    return _call(_Dispatch, _dispatch_op, _dispatch_kernel, x, weights, plan, backend, num_experts, alignment, fp8)


def combine(
    rows: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    backend: int,
    num_experts: int,
    alignment: int,
    apply_weights: bool,
    fp8_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Expert layout ``[M, H]`` -> ``[T, H]``.

    ``weights [M]`` fp32 are multiplied into the rows first (``apply_weights``; the second output is ``[0]``) or
    carried back beside them (the second output is ``[T, K]``). ``fp8_grad``: BF16 gradients travel as e4m3.
    """
    constants = (backend, num_experts, alignment, apply_weights, fp8_grad)
    return _call(_Combine, _combine_op, _combine_kernel, rows, weights, plan, *constants)


def _dispatch_kernel(
    x: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    backend: int,
    num_experts: int,
    alignment: int,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    engine, routing = _backend(backend), Plan.from_tensors(num_experts, alignment, plan)
    if fp8 and x.dtype == torch.bfloat16:
        sent = engine.dispatch(routing, x, weights=weights, quantize=True, grouped=True)
        assert sent.scales is not None
        rows = dequantize_e4m3(sent.x, sent.scales, x.dtype)
    else:
        sent = engine.dispatch(routing, x, weights=weights, grouped=True)
        rows = sent.x
    return rows, _or_empty(sent.weights, x)


def _combine_kernel(
    rows: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    backend: int,
    num_experts: int,
    alignment: int,
    apply_weights: bool,
    fp8_grad: bool,
) -> tuple[Tensor, Tensor]:
    routing = Plan.from_tensors(num_experts, alignment, plan)
    back = _backend(backend).combine(routing, rows, weights=weights, apply_weights=apply_weights, grouped=True)
    return back.x, _or_empty(back.weights, rows)


torch.library.impl("deepep_moe::dispatch", "default")(_dispatch_kernel)
torch.library.impl("deepep_moe::combine", "default")(_combine_kernel)


def _or_empty(weights: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if weights is None else weights


@torch.library.register_fake("deepep_moe::dispatch")
def _(
    x: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    backend: int,
    num_experts: int,
    alignment: int,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    count = Plan.from_tensors(num_experts, alignment, plan).num_rows
    return x.new_empty((count, x.shape[1])), x.new_empty(0 if weights is None else count, dtype=torch.float32)


@torch.library.register_fake("deepep_moe::combine")
def _(
    rows: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    backend: int,
    num_experts: int,
    alignment: int,
    apply_weights: bool,
    fp8_grad: bool,
) -> tuple[Tensor, Tensor]:
    routing = Plan.from_tensors(num_experts, alignment, plan)
    carried = (0,) if weights is None or apply_weights else (routing.num_tokens, routing.num_topk)
    return (
        rows.new_empty((routing.num_tokens, rows.shape[1])),
        rows.new_empty(carried, dtype=torch.float32),
    )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, plan: list[Tensor | None], *constants: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.backend_and_sizes, ctx.has_weights = constants[:3], weights is not None
        ctx.save_for_backward(*plan)
        return _below_autograd(_dispatch_op, _dispatch_kernel, x, weights, plan, *constants)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_rows, grad_weights = grads
        carried = grad_weights if ctx.has_weights and ctx.needs_input_grad[1] else None
        backend, num_experts, alignment = ctx.backend_and_sizes
        plan = list(ctx.saved_tensors)
        grad_x, grad_topk = combine(grad_rows, carried, plan, backend, num_experts, alignment, False, False)
        return grad_x, (None if carried is None else grad_topk), *[None] * 5


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor | None, plan: list[Tensor | None], *constants: Any
    ) -> tuple[Tensor, Tensor]:
        *ctx.backend_and_sizes, ctx.apply_weights, ctx.fp8_grad = constants
        ctx.has_weights = weights is not None
        keeps_rows = ctx.apply_weights and ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if keeps_rows else None, weights if ctx.apply_weights else None, *plan)
        return _below_autograd(_combine_op, _combine_kernel, rows, weights, plan, *constants)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_tokens, grad_topk = grads
        rows, weights, *plan = ctx.saved_tensors
        carried = grad_topk if ctx.has_weights and not ctx.apply_weights and ctx.needs_input_grad[1] else None
        backend, num_experts, alignment = ctx.backend_and_sizes
        sent, sent_weights = dispatch(grad_tokens, carried, plan, backend, num_experts, alignment, ctx.fp8_grad)
        grad_rows: Tensor | None = sent
        grad_weights = None if carried is None else sent_weights
        if ctx.apply_weights:  # of w * rows: the product rule
            row_recv = Plan.from_tensors(num_experts, alignment, plan).row_recv
            wants_rows = ctx.needs_input_grad[0]
            grad_rows, grad_weights = weigh_gradients(sent, rows, weights, row_recv, wants_rows=wants_rows, reuse=True)
        return grad_rows, grad_weights, *[None] * 6


def _wants_grad(x: Tensor, weights: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (weights is not None and weights.requires_grad))


def _call(
    function: type[torch.autograd.Function],
    operator: Any,
    kernel: Any,
    x: Tensor,
    weights: Tensor | None,
    plan: list[Tensor | None],
    *constants: Any,
) -> tuple[Tensor, Tensor]:
    """The operator; where nothing watches, without the dispatcher's way there, which costs more than the call."""
    if watched(x):
        return operator(x, weights, plan, *constants)
    if _wants_grad(x, weights):
        return function.apply(x, weights, plan, *constants)
    return kernel(x, weights, plan, *constants)


def _below_autograd(operator: Any, kernel: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not watched(x):
        return kernel(x, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(x, *rest)


def _register_autograd(name: str, operator: Any, function: type[torch.autograd.Function]) -> None:
    def kernel(x: Tensor, weights: Tensor | None, plan: list[Tensor | None], *constants: Any) -> tuple[Tensor, Tensor]:
        if _wants_grad(x, weights):
            return function.apply(x, weights, plan, *constants)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, weights, plan, *constants)

    torch.library.impl(name, "Autograd")(kernel)


_register_autograd("deepep_moe::dispatch", _dispatch_op, _Dispatch)
_register_autograd("deepep_moe::combine", _combine_op, _Combine)
