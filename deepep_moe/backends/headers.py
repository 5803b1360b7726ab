"""What ranks compare before a call, and the errors where they differ.

Each rank sends a *header* of integers: whether it refuses the call, which call it is in, how many plans it has made,
and the facts that must be equal on all ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import TypeAlias, get_args

import torch
from torch import Tensor

from deepep_moe.backends.base import Phase
from deepep_moe.errors import CapacityError, DeepEPMoEError, PeerError, RankMismatchError

Fact: TypeAlias = int | float | torch.dtype | Enum
SETUP = "set-up"
"""The phase in which backends are made."""
_PHASES: tuple[str, ...] = (*get_args(Phase), SETUP)
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_MAX_FACTS = 16
HEADER_WORDS = 3 + _MAX_FACTS  # whether the rank refuses, its phase, its plans, facts
_UNUSED = -(2**62)


def header(phase: str, facts: Mapping[str, Fact], plans: int, refused: bool) -> list[int]:
    """The header of one rank; ``plans``: made so far."""
    assert len(facts) <= _MAX_FACTS
    unused = [_UNUSED] * (_MAX_FACTS - len(facts))
    return [int(refused), _PHASES.index(phase), plans, *map(_encode, facts.values()), *unused]


def agree(headers: Sequence[Sequence[int]]) -> bool:
    """Whether the headers of all ranks are equal."""
    return all(header == headers[0] for header in headers)


def compare_facts(facts: Mapping[str, Fact], headers: Tensor) -> None:
    """Raise :class:`RankMismatchError` for the first difference in ``headers``; ``facts`` are those of this rank."""
    compare({"call": [_PHASES[i] for i in headers[:, 1].tolist()]})
    columns = headers[:, 3:HEADER_WORDS].t().tolist()
    compare({_COMPARED: [str(_MAX_FACTS - codes.count(_UNUSED)) for codes in zip(*columns)]})
    compare({name: [_decode(code, like) for code in codes] for (name, like), codes in zip(facts.items(), columns)})


def compare(facts: Mapping[str, Sequence[str]]) -> None:
    """Raise :class:`RankMismatchError` for the first of ``facts``, each rank's value by name, that differs."""
    for name, values in facts.items():
        if len(set(values)) > 1:
            holders: dict[str, list[str]] = {}
            for rank, value in enumerate(values):
                holders.setdefault(value, []).append(str(rank))
            told = "; ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in holders.items())
            hint = f" ({_HINTS[name]})" if name in _HINTS else ""
            raise RankMismatchError(f"{name} differs between the ranks of the group: {told}{hint}")


def reason_of(error: Exception) -> tuple[str, int, int]:
    """The text of ``error``, and ``needed`` and ``room`` of a :class:`CapacityError` (else 0), for other ranks."""
    needed, room = (error.needed, error.room) if isinstance(error, CapacityError) else (0, 0)
    return str(error) or type(error).__name__, needed, room


def refused_by(reasons: Mapping[int, tuple[str, int, int]], phase: str) -> DeepEPMoEError:
    """The error of a rank whose peers refuse ``phase``. ``reasons``: by rank, see :func:`reason_of`."""
    told = "; ".join(f"rank {rank}: {message}" for rank, (message, *_) in reasons.items())
    text = f"{phase} was refused by another rank of the group: {told}"
    if not all(needed for _, needed, _ in reasons.values()):
        return PeerError(text)
    _, needed, room = max(reasons.values(), key=lambda reason: reason[1] / max(reason[2], 1))
    return CapacityError(text, needed=needed, room=room)


_COMPARED = "number of values compared"
_HINTS = {
    _COMPARED: "ranks are in calls of different backends or engines over this group",
    "plan": "plans are counted as they are made: ranks call in another order, or one leaves a result unused",
    "backward": "what requires gradients must be the same on all ranks",
}


@lru_cache(maxsize=4096, typed=True)
def _encode(value: Fact) -> int:
    if isinstance(value, torch.dtype):
        return _DTYPES.index(value)
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return list(type(value)).index(value) if isinstance(value, Enum) else int(value)


def _decode(code: int, like: Fact) -> str:
    """The text of a number from :func:`_encode`; ``like`` is this rank's value of the same fact."""
    if code == _UNUSED:
        return "nothing"
    if isinstance(like, torch.dtype):
        return str(_DTYPES[code])
    if isinstance(like, float):
        return str(struct.unpack("<d", struct.pack("<q", code))[0])
    if isinstance(like, Enum):
        return list(type(like))[code].name.lower().replace("_", " ")
    return str(bool(code)) if isinstance(like, bool) else str(code)
