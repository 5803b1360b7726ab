"""The differentiable operators ``deepep_moe::plan``, ``::dispatch`` and ``::combine``.

They make the calls of a backend differentiable, and available as torch.library operators, so that autograd, activation
checkpointing, torch.compile and FakeTensor see three opaque calls with known shapes. Gradients follow from one fact:
**dispatch and combine are transposes of each other on the same plan**, so the backward of one is the other. A combine
that multiplies rows by weights is ``combine(w * rows)``, and its gradients follow by the product rule.

The operators take a plan as a list of tensors, and a backend as a number from :func:`register_backend`. The registry
holds weak references: the caller that registers a backend keeps it alive. Operators cannot return None, so an output
that does not exist has no rows (``[0]``).

Calling an operator takes more host time than launching the work, and a layer makes four such calls. Therefore the
functions of this module call an autograd.Function directly. They use the operators only under torch.compile or a
dispatch mode (tracing.py).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from deepep_moe.backends.base import Backend, Backward, Layout, Plan, Wire
from deepep_moe.backends.tensor_plan import TensorPlan
from deepep_moe.errors import HandleError
from deepep_moe.notices import span
from deepep_moe.row_scaling import scale_rows_gradients
from deepep_moe.tracing import is_traced

NO_LIMIT = -1

_by_number: WeakValueDictionary[int, Backend] = WeakValueDictionary()


def register_backend(backend: Backend) -> int:
    """The number by which operators refer to ``backend``, valid as long as the backend exists."""
    _by_number[backend.number] = backend
    return backend.number


def _backend(number: int) -> Backend:
    try:
        return _by_number[int(number)]  # symbolic while torch.compile traces for several dispatchers
    except KeyError:
        raise HandleError("the dispatcher that made this plan is gone; keep it until the backward is done") from None


def make_plan(topk_idx: Tensor, backend: int, num_experts: int, alignment: int, max_recv: int, max_rows: int) -> Plan:
    """The :class:`Plan` of ``topk_idx [T, K]``. Collective; the arguments are those of :meth:`Backend.plan`.

    Args:
        backend: from :func:`register_backend`.
        max_recv, max_rows: :data:`NO_LIMIT` for exact sizes.
    """
    if is_traced(topk_idx):
        if topk_idx.dtype == torch.int32:  # others reach the backend, which refuses them on all ranks
            topk_idx = topk_idx.to(torch.int64)
        outputs = plan(topk_idx, backend, num_experts, alignment, max_recv, max_rows)
        return plan_from_outputs(topk_idx, outputs, num_experts, alignment)
    return _run_plan(topk_idx, backend, num_experts, alignment, max_recv, max_rows)


def _run_plan(topk_idx: Tensor, backend: int, num_experts: int, alignment: int, max_recv: int, max_rows: int) -> Plan:
    with span("deepep_moe.plan"):
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
    """:func:`make_plan` as an operator: the tensors of the plan, without ``topk_idx`` itself."""
    made = _run_plan(topk_idx, backend, num_experts, alignment, max_recv, max_rows)
    # Copies, because the outputs of an operator must not share memory.
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
    """The plan whose tensors :func:`plan` returned for ``topk_idx`` (int64)."""
    *others, host, extra = outputs
    tensors = [topk_idx, *others, host if host.shape[0] else None, extra]
    return TensorPlan.from_tensors(num_experts, alignment, tensors)


def dispatch(x: Tensor, weights: Tensor | None, plan: Plan, backend: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Send tokens to the ranks of their experts. Collective; differentiable in ``x`` and ``weights``.

    Args:
        x: [T, H].
        weights: [T, K] fp32, or None.
        backend: from :func:`register_backend`.
        fp8: BF16 tokens travel as e4m3.

    Returns:
        Rows [M, H] in expert layout, and their weights [M], None without ``weights``.
    """
    if is_traced(x):
        rows, row_weights = _dispatch_with_gradient_op(x, weights, *_flat(plan, backend), fp8)
        return rows, None if weights is None else row_weights
    if _wants_grad(x, weights):
        return _Dispatch.apply(x, weights, plan, backend, fp8)  # type: ignore[no-any-return]
    return _run_dispatch(x, weights, plan, backend, fp8, 0)


def combine(
    rows: Tensor, weights: Tensor | None, plan: Plan, backend: int, apply_weights: bool, fp8_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum the rows of each token at its source. Collective; differentiable in ``rows`` and ``weights``.

    Args:
        rows: [M, H] in expert layout.
        weights: [M] fp32, or None.
        backend: from :func:`register_backend`.
        apply_weights: multiply the rows by ``weights`` before the sum; otherwise weights are sent back beside the rows.
        fp8_grad: in the backward, BF16 gradients travel as e4m3.

    Returns:
        [T, H], and [T, K] weights that were sent back, else None.
    """
    if is_traced(rows):
        tokens, carried = _combine_with_gradient_op(rows, weights, *_flat(plan, backend), apply_weights, fp8_grad)
        return tokens, None if weights is None or apply_weights else carried
    if _wants_grad(rows, weights):
        return _Combine.apply(rows, weights, plan, backend, apply_weights, fp8_grad)  # type: ignore[no-any-return]
    return _run_combine(rows, weights, plan, backend, apply_weights, 0)


def _run_dispatch(
    x: Tensor, weights: Tensor | None, plan: Plan, backend: int, fp8: bool, backward: int
) -> tuple[Tensor, Tensor | None]:
    wire = Wire.E4M3_TO_BF16 if fp8 and x.dtype == torch.bfloat16 else Wire.AS_GIVEN
    with span("deepep_moe.dispatch"):
        sent = _backend(backend).dispatch(
            plan, x, layout=Layout.BY_EXPERT, wire=wire, weights=weights, backward=Backward(backward)
        )
    return sent.x, sent.weights


def _run_combine(
    rows: Tensor, weights: Tensor | None, plan: Plan, backend: int, apply_weights: bool, backward: int
) -> tuple[Tensor, Tensor | None]:
    with span("deepep_moe.combine"):
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
    """A plan and its backend as arguments of an operator."""
    return plan.tensors(), backend, plan.num_experts, plan.alignment


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, plan: Plan, backend: int, fp8: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.plan, ctx.backend = plan, backend
        ctx.carries = weights is not None and ctx.needs_input_grad[1]
        backward = Backward.ROWS_AND_WEIGHTS if ctx.carries else Backward.ROWS
        if is_traced(x):
            return _dispatch_op(x, weights, *_flat(plan, backend), backward, fp8)  # type: ignore[no-any-return]
        return _run_dispatch(x, weights, plan, backend, fp8, backward)

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
        if is_traced(rows):
            return _combine_op(rows, weights, *_flat(plan, backend), backward, apply_weights)  # type: ignore[no-any-return]
        return _run_combine(rows, weights, plan, backend, apply_weights, backward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_tokens, grad_topk = grads
        carried = grad_topk if ctx.carries else None
        sent, grad_weights = dispatch(grad_tokens, carried, ctx.plan, ctx.backend, ctx.fp8_grad)
        grad_rows: Tensor | None = sent
        if ctx.apply_weights:  # the product rule for w * rows
            rows, weights = ctx.saved_tensors
            wants_rows = ctx.needs_input_grad[0]
            grad_rows, grad_weights = scale_rows_gradients(
                sent, rows, weights, ctx.plan.row_recv, wants_rows=wants_rows, reuse=True
            )
        return grad_rows, grad_weights, None, None, None, None


def _wants_grad(x: Tensor, weights: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (weights is not None and weights.requires_grad))


# -- operators: the same functions for torch.compile and dispatch modes --------------------------------------------

# ``dispatch`` and ``combine`` are opaque and have no gradient. The ``_with_gradient`` operators are composite: they
# decompose into a call of an autograd.Function whose forward calls the opaque operator. torch.compile needs them as
# operators because it cannot trace the lookup of the backend. ``backward`` is a :class:`Backward`.
_PLAN = "Tensor?[] plan, int backend, int num_experts, int alignment"
_RESULT = "-> (Tensor, Tensor)"
_define = torch.library.define
_define("deepep_moe::dispatch", f"(Tensor x, Tensor? weights, {_PLAN}, int backward, bool fp8) {_RESULT}")
_define("deepep_moe::combine", f"(Tensor rows, Tensor? weights, {_PLAN}, int backward, bool apply_weights) {_RESULT}")
_define("deepep_moe::dispatch_with_gradient", f"(Tensor x, Tensor? weights, {_PLAN}, bool fp8) {_RESULT}")
_define(
    "deepep_moe::combine_with_gradient",
    f"(Tensor rows, Tensor? weights, {_PLAN}, bool apply_weights, bool fp8_grad) {_RESULT}",
)
_dispatch_op = torch.ops.deepep_moe.dispatch.default
_combine_op = torch.ops.deepep_moe.combine.default
_dispatch_with_gradient_op = torch.ops.deepep_moe.dispatch_with_gradient.default
_combine_with_gradient_op = torch.ops.deepep_moe.combine_with_gradient.default

# Every rank must make a call that any rank makes, also one whose result it does not need: Inductor knows that gradients
# of no rows are not needed, and would leave out the dispatch in the backward of a rank whose experts got none.
for _op in (torch.ops.deepep_moe.plan.default, _dispatch_op, _combine_op):
    torch.fx.has_side_effect(_op)

PlanTensors = list[Tensor | None]


@torch.library.impl("deepep_moe::dispatch", "default")
def _(
    x: Tensor,
    weights: Tensor | None,
    plan: PlanTensors,
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
    plan: PlanTensors,
    backend: int,
    num_experts: int,
    alignment: int,
    backward: int,
    apply_weights: bool,
) -> tuple[Tensor, Tensor]:
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    tokens, carried = _run_combine(rows, weights, routing, backend, apply_weights, backward)
    return tokens, _or_empty(carried, rows)


@torch.library.register_fake("deepep_moe::dispatch")
def _(
    x: Tensor,
    weights: Tensor | None,
    plan: PlanTensors,
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
    plan: PlanTensors,
    backend: int,
    num_experts: int,
    alignment: int,
    backward: int,
    apply_weights: bool,
) -> tuple[Tensor, Tensor]:
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    carried = (0,) if weights is None or apply_weights else (routing.num_tokens, routing.num_topk)
    return (
        rows.new_empty((routing.num_tokens, rows.shape[1])),
        rows.new_empty(carried, dtype=torch.float32),
    )


@torch.library.impl("deepep_moe::dispatch_with_gradient", "CompositeImplicitAutograd")
def _(
    x: Tensor, weights: Tensor | None, plan: PlanTensors, backend: int, num_experts: int, alignment: int, fp8: bool
) -> tuple[Tensor, Tensor]:
    if not _wants_grad(x, weights):
        return _dispatch_op(x, weights, plan, backend, num_experts, alignment, Backward.NONE, fp8)  # type: ignore[no-any-return]
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    rows, row_weights = _Dispatch.apply(x, weights, routing, backend, fp8)
    return rows, _or_empty(row_weights, rows)


@torch.library.impl("deepep_moe::combine_with_gradient", "CompositeImplicitAutograd")
def _(
    rows: Tensor,
    weights: Tensor | None,
    plan: PlanTensors,
    backend: int,
    num_experts: int,
    alignment: int,
    apply_weights: bool,
    fp8_grad: bool,
) -> tuple[Tensor, Tensor]:
    if not _wants_grad(rows, weights):
        return _combine_op(rows, weights, plan, backend, num_experts, alignment, Backward.NONE, apply_weights)  # type: ignore[no-any-return]
    routing = TensorPlan.from_tensors(num_experts, alignment, plan)
    tokens, carried = _Combine.apply(rows, weights, routing, backend, apply_weights, fp8_grad)
    return tokens, _or_empty(carried, tokens)


def _or_empty(weights: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if weights is None else weights
