"""TokenDispatcher: tokens to expert-grouped rows and back, differentiable, on any backend.

The whole MoE layer around it::

    dispatcher = TokenDispatcher(ep_group, num_experts)
    dispatched = dispatcher.dispatch(x, topk_idx, topk_weights)
    y = experts(dispatched.rows, dispatched.tokens_per_expert)
    out = dispatcher.combine(y, dispatched, weights=dispatched.weights)

All ranks of the group make the same calls in the same order; the numbers of tokens may differ, 0 included.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh

from deepep_moe import ops
from deepep_moe.backends import Backend, Plan, get_backend
from deepep_moe.backends.base import Phase
from deepep_moe.backends.checks import SUMMED_DTYPES, check_num_experts, check_rows, check_tensor, describe
from deepep_moe.backends.tensor_plan import is_plan
from deepep_moe.config import DispatcherConfig
from deepep_moe.decoder import Decoder
from deepep_moe.errors import HandleError, InputError, UnsupportedError
from deepep_moe.fp8 import BLOCK
from deepep_moe.notices import warn_once
from deepep_moe.shared import Shared
from deepep_moe.stats import Statistics

_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Dispatched:
    """What :meth:`TokenDispatcher.dispatch` returns: rows for this rank's L experts, and the plan to combine them."""

    rows: Tensor
    """[M, H] in the dtype of the tokens: the rows of local expert 0, then of expert 1, ...; each group is padded with
    zero rows to a multiple of ``expert_alignment``."""
    weights: Tensor | None
    """[M] fp32: the routing weight of each row, 0 on padding; None if dispatch got no weights."""
    plan: Plan
    """The routing; valid for any number of combines with the dispatcher that made it."""

    @property
    def tokens_per_expert(self) -> Tensor:
        """[L] int64 on the rows' device: rows of each group, padding included. They sum to M; in capacity mode to at
        most M, and the rows after the last group are zero."""
        return self.plan.expert_offsets.diff()

    @property
    def offsets(self) -> Tensor:
        """[L] int32 on the rows' device: the end of each expert's group, as ``torch.nn.functional.grouped_mm`` takes
        ``offs``."""
        return self.plan.expert_offsets[1:].to(torch.int32)

    @property
    def tokens_per_expert_host(self) -> Tensor | None:
        """[L] int64 on the CPU, the same numbers; None in capacity mode, where the host never learns them."""
        counts, alignment = self.plan.expert_counts_host, self.plan.alignment
        if counts is None or alignment == 1:
            return counts
        return (counts + (alignment - 1)) // alignment * alignment

    def __repr__(self) -> str:
        weights = None if self.weights is None else list(self.weights.shape)
        return (
            f"Dispatched(rows={list(self.rows.shape)} {self.rows.dtype} on {self.rows.device}, weights={weights}, "
            f"local_experts={len(self.plan.expert_offsets) - 1})"
        )


class TokenDispatcher(Shared):
    """Dispatch and combine for one expert-parallel group. ``copy.deepcopy`` returns the same object.

    Args:
        group: the expert-parallel ranks: a process group, a one-dimensional ``DeviceMesh`` (such as ``mesh["ep"]``), or
            None for the default group. Rank r owns experts ``r * L .. (r + 1) * L - 1`` with
            ``L = num_experts / group size``.
        num_experts: experts of the whole group.
        config: settings. A mapping of :class:`DispatcherConfig` fields, or None, goes through
            :meth:`DispatcherConfig.load`, so the YAML file and ``DEEPEP_MOE_*`` variables win over it; a
            :class:`DispatcherConfig` is used as it is.
        device: where tensors live; default: the current CUDA device if the group serves it, else the CPU.

    Attributes:
        rank, world_size: this process in the group, and the size of the group.
        num_experts, num_local_experts: experts of the group, and of each rank (L).
        config: the settings in effect.
        capacity_factor: ``config.capacity_factor`` at first; :mod:`deepep_moe.overflow` raises it.
        replays: whether :mod:`deepep_moe.overflow` runs forwards that overflow again.
        least_tokens: the capacity is at least that of so many tokens of a rank; 0 unless an overflow asked for it.

    Raises:
        InputError: no process group, ``num_experts`` is no multiple of its size, or an argument of the wrong type.
        ConfigError: ``config`` has an unknown key or an impossible value.
        UnsupportedError: the configured backend cannot run here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        num_experts: int,
        config: DispatcherConfig | Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = _as_config(config)
        self.use_backend(get_backend(_as_group(group), _as_device(device), self.config))
        self.rank, self.world_size = self.backend.rank, self.backend.world_size
        check_num_experts(num_experts, self.world_size)
        self.num_experts = operator.index(num_experts)
        self.num_local_experts = self.num_experts // self.world_size
        self._statistics: Statistics | None = None
        self.replays = False
        self.capacity_factor, self.least_tokens = self.config.capacity_factor, 0

    def use_backend(self, backend: Backend) -> None:
        """Let ``backend`` execute the calls from now on."""
        self.backend = backend
        self._backend_number = ops.register_backend(backend)

    @property
    def local_experts(self) -> range:
        """Indices of this rank's experts among those of the group."""
        return range(self.rank * self.num_local_experts, (self.rank + 1) * self.num_local_experts)

    def __repr__(self) -> str:
        default, settings = DispatcherConfig(), dict[str, Any](backend=self.backend.name)
        for field in fields(default):
            value = getattr(self.config, field.name)
            if field.name != "backend" and value != getattr(default, field.name):
                settings[field.name] = value
        changed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        return (
            f"TokenDispatcher(num_experts={self.num_experts}, rank={self.rank}, world_size={self.world_size}, "
            f"device={str(self.backend.device)!r}, {changed})"
        )

    def plan(self, topk_idx: Tensor) -> Plan:
        """Exchange the routing without sending tokens yet. Collective.

        Useful if one plan serves several dispatches, or is made early.

        Args:
            topk_idx: [T, K], as for :meth:`dispatch`.

        Returns:
            A plan that :meth:`dispatch` takes in place of ``topk_idx``, any number of times.

        Raises:
            InputError, CapacityError, RankMismatchError, PeerError: as for :meth:`dispatch`.
        """
        plan = self._begin_plan(topk_idx)
        plan.known_sizes()  # raises any error of the plan here
        return plan

    def _begin_plan(self, topk_idx: Tensor | None) -> Plan:
        try:
            max_recv, max_rows = self._limits(topk_idx)
        except Exception as error:
            self.refuse("plan", error)
        assert topk_idx is not None
        return ops.make_plan(
            topk_idx, self._backend_number, self.num_experts, self.config.expert_alignment, max_recv, max_rows
        )

    def refuse(self, phase: Phase, error: Exception) -> NoReturn:
        """Raise ``error``, and make the other ranks raise it as a PeerError in their next call instead of waiting.

        For layers that find errors of their own between calls of the dispatcher.

        Args:
            phase: what the other ranks call next: ``"plan"`` (also for a :meth:`dispatch` without a plan),
                ``"dispatch"`` or ``"combine"``.
            error: what to raise here.
        """
        try:
            self.backend.refuse(phase, error)
        finally:
            del error  # or its traceback, which holds this frame, would keep the caller's tensors alive

    def dispatch(self, x: Tensor, topk_idx: Tensor | Plan, topk_weights: Tensor | None = None) -> Dispatched:
        """Send every token to the experts it chose. Collective; differentiable in ``x`` and ``topk_weights``.

        Args:
            x: [T, H] bf16, fp16 or fp32 tokens of this rank.
            topk_idx: [T, K] int32 or int64 experts of each token, -1 for a dropped route; or a plan of this dispatcher.
            topk_weights: [T, K] routing weights, any float type; they travel as fp32.

        Returns:
            The rows of this rank's experts, on the device and in the dtype of ``x``.

        Raises:
            InputError: an argument of the wrong shape, dtype, device or value (values are not checked on a GPU).
            HandleError: a plan of another dispatcher.
            UnsupportedError: forward-mode differentiation, or another transform of torch.func.
            CapacityError: more rows than fit, with ``capacity_factor`` above 0.
            RankMismatchError, PeerError: ranks disagree (also in what requires gradients), or another rank refused its
                input or died.
        """
        routes, plan = (None, topk_idx) if is_plan(topk_idx) else (topk_idx, None)
        try:
            _check_differentiable("x", x)
            # While torch.compile traces, an error would be raised on this rank alone: then the backend checks.
            if not torch.compiler.is_compiling():
                _check_dtype("x", x)
            if plan is not None:
                self._check_plan(plan)
            elif isinstance(routes, Tensor) and routes.dim() == 2 and not torch.compiler.is_compiling():
                check_rows("x", x, routes.shape[0], "the plan's tokens", SUMMED_DTYPES, self.backend.device)
            if topk_weights is not None:
                topk_weights = _as_weights("topk_weights", topk_weights)
        except Exception as error:
            self.refuse("plan" if plan is None else "dispatch", error)
        if plan is None:
            plan = self._begin_plan(routes)
        rows, weights = ops.dispatch(x, topk_weights, plan, self._backend_number, self.config.fp8_dispatch)
        if self._statistics is not None and not torch.compiler.is_compiling():
            as_fp8 = self.config.fp8_dispatch and x.dtype == torch.bfloat16
            row_bytes = x.shape[1] + 4 * (x.shape[1] // BLOCK) if as_fp8 else x.shape[1] * x.element_size()
            self._statistics.count(plan, row_bytes + (0 if weights is None else 4 * plan.num_topk))
        return Dispatched(rows, weights, plan)

    def combine(self, rows: Tensor, dispatched: Dispatched, *, weights: Tensor | None = None) -> Tensor:
        """Sum the rows of each token at the rank it came from. Collective; differentiable in rows and weights.

        Args:
            rows: [M, H'] bf16, fp16 or fp32, in the order of ``dispatched.rows``; padding rows are ignored.
            dispatched: what :meth:`dispatch` returned; may be combined more than once.
            weights: [M], multiplied into the rows (in fp32) before summing; usually ``dispatched.weights``.

        Returns:
            [T, H'] in the rows' dtype. Sums are in fp32; one partial sum per token and rank is rounded to the
            rows' dtype on its way. Tokens without a route are 0.

        Raises:
            HandleError: ``dispatched`` comes from a dispatcher with another group or configuration.
            InputError, UnsupportedError, RankMismatchError, PeerError: as for :meth:`dispatch`.
        """
        try:
            if not isinstance(dispatched, Dispatched):
                raise HandleError(f"dispatched is {describe(dispatched)}; pass on what dispatch() returned")
            self._check_plan(dispatched.plan)
            _check_differentiable("rows", rows)
            if not torch.compiler.is_compiling():
                whose = "as many as dispatched.rows"
                check_rows("rows", rows, dispatched.plan.num_rows, whose, SUMMED_DTYPES, self.backend.device)
            if weights is not None:
                weights = _as_weights("weights", weights)
        except Exception as error:
            self.refuse("combine", error)
        tokens, _ = ops.combine(
            rows,
            weights,
            dispatched.plan,
            self._backend_number,
            weights is not None,
            self.config.fp8_dispatch_grad,
        )
        return tokens

    def stats(self) -> dict[str, Any]:
        """Numbers for a trainer's logs, since the last call. Counting begins with the first call. Local.

        Nothing waits for the device until a tensor is read, except for ``waits`` with ``debug_waits``.

        Returns:
            ``dispatches``: calls of :meth:`dispatch`. ``tokens``: their tokens.
            ``load``: [L] int64 tensor, rows of each local expert without padding.
            ``sent_rows``, ``sent_bytes``: 0-dim tensors, what those calls sent to other ranks; combine and the two
            backwards each send as many rows again.
            ``waits``: seconds that this rank has waited since its backend was made: of the host, by phase, on
            ``collective`` and ``hierarchical``; summed over warps, by peer, on ``nvlink`` with ``debug_waits``.
        """
        if self._statistics is None:
            self._statistics = Statistics(self.rank, self.num_local_experts, self.backend.device)
        return {**self._statistics.take(), "waits": self.backend.waits()}

    def decoder(self, max_tokens_per_rank: int, *, fp8: bool = False) -> Decoder:
        """Dispatch and combine for generation: few tokens, fixed shapes, no host wait. Collective; see decoder.py.

        Args:
            max_tokens_per_rank: most tokens of any rank, equal on all of them.
            fp8: rows travel and arrive as e4m3 with one scale per 128 channels.
        """
        return Decoder(self.backend, self.num_experts, max_tokens_per_rank, fp8)

    def _check_plan(self, plan: Plan) -> None:
        """What the backend, which other dispatchers share, cannot know."""
        if not is_plan(plan):
            raise HandleError(f"plan is {describe(plan)}; pass on what plan() or dispatch() returned")
        made, own = (plan.num_experts, plan.alignment), (self.num_experts, self.config.expert_alignment)
        if made != own:
            raise HandleError(
                f"the plan was made for {made[0]} experts with rows aligned to {made[1]}, this dispatcher has {own[0]} "
                f"and {own[1]}: use a plan that it made itself"
            )

    def _limits(self, topk_idx: Tensor | None) -> tuple[int, int]:
        """Fixed numbers of received and expert rows in capacity mode; a balanced load is K routes per own token."""
        check_tensor("topk_idx", topk_idx)
        assert topk_idx is not None
        factor = self.capacity_factor
        if factor == 0 or topk_idx.dim() != 2:
            return ops.NO_LIMIT, ops.NO_LIMIT
        if self.config.replay_on_overflow and not self.replays and not torch.compiler.is_compiling():
            warn_once(
                "replay_on_overflow has no effect on a TokenDispatcher by itself: call "
                "deepep_moe.overflow.replay_on_overflow(model) for the model whose forward is to run again"
            )
        tokens, topk = self.config.max_tokens_per_rank or topk_idx.shape[0], topk_idx.shape[1]
        tokens = max(tokens, self.least_tokens)
        alignment = self.config.expert_alignment
        received = math.ceil(factor * tokens * min(topk, self.world_size))
        rows = math.ceil(factor * tokens * topk) + self.num_local_experts * (alignment - 1)
        if max(received, rows) > _MOST_ROWS:
            raise InputError(
                "capacity_factor", factor, f"gives room for {max(received, rows)} rows, at most {_MOST_ROWS}"
            )
        return received, -(-rows // alignment) * alignment


def _as_group(group: Any) -> dist.ProcessGroup | None:
    if not isinstance(group, DeviceMesh):
        return group  # type: ignore[no-any-return]
    if group.ndim != 1:
        names = f" {group.mesh_dim_names}" if group.mesh_dim_names else ""
        raise InputError(
            "group", f"a DeviceMesh of {group.ndim} dimensions{names}", 'must have one: pass a part, such as mesh["ep"]'
        )
    if group.get_coordinate() is None:
        raise InputError("group", group, "must be a DeviceMesh that this process belongs to")
    return group.get_group()


def _as_config(config: Any) -> DispatcherConfig:
    if isinstance(config, DispatcherConfig):
        return config
    if config is not None and not isinstance(config, Mapping):
        raise InputError("config", describe(config), "must be a DispatcherConfig or a mapping of its fields")
    return DispatcherConfig.load(config, source="argument config")


def _as_device(device: Any) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (TypeError, RuntimeError):
        raise InputError("device", repr(device), "must be a torch.device or its name") from None


def _check_dtype(argument: str, x: Tensor) -> None:
    """That combine can sum what dispatch sends: the backends also send dtypes that they cannot sum."""
    if x.dtype not in SUMMED_DTYPES:
        raise InputError(argument, x.dtype, "must be one of " + ", ".join(str(dtype) for dtype in SUMMED_DTYPES))


def _as_weights(argument: str, weights: Tensor) -> Tensor:
    """As fp32, in which weights travel."""
    _check_differentiable(argument, weights)
    if not weights.is_floating_point():
        raise InputError(argument, weights.dtype, "must be floating point")
    return weights.float()


def _check_differentiable(argument: str, x: Tensor) -> None:
    """That gradients of ``x``, if any, are of the kind that dispatch and combine pass on."""
    check_tensor(argument, x)
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise UnsupportedError(f"{argument} is inside a transform of torch.func; only autograd's backward is offered")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise UnsupportedError(f"{argument} has a tangent (forward-mode AD); only autograd's backward is offered")
