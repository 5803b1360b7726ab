"""Which ranks of a group are missing, after an operation over it has failed.

torch.distributed says that something went wrong, not with whom. So every rank that gives up leaves a note in the
group's store and reads the others'. Ranks that waited for the same peer give up together, hence after a moment whoever
left no note did not come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Thread

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from deepep_moe.errors import DeepEPMoEError, PeerError, PeerTimeoutError, RankMismatchError

GRACE_SECONDS = 1.0  # for notes of ranks that fail at the same time
_STORE_SECONDS = 3.0  # for the store, whose host may be lost


@dataclass(frozen=True)
class Note:
    """What a rank writes when it gives up."""

    phase: str
    waited: float  # seconds
    timed_out: bool  # else the connection reported an error
    reason: str = ""  # why this rank broke off, if it did
    mismatch: bool = False  # whether that is a difference between ranks


def roll_call(
    group: dist.ProcessGroup, channel: str, mine: Note, *, grace_seconds: float = GRACE_SECONDS
) -> dict[int, Note]:
    """Write ``mine`` and return the notes of all ranks that have written one, by group rank. Bounded.

    Args:
        channel: groups have one connection per device type; this names it.
        grace_seconds: how long to wait for notes of ranks that fail at the same time; 0: not at all.
    """
    notes = {dist.get_rank(group): mine}

    def exchange_notes() -> None:
        store = _get_process_group_store(group)
        keys = _keys(group, channel)
        store.set(keys[dist.get_rank(group)], json.dumps(asdict(mine)))
        if grace_seconds:
            with suppress(Exception):  # some rank writes none
                store.wait(keys, timedelta(seconds=grace_seconds))
        for rank, key in enumerate(keys):
            if rank not in notes and store.check([key]):
                notes[rank] = Note(**json.loads(store.get(key)))

    def run() -> None:
        with suppress(Exception):  # without the store no rank can be named
            exchange_notes()

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(grace_seconds + _STORE_SECONDS)
    return dict(notes)


def anyone_gave_up(group: dist.ProcessGroup, channel: str) -> bool:
    """Whether any rank has written a note. May wait for the store."""
    store = _get_process_group_store(group)
    return any(store.check([key]) for key in _keys(group, channel))


def _keys(group: dist.ProcessGroup, channel: str) -> list[str]:
    return [f"deepep_moe/gave_up/{channel}/{rank}" for rank in range(dist.get_world_size(group))]


def explain(
    rank: int,
    world_size: int,
    names: Sequence[int] | None,
    timeout_seconds: float,
    notes: dict[int, Note],
    said: str,
) -> tuple[type[DeepEPMoEError], str]:
    """The kind of error and its text on ``rank``, from all notes and from what torch.distributed ``said`` here.

    ``names``: what users call the ranks, where the group is part of theirs.
    """
    ranks = range(world_size) if names is None else names
    notes, rank = {ranks[r]: note for r, note in notes.items()}, ranks[rank]
    mine = notes[rank]
    who = f"{mine.phase}: rank {rank} " + (f"of {world_size}" if names is None else f"among {_ranks(names)}")
    for note in notes.values():
        if note.mismatch:  # the text names all ranks concerned, and every rank raises the same
            return RankMismatchError, f"{note.phase}: {note.reason}"
    broke_off = {r: note for r, note in notes.items() if note.reason and r != rank}
    if broke_off:
        told = "; ".join(f"rank {r} broke off {note.phase}: {note.reason}" for r, note in broke_off.items())
        return PeerError, f"{who}: {told}"
    absent = [r for r in ranks if r not in notes]
    timed_out = any(note.timed_out for note in notes.values())
    if absent and timed_out:
        return PeerTimeoutError, f"{who}: no answer from {_ranks(absent)} within {timeout_seconds:g} s ({said})"
    if absent:
        return PeerError, f"{who}: {_ranks(absent)} may be gone, the connection closed ({said})"
    if not timed_out:
        return PeerError, f"{who}: the connections of its group broke ({said})"
    late = min(notes, key=lambda r: notes[r].waited)
    if late == rank:
        first = max(notes, key=lambda r: notes[r].waited)
        return PeerError, f"{who} came too late: rank {first} had given up after {notes[first].waited:.3g} s ({said})"
    return (
        PeerTimeoutError,
        f"{who}: no answer from rank {late} within {timeout_seconds:g} s; it came too late ({said})",
    )


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"
