"""Which call every rank of a group is in, told through the group's store.

A kernel that waits for peers cannot say what they do instead. So a rank whose call takes long writes its number and
header (headers.py) to the store, and reads those of the others. A rank that refuses its input writes that at once.
"""

from __future__ import annotations

import json

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store


class Inquiry:
    """The calls of a group's ranks, by their number: calls so far, over any backend of the group.

    Args:
        channel: groups have one connection per device type; this names it.
    """

    def __init__(self, group: dist.ProcessGroup, channel: str) -> None:
        self._store, self._channel = _get_process_group_store(group), f"deepep_moe/{channel}"
        self._rank, self._ranks = dist.get_rank(group), range(dist.get_world_size(group))

    def write(self, number: int, header: list[int]) -> None:
        """Tell that this rank is in call ``number``. May wait for the store, like all methods."""
        self._store.set(f"{self._channel}/in_call/{self._rank}", json.dumps([number, *header]))

    def refuse(self, number: int) -> None:
        """Tell that this rank refuses its input to call ``number``."""
        self._store.set(self._refusal(number, self._rank), "")

    def refusing(self, number: int) -> set[int]:
        """The ranks that refuse call ``number``."""
        return {rank for rank in self._ranks if self._store.check([self._refusal(number, rank)])}

    def headers(self, number: int) -> dict[int, list[int]]:
        """By rank, the headers of those that are in call ``number``."""
        keys = {rank: f"{self._channel}/in_call/{rank}" for rank in self._ranks}
        told = {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}
        return {rank: header for rank, (its_number, *header) in told.items() if its_number == number}

    def _refusal(self, number: int, rank: int) -> str:
        return f"{self._channel}/refused/{number}/{rank}"
