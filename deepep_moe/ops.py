"""The differentiable operators ``deepep_moe::plan``, ``::dispatch`` and ``::combine``.

They wrap a backend's verbs as torch.library custom ops, so autograd, activation checkpointing, torch.compile and
FakeTensor all see three opaque calls with known shapes. The one fact behind the gradients: **dispatch and combine
are transposes of each other on the same plan**, so the backward of one is the other. A combine that multiplies
rows by weights first is ``combine(w * rows)``, and its gradients follow by the product rule.

A plan passes through the ops as its list of tensors. A backend passes as a number from :func:`register_backend`:
the registry is weak, whoever made the number keeps the backend alive. Where a tensor is absent an output of an
operator has no rows (``[0]``): operators cannot return None.

Operators cost the host more than what they do here, and a layer makes four such calls. So the functions of this module
take the plan as it is and go straight to a plain autograd.Function; through the operators only where something
watches (watched.py).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from deepep_moe.backends.base import Backend, Backward, Layout, Plan, Wire
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.errors import HandleError
from deepep_moe.watched import watched
from deepep_moe.weigh import weigh_gradients

NO_LIMIT = -1

_by_number: WeakValueDictionary[int, Backend] = WeakValueDictionary()


def register_backend(backend: Backend) -> int:
    """The number under which the ops find ``backend``; it ends with the backend's last reference."""
    _by_number[backend.number] = backend
    return backend.number


def _backend(number: int) -> Backend:
    try:
        return _by_number[int(number)]  # symbolic while torch.compile traces for several dispatchers
    except KeyError:
        raise HandleError("the dispatcher that made this plan is gone; keep it until the backward is done") from None


def make_plan(topk_idx: Tensor, backend: int, num_experts: int, alignment: int, max_recv: int, max_rows: int) -> Plan:
    """The :class:`Plan` of ``topk_idx``; through the operator where something watches. Limits of -1: exact sizes."""
    if watched(topk_idx):
        topk_idx = topk_idx.to(torch.int64)
        outputs = plan(topk_idx, backend, num_experts, alignment, max_recv, max_rows)
        return plan_from_outputs(topk_idx, outputs, num_experts, alignment)
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
    # Copies, because what an operator returns must not share memory.
    return [torch.empty(0, dtype=torch.int64, device="cpu") if t is None else t.clone() for t in made.tensors()[1:]]


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
        torch.empty(2, dtype=torch.int64, device="cpu"),
        made(tokens, ranks),
        made(ranks * ranks + 2 * local + 1, dtype=torch.int64),
        made(received, 1 + 2 * topk),
        made(rows),
        torch.empty(local if exact else 0, dtype=torch.int64, device="cpu"),
        made(context.new_dynamic_size())
        if _backend(backend).plans_have_extra
        else torch.empty(0, dtype=torch.int64, device="cpu"),
    ]


def plan_from_outputs(topk_idx: Tensor, outputs: list[Tensor], num_experts: int, alignment: int) -> Plan:
    """Put together what :func:`plan` returned for ``topk_idx`` (int64)."""
    *others, host, extra = outputs
    tensors = [topk_idx, *others, host if host.shape[0] else None, extra]
    return TensorPlan.from_tensors(num_experts, alignment, tensors)


def dispatch(x: Tensor, weights: Tensor | None, plan: Plan, backend: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """``x [T, H]``, ``weights [T, K]`` fp32 -> expert layout ``[M, H]``, ``[M]`` (None without weights).

    ``fp8``: BF16 tokens travel as e4m3.
    """
    if watched(x):
        rows, row_weights = _dispatch_op(x, weights, *_flat(plan, backend), 0, fp8)
        return rows, None if weights is None else row_weights
    if _wants_grad(x, weights):
        return _Dispatch.apply(x, weights, plan, backend, fp8)  # type: ignore[no-any-return]
    return _run_dispatch(x, weights, plan, backend, fp8, 0)


def combine(
    rows: Tensor, weights: Tensor | None, plan: Plan, backend: int, apply_weights: bool, fp8_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Expert layout ``[M, H]`` -> ``[T, H]``.

    ``weights [M]`` fp32 are multiplied into the rows first (``apply_weights``; the second result is None) or carried
    back beside them (the second result is ``[T, K]``). ``fp8_grad``: BF16 gradients travel as e4m3.
    """
    if watched(rows):
        tokens, carried = _combine_op(rows, weights, *_flat(plan, backend), 0, apply_weights, fp8_grad)
        return tokens, None if weights is None or apply_weights else carried
    if _wants_grad(rows, weights):
        return _Combine.apply(rows, weights, plan, backend, apply_weights, fp8_grad)  # type: ignore[no-any-return]
    return _run_combine(rows, weights, plan, backend, apply_weights, 0)


def _run_dispatch(
    x: Tensor, weights: Tensor | None, plan: Plan, backend: int, fp8: bool, backward: int
) -> tuple[Tensor, Tensor | None]:
    wire = Wire.E4M3_TO_BF16 if fp8 and x.dtype == torch.bfloat16 else Wire.AS_GIVEN
    sent = _backend(backend).dispatch(
        plan, x, layout=Layout.BY_EXPERT, wire=wire, weights=weights, backward=Backward(backward)
    )
    return sent.x, sent.weights


def _run_combine(
    rows: Tensor, weights: Tensor | None, plan: Plan, backend: int, apply_weights: bool, backward: int
) -> tuple[Tensor, Tensor | None]:
    back = _backend(backend).combine(
        plan,
        rows,
        layout=Layout.BY_EXPERT,
        weights=weights,
        apply_weights=apply_weights,
        backward=Backward(backward),
    )
    return back.x, back.weights


def _flat(plan: Plan, backend: int) -> tuple[list[Tensor | None], int, int, int]:
    """A plan and its backend as operators take them."""
    return plan.tensors(), backend, plan.num_experts, plan.alignment


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, plan: Plan, backend: int, fp8: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.plan, ctx.backend = plan, backend
        ctx.carries = weights is not None and ctx.needs_input_grad[1]
        backward = Backward.ROWS_AND_WEIGHTS if ctx.carries else Backward.ROWS
        if not watched(x):
            return _run_dispatch(x, weights, plan, backend, fp8, backward)
        with torch._C._AutoDispatchBelowAutograd():
            return _dispatch_op(x, weights, *_flat(plan, backend), int(backward), fp8)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_rows, grad_weights = grads
        carried = grad_weights if ctx.carries else None
        grad_x, grad_topk = combine(grad_rows, carried, ctx.plan, ctx.backend, False, False)
        return grad_x, grad_topk, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor | None,
        plan: Plan,
        backend: int,
        apply_weights: bool,
        fp8_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.plan, ctx.backend, ctx.apply_weights, ctx.fp8_grad = plan, backend, apply_weights, fp8_grad
        ctx.carries = weights is not None and not apply_weights and ctx.needs_input_grad[1]
        backward = Backward.ROWS_AND_WEIGHTS if ctx.carries else Backward.ROWS
        if apply_weights:
            ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        if not watched(rows):
            return _run_combine(rows, weights, plan, backend, apply_weights, backward)
        with torch._C._AutoDispatchBelowAutograd():
            return _combine_op(  # type: ignore[no-any-return]
                rows, weights, *_flat(plan, backend), int(backward), apply_weights, fp8_grad
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_tokens, grad_topk = grads
        carried = grad_topk if ctx.carries else None
        sent, grad_weights = dispatch(grad_tokens, carried, ctx.plan, ctx.backend, ctx.fp8_grad)
        grad_rows: Tensor | None = sent
        if ctx.apply_weights:  # of w * rows: the product rule
            rows, weights = ctx.saved_tensors
            wants_rows = ctx.needs_input_grad[0]
            grad_rows, grad_weights = weigh_gradients(
                sent, rows, weights, ctx.plan.row_recv, wants_rows=wants_rows, reuse=True
            )
        return grad_rows, grad_weights, None, None, None, None


def _wants_grad(x: Tensor, weights: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (weights is not None and weights.requires_grad))


# -- the operators: their own plumbing around the same functions -------------------------------------------------------

# backward: a Backward, put in by the autograd kernel below; callers pass 0.
_PLAN = "Tensor?[] plan, int backend, int num_experts, int alignment, int backward"
torch.library.define("deepep_moe::dispatch", f"(Tensor x, Tensor? weights, {_PLAN}, bool fp8) -> (Tensor, Tensor)")
torch.library.define(
    "deepep_moe::combine",
    f"(Tensor rows, Tensor? weights, {_PLAN}, bool apply_weights, bool fp8_grad) -> (Tensor, Tensor)",
)
_dispatch_op = torch.ops.deepep_moe.dispatch.default
_combine_op = torch.ops.deepep_moe.combine.default

Flat = list[Tensor | None]


@torch.library.impl("deepep_moe::dispatch", "default")
def _(
    x: Tensor,
    weights: Tensor | None,
    plan: Flat,
    backend: int,
    num_experts: int,
    alignment: int,
    backward: int,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    rows, row_weights = _run_dispatch(x, weights, routing, backend, fp8, backward)
    return rows, _or_empty(row_weights, x)


@torch.library.impl("deepep_moe::combine", "default")
def _(
    rows: Tensor,
    weights: Tensor | None,
    plan: Flat,
    backend: int,
    num_experts: int,
    alignment: int,
    backward: int,
    apply_weights: bool,
    fp8_grad: bool,
) -> tuple[Tensor, Tensor]:
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    tokens, carried = _run_combine(rows, weights, routing, backend, apply_weights, backward)
    return tokens, _or_empty(carried, rows)


def _or_empty(weights: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if weights is None else weights


@torch.library.register_fake("deepep_moe::dispatch")
def _(
    x: Tensor,
    weights: Tensor | None,
    plan: Flat,
    backend: int,
    num_experts: int,
    alignment: int,
    backward: int,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    count = TensorPlan.from_tensors(num_experts, alignment, plan).num_rows
    return x.new_empty((count, x.shape[1])), x.new_empty(0 if weights is None else count, dtype=torch.float32)


@torch.library.register_fake("deepep_moe::combine")
def _(
    rows: Tensor,
    weights: Tensor | None,
    plan: Flat,
    backend: int,
    num_experts: int,
    alignment: int,
    backward: int,
    apply_weights: bool,
    fp8_grad: bool,
) -> tuple[Tensor, Tensor]:
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    carried = (0,) if weights is None or apply_weights else (routing.num_tokens, routing.num_topk)
    return (
        rows.new_empty((routing.num_tokens, rows.shape[1])),
        rows.new_empty(carried, dtype=torch.float32),
    )


def _register_autograd(name: str, operator: Any, function: type[torch.autograd.Function]) -> None:
    """A kernel that calls the autograd.Function: torch.library.register_autograd costs the host three times as much."""

    def kernel(
        x: Tensor,
        weights: Tensor | None,
        plan: Flat,
        backend: int,
        num_experts: int,
        alignment: int,
        backward: int,
        *switches: bool,
    ) -> tuple[Tensor, Tensor]:
        if _wants_grad(x, weights):
            routing = TensorPlan.from_tensors(num_experts, alignment, plan)
            out, out_weights = function.apply(x, weights, routing, backend, *switches)
            return out, _or_empty(out_weights, out)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, weights, plan, backend, num_experts, alignment, backward, *switches)

    torch.library.impl(name, "Autograd")(kernel)


_register_autograd("deepep_moe::dispatch", _dispatch_op, _Dispatch)
_register_autograd("deepep_moe::combine", _combine_op, _Combine)
