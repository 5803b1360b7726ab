"""The ``deepep`` token dispatcher of Megatron-Core: ``TokenDispatcher`` in the six phases that ``MoELayer`` calls.

=======================  ====================================================  ==========================
phase                    does                                                  gives
=======================  ====================================================  ==========================
``dispatch_preprocess``  routing map to expert indices; no wait, no traffic    tokens [T, H], probs [T, K]
``token_dispatch``       one dispatch over the expert x tensor ranks           rows [M, H], probs [M]
``dispatch_postprocess`` rows are in expert order already                      rows, counts [L], probs
``combine_preprocess``   nothing                                               rows [M, H]
``token_combine``        one combine, summed per token                         tokens [T, H]
``combine_postprocess``  original shape, shared experts added                  like the input
=======================  ====================================================  ==========================

Experts multiply by the probabilities themselves, so combine is a plain sum and the gradient of the probabilities
returns through dispatch. Between phases the object keeps only what the forward of one micro-batch needs next; the
backward relies on autograd alone, because the 1F1B overlap and recomputation run forwards in between.

The peers of a rank with an error are told of it in the communication that they are on their way into, so that all raise
and none waits. ``dispatch_preprocess`` does not communicate: what it refuses is told by ``token_dispatch``. What the
router or the experts raise inside of ``MoELayer.forward`` is told by :meth:`DeepEPTokenDispatcher.tell_peers`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from deepep_moe.backends.base import Phase
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.errors import DeepEPMoEError, InputError
from deepep_moe.integrations.megatron.options import check_options, dispatcher_config
from deepep_moe.integrations.megatron.routes import routes
from deepep_moe.notices import warn_once

_IN_FLIGHT = ("hidden_shape", "topk_idx", "_next", "_refused", "_dispatched", "_places")


class DeepEPTokenDispatcher(MoETokenDispatcher):
    """Moves tokens over one group of all expert-parallel and expert-tensor-parallel ranks.

    With expert tensor parallelism every route is sent to all ranks that hold a slice of the expert, and combine sums
    their partial results. The routing probabilities travel as fp32 and reach the experts in the router's dtype.

    Args:
        num_local_experts: L, experts of this rank.
        local_expert_indices: their global indices, consecutive.
        config: ``TransformerConfig``.
        pg_collection: process groups; ``ep``, ``expt_tp`` and ``tp_ep`` are used.
    """

    def __init__(
        self, num_local_experts: int, local_expert_indices: list[int], config: Any, pg_collection: Any = None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        check_options(config)
        first = local_expert_indices[0] if local_expert_indices else 0
        if num_local_experts < 1 or local_expert_indices != list(range(first, first + num_local_experts)):
            raise InputError("local_expert_indices", local_expert_indices, f"{num_local_experts} consecutive experts")
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts: int = config.num_moe_experts
        self.dispatcher = TokenDispatcher(self.tp_ep_group, self.tp_size * self.num_experts, dispatcher_config(config))
        if self.dispatcher.config.num_chunks > 1:
            warn_once(f"num_chunks = {self.dispatcher.config.num_chunks} has no effect in Megatron-Core layers")
        # Megatron-Core flips this one while it decodes under CUDA graphs.
        self.drop_and_pad = bool(config.moe_pad_expert_input_to_capacity)
        # Tensors that dispatch_preprocess leaves here; a captured graph hands them over by these names.
        self.cudagraph_attrs = ["topk_idx"]

        self.hidden_shape: torch.Size | None = None
        self.topk_idx: Tensor | None = None
        self.probs_dtype = torch.float32
        self._next: Phase | None = None  # which communication the peers await, unless this rank is inside of one
        self._refused: DeepEPMoEError | None = None  # what dispatch_preprocess found, for token_dispatch to say
        self._dispatched: Dispatched | None = None
        self._places: Tensor | None = None  # of the rows among those padded to capacity

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Run ``shared_experts`` on their own stream beside dispatch and combine, and add their output."""
        super().set_shared_experts(shared_experts)
        if shared_experts.use_shared_expert_gate:
            self.cudagraph_attrs.append("shared_experts.gate_score")
        self.cudagraph_attrs.append("shared_experts.cached_fc1_input")

    def __deepcopy__(self, memo: dict[int, Any]) -> DeepEPTokenDispatcher:
        """For a copy of the layer: the same dispatcher and groups, the copy's shared experts, nothing in flight."""
        new = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            shared = isinstance(value, dist.ProcessGroup)
            setattr(new, name, None if name in _IN_FLIGHT else value if shared else copy.deepcopy(value, memo))
        return new

    @contextmanager
    def tell_peers(self) -> Iterator[None]:
        """Around the forward of a layer: what goes wrong on this rank alone is told to the others, then raised."""
        self._next = "plan"
        try:
            yield
        except Exception as error:
            if self._next is not None:
                self.dispatcher.refuse(self._next, error)
            raise
        finally:
            self._next = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the routing map into expert indices, without waiting for the device.

        Args:
            hidden_states: ``[S / TP, B, H]`` or ``[T, H]``.
            routing_map: ``[T, E]`` bool. A row has at most ``moe_router_topk`` routes; dropped ones are missing.
            probs: ``[T, E]``.

        Returns:
            Tokens ``[T, H]`` and their probabilities ``[T, K]`` fp32; 0 where there is no route.
        """
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self._refused = self._check_routing(tokens, routing_map, probs)
        if self._refused is not None:
            routing_map = torch.zeros((len(tokens), self.num_experts), dtype=torch.bool, device=tokens.device)
            probs = torch.zeros(routing_map.shape, dtype=torch.float32, device=tokens.device)
        self.probs_dtype = probs.dtype
        if self.drop_and_pad:
            # Routes that only fill an expert up to its capacity have probability 0. They would carry tokens that are
            # multiplied by 0: dispatch_postprocess fills up with zero rows instead.
            routing_map = routing_map & (probs != 0)
        self.topk_idx, topk_probs = self._routes(routing_map, probs)
        return tokens, topk_probs

    def _check_routing(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> InputError | None:
        """What is wrong with the routing. On a GPU the plan finds extra routes: nothing here waits for the device."""
        shape = (tokens.shape[0], self.num_experts)
        for name, given in (("routing_map", routing_map), ("probs", probs)):
            if not isinstance(given, Tensor):
                return InputError(name, type(given).__name__, "must be a torch.Tensor")
            if given.device != tokens.device:
                return InputError(name, given.device, f"must be on {tokens.device}, the device of hidden_states")
        if routing_map.dtype != torch.bool or routing_map.shape != shape or probs.shape != shape:
            return InputError(
                "routing_map, probs",
                f"{routing_map.dtype} {list(routing_map.shape)}, {list(probs.shape)}",
                f"a bool map and probabilities of shape {list(shape)} (tokens, experts)",
            )
        if not probs.is_floating_point():
            return InputError("probs", probs.dtype, "must be floating point")
        topk = self.config.moe_router_topk
        if routing_map.is_cuda or not len(tokens):
            return None
        wanted = routing_map & (probs != 0) if self.drop_and_pad else routing_map
        most = int(wanted.sum(dim=1).max())
        if most > topk:
            return InputError(
                "routing_map", f"{most} routes in a row", f"at most moe_router_topk = {topk} routes per token"
            )
        return None

    def _routes(self, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Indices ``[T, K]`` (-1 = none) over the ranks' group, in ascending order, and their probabilities."""
        index, weights = routes(routing_map, probs, self.config.moe_router_topk)
        if self.tp_size == 1:
            return index, weights
        # Ranks of the group: expert-parallel rank major, expert-tensor-parallel rank minor.
        owner, local = index // self.num_local_experts, index % self.num_local_experts
        slices = torch.arange(self.tp_size, dtype=torch.int64, device=index.device)
        expert = (owner[..., None] * self.tp_size + slices) * self.num_local_experts + local[..., None]
        expert = torch.where(index[..., None] >= 0, expert, -1)
        return expert.flatten(1), weights.repeat_interleave(self.tp_size, 1)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send tokens ``[T, H]`` and probabilities ``[T, K]`` to the experts: rows ``[M, H]`` and theirs, ``[M]``."""
        assert self.topk_idx is not None, "token_dispatch follows dispatch_preprocess"
        self._shared_experts_wait()
        self._next = None
        if self._refused is not None:
            error, self._refused = self._refused, None
            try:
                self.dispatcher.refuse("plan", error)
            finally:
                del error  # its traceback holds this frame: together they would keep the tensors alive
        dispatched = self.dispatcher.dispatch(hidden_states, self.topk_idx, probs)
        self._next = "combine"
        assert dispatched.weights is not None
        self.topk_idx = None
        # The rows belong to the caller, who may free them; here only the plan and the counts live on.
        self._dispatched = replace(dispatched, rows=dispatched.rows.new_empty(0), weights=None)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(dispatched.rows)
        return dispatched.rows, dispatched.weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in expert order, how many each local expert has (``[L]`` int64, on the CPU if known), and probs."""
        assert self._dispatched is not None, "dispatch_postprocess follows token_dispatch"
        counts = self._dispatched.tokens_per_expert_host
        if counts is None:
            counts = self._dispatched.tokens_per_expert
        if self.drop_and_pad:
            hidden_states, counts, probs = self._pad_to_capacity(hidden_states, counts, probs)
        return hidden_states, counts, probs.to(self.probs_dtype)

    def _pad_to_capacity(self, rows: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill every expert's rows up to what all ranks together may send it, with zero rows."""
        assert self.hidden_shape is not None
        assert self._dispatched is not None
        num_tokens = self.hidden_shape[:-1].numel()
        capacity = get_capacity(
            num_tokens=num_tokens * self.config.moe_router_topk,
            num_experts=self.num_experts,
            capacity_factor=self.config.moe_expert_capacity_factor,
        )
        alignment = self.dispatcher.config.expert_alignment
        size = -(-capacity * self.dispatcher.world_size // alignment) * alignment
        rule = "moe_pad_expert_input_to_capacity needs the same number of tokens on all ranks"
        if counts.is_cuda:  # in capacity mode, where the host must not wait for them
            torch._assert_async((counts <= size).all(), rule)
        elif bool((counts > size).any()):
            self._next = None
            arrived = f"this rank's capacity allows {size} rows per expert and {int(counts.max())} arrived"
            self.dispatcher.refuse("combine", InputError("hidden_states", f"{num_tokens} tokens", f"{rule}: {arrived}"))
        on_device = self._dispatched.tokens_per_expert
        ends = on_device.cumsum(0)
        total = self.num_local_experts * size
        places = torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device)
        expert = torch.searchsorted(ends, places, right=True)  # L for rows after the last group, in capacity mode
        firsts = torch.arange(self.num_local_experts, dtype=torch.int64, device=rows.device) * size
        shift = torch.cat([firsts - (ends - on_device), ends.new_zeros(1)])
        places = torch.where(expert < self.num_local_experts, places + shift[expert], total)
        self._places = places.clamp(max=total - 1)  # what combine gets for a row of nobody does not matter
        padded = rows.new_zeros(total + 1, rows.shape[1]).index_copy(0, places, rows)[:total]
        return padded, torch.full_like(counts, size), probs.new_zeros(total + 1).index_copy(0, places, probs)[:total]

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Expert outputs as dispatched: without the rows that pad to capacity."""
        if self._places is None:
            return hidden_states
        places, self._places = self._places, None
        return hidden_states.index_select(0, places)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send expert outputs ``[M, H]`` back and sum them per token: ``[T, H]``."""
        assert self._dispatched is not None, "token_combine follows token_dispatch"
        self._shared_experts_wait()
        dispatched, self._dispatched = self._dispatched, None
        self._next = None
        tokens = self.dispatcher.combine(hidden_states, dispatched)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(tokens)
            self.shared_experts.post_forward_comm()
        return tokens

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Tokens in the shape that :meth:`dispatch_preprocess` got, plus the shared experts' output."""
        assert self.hidden_shape is not None
        output = hidden_states.view(self.hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def _shared_experts_wait(self) -> None:
        """Let the shared experts' next GEMM start beside the communication, not beside what came before it."""
        if self.shared_experts is not None and hasattr(self.shared_experts, "wait_current_stream"):  # from 0.17
            self.shared_experts.wait_current_stream()
