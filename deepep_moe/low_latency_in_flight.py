"""Low-latency calls in flight: sent, with a hook that has not been called yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deepep_moe.errors import HandleError

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
        number = self.made
        self.waiting[number] = receive

        def hook() -> None:
            if number in self.received_early:
                self.received_early.remove(number)
            elif number in self.waiting:
                self.waiting.pop(number)()
            elif self.closed:
                raise HandleError(f"the hook of {self.kind} {number}: its Buffer was destroyed before")
            else:
                raise HandleError(f"the hook of {self.kind} {number} was called twice")

        return hook

    def _late(self) -> list[int]:
        return sorted(number for number in self.waiting if number <= self.made + 1 - CALLS_IN_FLIGHT)
