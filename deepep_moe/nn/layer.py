"""A complete MoE layer: :class:`MoELayer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepep_moe.backends.base import Phase
from deepep_moe.backends.checks import check_tensor, describe
from deepep_moe.dispatcher import TokenDispatcher
from deepep_moe.errors import InputError
from deepep_moe.nn.experts import GroupedExperts
from deepep_moe.nn.parallel import ExpertParallel
from deepep_moe.nn.router import Router, TopKRouter


class MoELayer(ExpertParallel):
    """Router, dispatch, experts, combine, and optionally a shared expert that every token passes through.

    All ranks of the dispatcher's group call the layer together; the numbers of tokens may differ, 0 included. An error
    on one rank, in the router and the experts too, is an error on all of them. (Except errors that torch.compile meets
    while it traces the layer: the others then wait for that rank until ``timeout_seconds``.)

    Args:
        dispatcher: sends the tokens; one dispatcher can serve any number of layers with as many experts.
        router: maps tokens to experts and weights; see :class:`Router`.
        experts: the experts of this rank (``dispatcher.local_experts``), for example :class:`GroupedExperts`. Called as
            ``experts(rows, tokens_per_expert)`` with rows [M, H] in expert order and [L] int64 counts, which are on the
            CPU if the host knows them; returns [M, H'].
        shared_expert: called with all tokens of this rank, [T, H] to [T, H']; its result is added.

    Raises:
        InputError: an argument of the wrong type.
    """

    def __init__(
        self,
        dispatcher: TokenDispatcher,
        router: Router,
        experts: nn.Module,
        shared_expert: nn.Module | None = None,
    ) -> None:
        if not isinstance(dispatcher, TokenDispatcher):
            raise InputError("dispatcher", describe(dispatcher), "must be a TokenDispatcher")
        if not isinstance(experts, nn.Module):
            raise InputError("experts", describe(experts), "must be a torch.nn.Module")
        if not callable(router):
            raise InputError("router", describe(router), "must be callable: from tokens to topk_idx and topk_weights")
        if isinstance(router, TopKRouter) and router.weight.shape[0] != dispatcher.num_experts:
            raise InputError(
                "router", f"{router.weight.shape[0]} experts", f"the dispatcher has {dispatcher.num_experts} experts"
            )
        if isinstance(experts, GroupedExperts) and experts.experts != dispatcher.local_experts:
            raise InputError(
                "experts",
                f"experts {experts.experts[0]} to {experts.experts[-1]}",
                "must be those of this rank: GroupedExperts(dispatcher.local_experts, ...)",
            )
        if shared_expert is not None and not callable(shared_expert):
            raise InputError("shared_expert", describe(shared_expert), "must be a torch.nn.Module")
        super().__init__(dispatcher, experts)
        self.router = router
        self.shared_expert = shared_expert

    def forward(self, x: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            x: [..., H] bf16, fp16 or fp32 tokens of this rank.

        Returns:
            [..., H'] in the dtype of the experts' output: for each token the weighted sum of its experts' outputs, plus
            the shared expert's.

        Raises:
            InputError: an argument of the wrong shape, dtype, device or value; or DDP or FSDP2 treats the parameters of
                experts as those of a replicated module.
            RankMismatchError, PeerError: as for :meth:`TokenDispatcher.dispatch`.
        """
        self.check_data_parallelism()
        tokens = self._call("plan", self._flatten, x)
        topk_idx, topk_weights = self._call("plan", self._route, tokens)
        sent = self.dispatcher.dispatch(tokens, topk_idx, topk_weights)
        counts = sent.tokens_per_expert_host
        rows = self._call("combine", self.experts, sent.rows, sent.tokens_per_expert if counts is None else counts)
        shared = self._call("combine", self._apply_shared_expert, tokens, rows)
        out = self.dispatcher.combine(rows, sent, weights=sent.weights)
        if shared is not None:
            out = out + shared
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])  # no view unless needed: FSDP2 warns

    def _flatten(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        if x.dim() == 0:
            raise InputError("x", "a tensor without dimensions", "must be [..., H]")
        if not torch.compiler.is_compiling() and x.device.type != self.dispatcher.backend.device.type:
            raise InputError("x", f"on device {x.device}", f"must be on {self.dispatcher.backend.device}")
        return x.flatten(0, -2) if x.dim() > 1 else x.view(1, -1)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        routing = self.router(tokens)
        if not isinstance(routing, tuple) or len(routing) != 2:
            shown = f"{len(routing)} values" if isinstance(routing, tuple) else describe(routing)
            raise InputError("router(x)", shown, "must be two tensors: topk_idx and topk_weights")
        return routing

    def _apply_shared_expert(self, tokens: Tensor, rows: Tensor) -> Tensor | None:
        if self.shared_expert is None:
            return None
        shared = self.shared_expert(tokens)
        if not torch.compiler.is_compiling() and isinstance(rows, Tensor):  # else combine refuses the rows
            check_tensor("shared_expert(x)", shared)
            wanted = (tokens.shape[0], rows.shape[-1])  # another shape would be broadcast
            if shared.shape != wanted:
                raise InputError("shared_expert(x)", f"shape {tuple(shared.shape)}", f"must be {list(wanted)}")
        return shared  # type: ignore[no-any-return]

    def _call(self, phase: Phase, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``; an error is passed on to the other ranks, which are on their way into ``phase``."""
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return function(*args)
        except Exception as error:
            self.dispatcher.refuse(phase, error)
