"""Entry checks that the backends share: shapes, dtypes, devices.

Values are looked at on a CPU only: on a GPU that would make the host wait.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from deepep_moe.backends.base import Backend, Layout, Plan, Wire
from deepep_moe.backends.tensor_plan import is_plan
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import HandleError, InputError
from deepep_moe.fp8 import BLOCK

_MOST = 2**31 - 1  # kernels count in int32
SUMMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_USER_SETTINGS = {
    "max_recv": "num_worst_tokens (ElasticBuffer: num_max_tokens_per_rank)",
    "max_rows": "num_max_tokens_per_rank",
}
"""What a user of the buffers has set, by the argument of :meth:`Backend.plan` that follows from it."""
SENT_DTYPES = (*SUMMED_DTYPES, torch.float8_e4m3fn)


def check_plan_inputs(
    topk_idx: Tensor | None,
    num_experts: int,
    alignment: int,
    is_token_in_rank: Tensor | None,
    num_tokens_per_expert: Tensor | None,
    world_size: int,
    device: torch.device,
) -> None:
    """Check the arguments of :meth:`Backend.plan`."""
    if topk_idx is not None:
        check_topk_idx(topk_idx, num_experts, world_size, device)
        if is_token_in_rank is not None:
            check_shape("is_token_in_rank", is_token_in_rank, (topk_idx.shape[0], world_size), device, torch.bool)
    else:
        _check_token_in_rank(is_token_in_rank, num_tokens_per_expert, num_experts, world_size, device)
    check_integer("alignment", alignment, least=1)


def check_limits(max_recv: int | None, max_rows: int | None) -> None:
    """Check the fixed sizes given to :meth:`Backend.plan`."""
    for name, limit in (("max_recv", max_recv), ("max_rows", max_rows)):
        if limit is not None:
            check_integer(name, limit)


def overflow_text(config: DispatcherConfig, rank: int, needed: int, what: str, setting: str, limit: int) -> str:
    """Text of a CapacityError: ``rank`` needs ``needed`` of ``what``, and ``setting`` of the plan is ``limit``."""
    room = f"{_USER_SETTINGS[setting]} gives room for {limit}"
    if config.capacity_factor:
        tokens = f"max_tokens_per_rank = {config.max_tokens_per_rank}"
        tokens += "" if config.max_tokens_per_rank else " (so the rank's own tokens in that batch)"
        room = f"capacity_factor = {config.capacity_factor:g} with {tokens} gives room for {limit}"
    return f"rank {rank} needs room for {needed} {what}, but {room}: nothing was sent"


def check_plan(backend: Backend, plan: Plan, layout: Layout) -> None:
    """Check that ``backend`` made ``plan``, and that the plan has ``layout``."""
    if not is_plan(plan):
        raise HandleError(f"plan is {describe(plan)}; pass on what plan() or dispatch() returned")
    if plan.owner != backend.number:
        raise HandleError("the plan was made by a dispatcher or Buffer with another group or configuration")
    if not isinstance(layout, Layout):
        raise InputError("layout", layout, "must be Layout.BY_SOURCE or Layout.BY_EXPERT")
    if layout is Layout.BY_EXPERT and plan.num_topk == 0:
        raise HandleError("the plan was made without expert indices: it has no expert layout")


def check_dispatch(
    backend: Backend,
    plan: Plan,
    x: Tensor,
    *,
    layout: Layout,
    wire: Wire,
    scales: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Check the arguments of :meth:`Backend.dispatch`."""
    check_plan(backend, plan, layout)
    tokens, device = plan.num_tokens, backend.device
    check_rows("x", x, tokens, "the plan's tokens", SENT_DTYPES, device)
    if scales is not None:
        check_shape("scales", scales, (tokens, None), device)
        if scales.element_size() != 4:
            raise InputError("scales", scales.dtype, "must be a 4-byte type (float32, or int32 holding packed UE8M0)")
    if weights is not None:
        check_shape("topk_weights", weights, (tokens, plan.num_topk), device, torch.float32)
    if not isinstance(wire, Wire):
        raise InputError("wire", wire, "must be a Wire")
    if wire is not Wire.AS_GIVEN:
        if x.dtype != torch.bfloat16 or scales is not None:
            raise InputError("wire", wire.value, f"needs bfloat16 tokens without scales, x is {x.dtype}")
        if x.shape[1] % BLOCK:
            raise InputError("hidden size", x.shape[1], f"must be a multiple of {BLOCK} to be sent as FP8")


def check_combine(
    backend: Backend,
    plan: Plan,
    x: Tensor,
    *,
    layout: Layout,
    weights: Tensor | None,
    apply_weights: bool,
    bias: tuple[Tensor, ...],
) -> None:
    """Check the arguments of :meth:`Backend.combine`."""
    check_plan(backend, plan, layout)
    by_expert, device = layout is Layout.BY_EXPERT, backend.device
    expected, what = (plan.num_rows, "expert rows") if by_expert else (plan.num_recv, "received rows")
    check_rows("x", x, expected, f"the plan's {what}", SUMMED_DTYPES, device)
    if weights is not None:
        shape = (expected,) if by_expert else (expected, plan.num_topk)
        check_shape("weights" if apply_weights else "topk_weights", weights, shape, device, torch.float32)
    if apply_weights and (weights is None or not by_expert):
        raise InputError("apply_weights", True, "needs weights and the expert layout")
    if len(bias) > 2:
        raise InputError("bias", f"{len(bias)} tensors", "at most two can be added")
    for added in bias:
        check_shape("bias", added, (plan.num_tokens, x.shape[1]), device, x.dtype)


def check_topk_idx(topk_idx: Tensor, num_experts: int, world_size: int, device: torch.device) -> None:
    """Raise :class:`InputError` unless ``topk_idx`` is ``[T, K]`` integers, -1 or below ``num_experts``.

    Values are looked at on a CPU only: on a GPU that would make the host wait.
    """
    check_num_experts(num_experts, world_size)
    check_shape("topk_idx", topk_idx, (None, None), device)
    if topk_idx.dtype not in (torch.int32, torch.int64):
        raise InputError("topk_idx", topk_idx.dtype, "must be int32 or int64")
    if topk_idx.shape[1] < 1:
        raise InputError("topk_idx", f"shape {tuple(topk_idx.shape)}", "top-k must be at least 1")
    if topk_idx.device.type == "cpu" and topk_idx.numel():
        low, high = (int(v) for v in topk_idx.aminmax())
        if low < -1 or high >= num_experts:
            wrong = low if low < -1 else high
            raise InputError("topk_idx", wrong, f"an expert must be -1 (dropped) or 0 to {num_experts - 1}")


def check_num_experts(num_experts: int, world_size: int) -> None:
    """Raise :class:`InputError` unless ``num_experts`` is a positive multiple of the number of ranks."""
    check_integer("num_experts", num_experts, least=1)
    if num_experts % world_size:
        raise InputError("num_experts", num_experts, f"must be a positive multiple of the group's {world_size} ranks")


def check_integer(argument: str, value: int, least: int = 0, most: int = _MOST) -> None:
    """Raise :class:`InputError` unless ``value`` is an integer from ``least`` to ``most``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(argument, repr(value), "must be an integer") from None
    if isinstance(value, bool) or not least <= number <= most:
        raise InputError(argument, value, f"must be an integer from {least} to {most}")


def check_tensor(argument: str, tensor: Any) -> None:
    """Raise :class:`InputError` unless ``tensor`` is a plain, dense tensor in memory."""
    if type(tensor) not in (Tensor, Parameter):
        if not isinstance(tensor, Tensor):
            raise InputError(argument, describe(tensor), "must be a torch.Tensor")
        if isinstance(tensor, _dtensor()):
            raise InputError(argument, "a DTensor", "must be a plain tensor: pass to_local() of it")
    if tensor.is_nested:
        raise InputError(argument, "a nested tensor", "must be dense (torch.strided)")
    if tensor.layout is not torch.strided:
        raise InputError(argument, f"a tensor of layout {tensor.layout}", "must be dense (torch.strided)")
    if torch.compiler.is_compiling():
        return
    if tensor.is_neg():  # its memory holds the opposite numbers
        raise InputError(argument, "a view with the negative bit", "must be a plain tensor: pass resolve_neg() of it")
    if _is_freed(tensor):
        raise InputError(argument, "a tensor without memory", "must not have freed storage")


def _is_freed(tensor: Tensor) -> bool:
    """Whether the storage was freed, as some programs do with tensors that they gather or compute again."""
    if type(tensor) not in (Tensor, Parameter) or tensor.is_meta:
        return False
    try:
        return tensor.data_ptr() <= tensor.storage_offset() * tensor.element_size() and tensor.numel() > 0
    except RuntimeError:  # a wrapper of torch.func, which has no storage
        return False


def describe(value: object) -> str:
    """The type of an argument, for an error text."""
    return "None" if value is None else f"a {type(value).__name__}"


@functools.cache
def _dtensor() -> type:
    from torch.distributed.tensor import DTensor  # slow to import, rarely needed

    return DTensor


def _check_token_in_rank(
    is_token_in_rank: Tensor | None,
    num_tokens_per_expert: Tensor | None,
    num_experts: int,
    world_size: int,
    device: torch.device,
) -> None:
    check_num_experts(num_experts, world_size)
    if is_token_in_rank is None or num_tokens_per_expert is None:
        raise InputError("topk_idx", None, "without it is_token_in_rank and num_tokens_per_expert are needed")
    check_shape("is_token_in_rank", is_token_in_rank, (None, world_size), device, torch.bool)
    check_shape("num_tokens_per_expert", num_tokens_per_expert, (num_experts,), device, torch.int32)


def check_rows(
    argument: str, x: Tensor, rows: int, whose: str, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise :class:`InputError` unless ``x`` is ``[rows, H]`` with H >= 1, one of ``dtypes``, on ``device``."""
    check_shape(argument, x, (None, None), device)
    if x.shape[0] != rows:
        raise InputError(argument, f"shape {tuple(x.shape)}", f"must have {rows} rows, {whose}")
    if x.shape[1] < 1:
        raise InputError(argument, f"shape {tuple(x.shape)}", "the hidden size must be at least 1")
    if x.dtype not in dtypes:
        raise InputError(argument, x.dtype, "must be one of " + ", ".join(str(d) for d in dtypes))


def check_shape(
    argument: str,
    tensor: Any,
    shape: tuple[int | None, ...],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise :class:`InputError` unless ``tensor`` has ``shape`` (None: any size), ``dtype`` and ``device``."""
    check_tensor(argument, tensor)
    given = tensor.shape
    fits = len(given) == len(shape)
    if fits:
        for wanted, size in zip(shape, given):  # a plain loop: this runs several times in every call
            fits = fits and (wanted is None or wanted == size)
    if not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(argument, f"shape {tuple(given)}", f"must have shape ({sizes})")
    if dtype is not None and tensor.dtype != dtype:
        raise InputError(argument, tensor.dtype, f"must be {dtype}")
    if tensor.device != device:
        raise InputError(argument, tensor.device, f"must be on {device}, the device of this group's backend")
