"""Hide communication behind computation: start a dispatch or combine now, take its result later.

* :class:`Overlap` starts a dispatcher's calls on a communication stream; :meth:`InFlight.wait` makes the current
  stream wait for the result. The host never waits. In between goes whatever does not need the result, for example
  a shared expert::

      overlap = Overlap(dispatcher)
      sent = overlap.begin_dispatch(x, topk_idx, topk_weights)
      shared = shared_expert(x)                     # runs while tokens travel
      dispatched = sent.wait()

* :meth:`Overlap.pipeline` runs a whole layer in ``config.num_chunks`` chunks of tokens, so that one chunk travels
  while the experts compute another.

Both are differentiable, and the backward overlaps too: autograd runs each operator on the stream its forward ran on
and orders the streams. On a CPU calls are complete when they return and the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from deepep_moe.backends import Plan
from deepep_moe.backends.checks import check_shape
from deepep_moe.backends.tensor_plan import is_plan
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.events import EventOverlap, StreamRunner
from deepep_moe.shared import Shared

T = TypeVar("T")


class InFlight(Generic[T]):
    """A result that is on its way."""

    def __init__(self, result: T, event: EventOverlap) -> None:
        self._result, self._event = result, event

    def wait(self) -> T:
        """The result, for use on the current stream from here on."""
        self._event.current_stream_wait()
        return self._result


class Overlap(Shared):
    """Calls of ``dispatcher`` that run beside the current stream.

    All ranks begin the same calls in the same order; results may be waited for in any order.
    """

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self.dispatcher = dispatcher
        self._runner = StreamRunner(dispatcher.backend.device)

    def begin_dispatch(
        self, x: Tensor, topk_idx: Tensor | Plan, topk_weights: Tensor | None = None
    ) -> InFlight[Dispatched]:
        """Start :meth:`TokenDispatcher.dispatch`. With a plan instead of indices nothing waits for the host."""
        routing = topk_idx.memory() if is_plan(topk_idx) else (topk_idx,)
        sent, event = self._runner.run(
            lambda: self.dispatcher.dispatch(x, topk_idx, topk_weights),
            async_finish=True,
            reads=_on_device(x, topk_weights, *routing),
            made=lambda made: (made.rows, made.weights, *made.plan.memory()),
        )
        return InFlight(sent, event)

    def begin_combine(self, rows: Tensor, dispatched: Dispatched, *, weights: Tensor | None = None) -> InFlight[Tensor]:
        """Start :meth:`TokenDispatcher.combine`."""
        plan = dispatched.plan.memory() if isinstance(dispatched, Dispatched) else ()
        tokens, event = self._runner.run(
            lambda: self.dispatcher.combine(rows, dispatched, weights=weights),
            async_finish=True,
            reads=_on_device(rows, weights, *plan),
            made=lambda made: (made,),
        )
        return InFlight(tokens, event)

    def pipeline(
        self,
        experts: Callable[[Dispatched], Tensor],
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None = None,
    ) -> Tensor:
        """One MoE layer, ``config.num_chunks`` chunks of tokens at a time; equal to doing all at once.

        Args:
            experts: what to do with a chunk's rows; called once per chunk, with no rows too.
            x, topk_idx, topk_weights: as for :meth:`TokenDispatcher.dispatch`. Weights multiply the experts' rows.

        Returns:
            [T, H'] in the dtype of what ``experts`` returns.
        """
        count = self.dispatcher.config.num_chunks
        try:
            device = self.dispatcher.backend.device
            check_shape("x", x, (None, None), device)
            check_shape("topk_idx", topk_idx, (x.shape[0], None), device)
            if topk_weights is not None:
                check_shape("topk_weights", topk_weights, tuple(topk_idx.shape), device)
        except Exception as error:
            self.dispatcher.refuse("plan", error)
        tokens = x.tensor_split(count)
        weights = (None,) * count if topk_weights is None else topk_weights.tensor_split(count)
        # All plans first: they are small, and from here on the host waits for nothing.
        plans = [self.dispatcher.plan(chunk) for chunk in topk_idx.tensor_split(count)]

        combining: list[InFlight[Tensor]] = []
        sent = self.begin_dispatch(tokens[0], plans[0], weights[0])
        for i in range(count):
            arrived = sent.wait()
            if i + 1 < count:  # travels while the experts work on chunk i
                sent = self.begin_dispatch(tokens[i + 1], plans[i + 1], weights[i + 1])
            rows = experts(arrived)
            combining.append(self.begin_combine(rows, arrived, weights=arrived.weights))
        return torch.cat([chunk.wait() for chunk in combining])


def _on_device(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_cuda]
