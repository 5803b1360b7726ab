"""Events between streams: :class:`EventHandle`, :class:`EventOverlap`, and :class:`StreamRunner` that makes them.

On CUDA an event marks a place in the stream that was current when it was made. On a CPU work is done when a call
returns, so events are complete from the start and waiting for them does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from deepep_moe.errors import InputError, UnsupportedError

T = TypeVar("T")


class EventHandle:
    """Marks the current stream's place at the time of construction."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # else nothing was ever queued
            self._event = torch.cuda.Event()
            self._event.record()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for this event; the host does not wait."""
        if self._event is not None:
            self._event.wait()


class EventOverlap:
    """An event as users hold it: wait for it directly, or use ``with`` to run work while it is pending.

    Args:
        event: what to wait for; None means there is nothing to wait for.
        extra_tensors: kept alive together with the event.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait()


EventLike: TypeAlias = EventHandle | EventOverlap


class StreamRunner:
    """Runs communication on ``device`` in the way a caller asks for: in line, or on a stream of its own.

    In line is the default: the call is queued on the current stream and no event is needed. The communication
    stream is used where the caller can gain from it, that is with ``previous_event`` or ``async_finish``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """The communication stream, made on first use."""
        if self.device.type != "cuda":
            raise UnsupportedError(f"there are no streams on {self.device}; calls are complete when they return")
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device, priority=-1)
        return self._stream

    @staticmethod
    def check(
        previous_event: EventLike | tuple[EventLike | None, ...] | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> list[EventLike]:
        """What to wait for; raises InputError for arguments of :meth:`run` that make no sense."""
        events = previous_event if isinstance(previous_event, tuple) else (previous_event,)
        waits = [event for event in events if event is not None]
        for event in waits:
            if not isinstance(event, (EventHandle, EventOverlap)):
                raise InputError(
                    "previous_event", f"a {type(event).__name__}", "must be an EventOverlap or EventHandle"
                )
        if allocate_on_comm_stream and not (waits and async_finish):
            raise InputError("allocate_on_comm_stream", True, "needs previous_event and async_finish")
        return waits

    def run(
        self,
        call: Callable[[], T],
        *,
        previous_event: EventLike | tuple[EventLike | None, ...] | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        reads: Iterable[Tensor | None] = (),
        made: Callable[[T], Iterable[Tensor | None]] = lambda result: (),
    ) -> tuple[T, EventOverlap]:
        """``call()`` and the event of its end.

        Args:
            previous_event: what the communication stream waits for (one or several), instead of the current stream.
            async_finish: do not make the current stream wait; the caller waits for the event.
            allocate_on_comm_stream: accepted with the two above; memory always belongs to the stream that ran.
            reads: tensors that the call reads: their memory is not reused before it has.
            made: the tensors of its result, which the current stream will use.
        """
        waits = self.check(previous_event, async_finish, allocate_on_comm_stream)
        if self.device.type != "cuda":
            return call(), EventOverlap(EventHandle() if async_finish else None)
        if not waits and not async_finish:
            return call(), EventOverlap()

        compute, stream = torch.cuda.current_stream(self.device), self.stream
        if not waits:
            stream.wait_stream(compute)
        with torch.cuda.stream(stream):
            for event in waits:
                event.current_stream_wait()
            result = call()
            done = EventHandle()
        for tensor in reads:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(stream)
        for tensor in made(result):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(compute)
        if async_finish:
            return result, EventOverlap(done)
        done.current_stream_wait()
        return result, EventOverlap()
