"""Low-latency calls in flight: sent, with a hook that has not been called yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from deepep_moe.errors import HandleError
from deepep_moe.tracing import not_compiled

CALLS_IN_FLIGHT = 2
"""Of each kind, at most: a call uses the memory of the call two before it."""


@dataclass(eq=False)
class InFlight:
    """The calls of one kind whose hook has not been called yet. A call uses the memory of the call two before it."""

    kind: str
    made: int = 0
    """Number of the last call."""
    waiting: dict[int, Callable[[], None]] = field(default_factory=dict)
    """By number of the call: what its hook does."""
    received_early: set[int] = field(default_factory=set)
    """Calls that were received although their hook has not been called."""
    closed: bool = False

    def close(self) -> None:
        """Forget what hooks do: the memory of the calls is released."""
        self.waiting.clear()
        self.closed = True

    def check(self) -> None:
        """Raise HandleError if a call whose memory the next call needs has not been received."""
        if self.waiting and (late := self._late()):
            raise HandleError(
                f"return_recv_hook: the hook of {self.kind} {late[0]} was not called, and this is {self.kind} "
                f"{self.made + 1}: at most {CALLS_IN_FLIGHT} may be in flight"
            )

    def receive_late(self) -> None:
        """Receive the calls whose memory the next call needs. Their hooks then do nothing."""
        for number in self._late():
            self.received_early.add(number)
            self.waiting.pop(number)()

    def hook(self, receive: Callable[[], None]) -> Callable[[], None]:
        """The hook of the last call."""
        self.waiting[self.made] = receive
        return partial(_receive, self, self.made)

    def _late(self) -> list[int]:
        return sorted(number for number in self.waiting if number <= self.made + 1 - CALLS_IN_FLIGHT)


@not_compiled
def _receive(in_flight: InFlight, number: int) -> None:
    """What the hook of call ``number`` does."""
    if number in in_flight.received_early:
        in_flight.received_early.remove(number)
    elif number in in_flight.waiting:
        in_flight.waiting.pop(number)()
    elif in_flight.closed:
        raise HandleError(f"the hook of {in_flight.kind} {number}: its Buffer was destroyed before")
    else:
        raise HandleError(f"the hook of {in_flight.kind} {number} was called twice")
