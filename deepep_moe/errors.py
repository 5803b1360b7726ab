"""Every error a user can see.

All derive from :class:`DeepEPMoEError`, so ``except deepep_moe.errors.DeepEPMoEError`` catches what this
library raises on purpose. Each one also derives from the built-in exception a caller would expect
(``ValueError`` for a bad argument, ``TimeoutError`` for a slow peer), so generic handlers keep working.
"""

from __future__ import annotations


class DeepEPMoEError(RuntimeError):
    """Base of every error raised by deepep_moe."""


class InputError(DeepEPMoEError, ValueError):
    """An argument breaks a rule. The message names the argument, its value and the rule."""

    def __init__(self, argument: str, value: object, rule: str) -> None:
        self.argument, self.value, self.rule = argument, value, rule
        super().__init__(f"{argument} = {value}: {rule}")


class ConfigError(DeepEPMoEError, ValueError):
    """A setting is unknown or impossible. The message names the key, where it was set and what is allowed."""


class RankMismatchError(DeepEPMoEError, ValueError):
    """Ranks of one group disagree on something they must share (hidden size, experts, top-k, dtype)."""


class HandleError(DeepEPMoEError):
    """A handle or plan is used with another buffer, after destroy, or in a way its layout does not allow."""


class PeerError(DeepEPMoEError):
    """Communication with the group failed. The message names the phase and, when known, the peer."""


class PeerTimeoutError(PeerError, TimeoutError):
    """A peer did not answer in time. The message names who waited for whom, the phase and the progress."""


class CapacityError(DeepEPMoEError):
    """More rows arrived than the outputs or the staging memory hold. The message states the size needed.

    Attributes:
        needed, room: what did not fit, and what would have, in the same unit; 0 where it is not about numbers of rows.
        staging: they are tokens of one rank, of which staging memory must hold ``needed``; else rows of an output.
    """

    def __init__(self, message: str, *, needed: int = 0, room: int = 0, staging: bool = False) -> None:
        self.needed, self.room, self.staging = needed, room, staging
        super().__init__(message)


class UnsupportedError(DeepEPMoEError, NotImplementedError):
    """This backend, device or package version does not offer the call. The message says what does."""
