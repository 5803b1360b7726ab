"""CUDA events and the communication stream: :class:`EventHandle`, :class:`EventOverlap`, :class:`StreamRunner`.

On CUDA an event is recorded on the stream that is current when the event is created. On a CPU calls are complete when
they return, so waiting for an event does nothing.
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
    """An event recorded on the current stream at construction."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # otherwise no work was ever enqueued
            self._event = torch.cuda.Event()
            self._event.record()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for this event; the host does not wait."""
        if self._event is not None:
            self._event.wait()


class EventOverlap:
    """The event that a call returns. Leaving a ``with`` block makes the current stream wait for it.

    Args:
        event: what to wait for; None: nothing.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the event; the host does not wait."""
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
    """Runs a communication call of ``device`` on the current stream, or on a separate communication stream.

    The communication stream is used with ``previous_event`` or ``async_finish``. Otherwise the call is enqueued on the
    current stream, which needs no event.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream:
        """The communication stream, created on first use. Raises UnsupportedError on a CPU."""
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
        """The events to wait for. Raises InputError for invalid arguments of :meth:`run`."""
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
        """Run ``call``.

        Args:
            previous_event: one or several events that the communication stream waits for, instead of the work on the
                current stream.
            async_finish: do not make the current stream wait; the caller waits for the returned event.
            allocate_on_comm_stream: accepted together with the two above; memory is always allocated on the stream
                that runs the call.
            reads: tensors that the call reads; recorded as used by the communication stream.
            made: gives the tensors of a result, which are recorded as used by the current stream.

        Returns:
            The result of ``call``, and the event of its end.
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
