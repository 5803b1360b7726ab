"""Decoder: dispatch and combine for generation inside a trainer, with fixed shapes and without host waits.

::

    decoder = dispatcher.decoder(max_tokens_per_rank=128)  # once, on all ranks

    with torch.no_grad():  # each step; may be captured in a CUDA graph
        sent = decoder.dispatch(x, topk_idx)
        y = experts(sent.rows, sent.counts)  # [L, R * M, H]; rows beyond an expert's count are undefined
        out = decoder.combine(y, sent, topk_weights)  # [T, H]

It calls the low-latency engine (low_latency.py). The dispatcher's own dispatch and combine may be called in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deepep_moe.backends import Backend
from deepep_moe.backends.checks import check_integer
from deepep_moe.errors import DeepEPMoEError, HandleError, InputError
from deepep_moe.events import StreamRunner
from deepep_moe.low_latency import LowLatency, LowLatencyHandle
from deepep_moe.low_latency_checks import MAX_EXPERTS, MAX_TOKENS, check_switches
from deepep_moe.shared import Shared
from deepep_moe.tracing import not_compiled

# All decoders of a backend share one engine and its memory, because layers run one after another.
_engines: WeakKeyDictionary[Backend, LowLatency] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Decoding:
    """Rows received for the experts of this rank, and what combine needs. L local experts, R ranks, M tokens each."""

    rows: Tensor
    """[L, R * M, H] bf16, or e4m3 with ``fp8``: the rows of each expert, ordered by source rank and token, then unused
    rows with undefined contents."""
    scales: Tensor | None
    """[L, R * M, H / 128] fp32 with ``fp8``: rows are e4m3 times scale."""
    counts: Tensor
    """[L] int32 on the rows' device: rows of each expert."""
    topk_idx: Tensor
    """[T, K]: the argument of dispatch."""
    handle: LowLatencyHandle


class Decoder(Shared):
    """Created by :meth:`TokenDispatcher.decoder`. It has no gradients. All calls are collective.

    Args:
        backend: the backend of the dispatcher.
        num_experts: experts of the whole group.
        max_tokens_per_rank: M, equal on all ranks.
        fp8: rows travel and arrive as e4m3 with one scale per 128 channels.
    """

    def __init__(self, backend: Backend, num_experts: int, max_tokens_per_rank: int, fp8: bool) -> None:
        check_integer("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS)
        check_integer("num_experts", num_experts, 1, MAX_EXPERTS)
        check_switches(fp8=fp8)
        engine = _engines.get(backend)
        if engine is None:
            engine = LowLatency(backend, backend.config.num_sms, False, StreamRunner(backend.device), rows="y")
            _engines[backend] = engine
        self._backend, self._engine = backend, engine
        self.num_experts, self.max_tokens_per_rank, self.fp8 = num_experts, max_tokens_per_rank, fp8

    @not_compiled
    def dispatch(self, x: Tensor, topk_idx: Tensor) -> Decoding:
        """Send ``x [T, H]`` bf16, T <= M, to the experts ``topk_idx [T, K]`` (int32 or int64, -1: dropped).

        The first call with a new M or hidden size allocates: make one before capturing a graph.

        Raises:
            InputError, RankMismatchError, PeerError: as ``Buffer.low_latency_dispatch``; and if ``x`` needs gradients.
        """
        if problem := _needs_gradient("x", x):
            self._engine.refuse_dispatch(x, self.max_tokens_per_rank, problem)
            raise problem
        call, handle, _, _ = self._engine.dispatch(
            x, topk_idx, self.max_tokens_per_rank, self.num_experts, None, None, (self.fp8, False, False), False, False
        )
        return Decoding(call.rows, call.scales, call.counts, topk_idx, handle)

    @not_compiled
    def combine(self, y: Tensor, sent: Decoding, topk_weights: Tensor) -> Tensor:
        """Sum the rows of each token times their weights, where the token came from.

        Args:
            y: [L, R * M, H] bf16, rows where ``sent.rows`` has them.
            sent: the result of :meth:`dispatch`.
            topk_weights: [T, K], any floating-point dtype; converted to float32.

        Returns:
            [T, H] bf16.

        Raises:
            As :meth:`dispatch`; HandleError if ``sent`` is not what it returned.
        """
        problem: DeepEPMoEError | None = _needs_gradient("y", y) or _needs_gradient("topk_weights", topk_weights)
        if not isinstance(sent, Decoding):
            problem = HandleError(f"sent is a {type(sent).__name__}; pass on what Decoder.dispatch returned")
        if problem is not None:
            handle = getattr(sent, "handle", None)
            self._engine.refuse_combine(handle.call if isinstance(handle, LowLatencyHandle) else None, problem)
            raise problem
        has_floats = isinstance(topk_weights, Tensor) and topk_weights.is_floating_point()
        weights = topk_weights.float() if has_floats else topk_weights
        out, _, _ = self._engine.combine(y, sent.topk_idx, weights, sent.handle, False, False, False, None, None)
        return out

    @not_compiled
    def check(self) -> None:
        """Raise what kernels have reported so far, including those of replayed graphs."""
        self._engine.check()


def _needs_gradient(argument: str, tensor: Tensor) -> InputError | None:
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        return InputError(argument, "requires a gradient", "decoding has none: call under torch.no_grad()")
    return None
