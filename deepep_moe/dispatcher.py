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
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from deepep_moe import ops
from deepep_moe.backends import Backend, Plan, get_backend
from deepep_moe.backends.base import Phase
from deepep_moe.backends.checks import check_num_experts, check_tensor, describe
from deepep_moe.backends.tensor_plan import is_plan
from deepep_moe.config import DispatcherConfig
from deepep_moe.decoder import Decoder
from deepep_moe.errors import HandleError, InputError, UnsupportedError
from deepep_moe.shared import Shared

_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Dispatched:
    """Rows that arrived for the experts of this rank, grouped by expert, and the way back."""

    rows: Tensor
    """[M, H]: the group of local expert 0, then 1, ...; each ends with zero rows up to ``expert_alignment``."""
    weights: Tensor | None
    """[M] fp32: the routing weight of each row, 0 on padding; None when none were given."""
    plan: Plan
    """The routing; valid for any number of combines with the dispatcher that made it."""

    @property
    def tokens_per_expert(self) -> Tensor:
        """[L] int64 on the rows' device: rows of each group, padding included. They sum to M, in capacity mode to at
        most M: the rows after the last group are zero."""
        return self.plan.expert_offsets.diff()

    @property
    def tokens_per_expert_host(self) -> Tensor | None:
        """[L] int64 on the CPU, the same numbers; None in capacity mode, where the host never learns them."""
        counts, alignment = self.plan.expert_counts_host, self.plan.alignment
        if counts is None or alignment == 1:
            return counts
        return (counts + (alignment - 1)) // alignment * alignment


class TokenDispatcher(Shared):
    """Dispatch and combine for one expert-parallel group. A deep copy of it is itself.

    Args:
        group: the expert-parallel process group (None: the default group). Rank r owns experts
            ``r * L .. (r + 1) * L - 1`` with ``L = num_experts / group size``.
        num_experts: experts of the whole group.
        config: settings; default ``DispatcherConfig.load()``, which reads YAML and environment.
        device: where tensors live; default: the current CUDA device if the group serves it, else the CPU.

    Raises:
        InputError: no process group, or ``num_experts`` is no multiple of its size.
        UnsupportedError: the configured backend cannot run here.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_experts: int,
        config: DispatcherConfig | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.config = config if config is not None else DispatcherConfig.load()
        self.backend: Backend = get_backend(group, device, self.config)
        self.rank, self.world_size = self.backend.rank, self.backend.world_size
        check_num_experts(num_experts, self.world_size)
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.world_size
        self._backend_number = ops.register_backend(self.backend)

    def plan(self, topk_idx: Tensor) -> Plan:
        """Exchange the routing ``topk_idx [T, K]`` without sending tokens yet. Collective.

        Useful where a plan serves several dispatches or is made early; :meth:`dispatch` takes it in place of indices.
        """
        plan = self._begin_plan(topk_idx)
        plan.known_sizes()  # raises here what went wrong
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
        """Raise ``error`` and let the other ranks, who are on their way into ``phase``, raise too instead of waiting.

        For layers that check more than a dispatcher does. The phase of a :meth:`dispatch` without a plan is "plan".
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

        Raises:
            InputError: an argument of the wrong shape, dtype, device or value (on a GPU values are not looked at).
            HandleError: a plan of another dispatcher.
            UnsupportedError: forward-mode differentiation, or another transform of torch.func.
            RankMismatchError, PeerError: ranks disagree (also in what requires gradients), or another rank refused its
                input or died.
        """
        routes, plan = (None, topk_idx) if is_plan(topk_idx) else (topk_idx, None)
        try:
            _check_differentiable("x", x)
            if plan is not None:
                self._check_plan(plan)
            if topk_weights is not None:
                topk_weights = _as_weights("topk_weights", topk_weights)
        except Exception as error:
            self.refuse("plan" if plan is None else "dispatch", error)
        if plan is None:
            plan = self._begin_plan(routes)
        rows, weights = ops.dispatch(x, topk_weights, plan, self._backend_number, self.config.fp8_dispatch)
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
            InputError, RankMismatchError, PeerError: as for :meth:`dispatch`.
        """
        try:
            if not isinstance(dispatched, Dispatched):
                raise HandleError(f"dispatched is {describe(dispatched)}; pass on what dispatch() returned")
            self._check_plan(dispatched.plan)
            _check_differentiable("rows", rows)
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
        factor = self.config.capacity_factor
        if factor == 0 or topk_idx.dim() != 2:
            return ops.NO_LIMIT, ops.NO_LIMIT
        tokens, topk = self.config.max_tokens_per_rank or topk_idx.shape[0], topk_idx.shape[1]
        alignment = self.config.expert_alignment
        received = math.ceil(factor * tokens * min(topk, self.world_size))
        rows = math.ceil(factor * tokens * topk) + self.num_local_experts * (alignment - 1)
        if max(received, rows) > _MOST_ROWS:
            raise InputError(
                "capacity_factor", factor, f"gives room for {max(received, rows)} rows, at most {_MOST_ROWS}"
            )
        return received, -(-rows // alignment) * alignment


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
