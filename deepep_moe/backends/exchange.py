"""Calls to torch.distributed that are bounded, name their phase, and let every rank learn of one rank's mistake.

Two things can leave a group hanging: a peer that died, and a peer that raised an exception and never joined the
call. The first ends here as :class:`~deepep_moe.errors.PeerError` after ``timeout_seconds``. The second cannot
happen to callers of :meth:`Exchange.agree`: a rank with bad input joins that exchange too, marked, and every rank
raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from typing import TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_moe.backends.base import Phase
from deepep_moe.errors import DeepEPMoEError, PeerError, PeerTimeoutError, RankMismatchError

Fact: TypeAlias = int | torch.dtype | Enum
_PHASES: tuple[Phase, ...] = get_args(Phase)
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.uint8,
    torch.float8_e8m0fnu,
)
_MAX_FACTS = 10
_UNUSED = -(2**62)


class Exchange:
    """Bounded collectives over one group, for tensors on ``device``."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_seconds: float) -> None:
        self.group, self.device, self.timeout_seconds = group, device, timeout_seconds
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def all_to_all(self, phase: Phase, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Send ``send_counts[r]`` consecutive ``rows`` to each rank r, receive ``recv_counts[r]`` from it.

        Returns rows in rank order. Any dtype travels: gloo lacks some, so bytes are what it sees.
        """
        out = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
        if self.world_size == 1:
            return out.copy_(rows)
        with self._named(phase):
            work = dist.all_to_all_single(
                as_bytes(out),
                as_bytes(rows),
                list(recv_counts),
                list(send_counts),
                group=self.group,
                async_op=True,
            )
            if self.device.type == "cpu":
                work.wait(timedelta(seconds=self.timeout_seconds))
            else:
                work.wait()  # orders the stream; a bounded wait here would block the host
        return out

    def agree(
        self,
        phase: Phase,
        facts: Mapping[str, Fact],
        problem: DeepEPMoEError | None = None,
        private: Sequence[int] = (),
    ) -> Tensor:
        """Compare ``facts`` on all ranks and share ``private`` (at most R numbers, zero-filled).

        Args:
            facts: what ranks must share, by the name a user knows it by.
            problem: this rank's reason not to continue. It is raised here after the others have learned of it.

        Returns:
            [R, R] int64 on the CPU: row r is what rank r gave as ``private``.

        Raises:
            RankMismatchError: on every rank, when facts differ or ranks are in different calls.
            PeerError: when another rank has a problem; its message is repeated.
        """
        if self.world_size == 1:
            if problem is not None:
                raise problem
            return torch.tensor([list(private) or [0]], dtype=torch.int64)

        mine = [int(problem is not None), _PHASES.index(phase)]
        mine += [_encode(value) for value in facts.values()]
        mine += [_UNUSED] * (2 + _MAX_FACTS - len(mine))
        mine += list(private) + [0] * (self.world_size - len(private))
        header = torch.tensor([mine], dtype=torch.int64).to(self.device).expand(self.world_size, -1).contiguous()
        ones = [1] * self.world_size
        headers = self.all_to_all(phase, header, ones, ones).cpu()

        if headers[:, 0].any():
            self._raise_problem(phase, problem, headers)
        self._compare("call", [_PHASES[i] for i in headers[:, 1].tolist()])
        for column, name in enumerate(facts, start=2):
            self._compare(name, [_decode(value, facts[name]) for value in headers[:, column].tolist()])
        return headers[:, 2 + _MAX_FACTS :]

    def _raise_problem(self, phase: Phase, problem: DeepEPMoEError | None, headers: Tensor) -> None:
        """Some rank cannot continue. All ranks know it, so all can afford a second exchange for the reason."""
        reasons: list[str | None] = [None] * self.world_size
        with self._named(phase):
            dist.all_gather_object(reasons, None if problem is None else str(problem), group=self.group)
        if problem is not None:
            raise problem
        told = "; ".join(f"rank {r}: {reason}" for r, reason in enumerate(reasons) if reason is not None)
        raise PeerError(f"{phase} was refused by another rank of the group: {told}")

    def _compare(self, name: str, values: list[str]) -> None:
        if len(set(values)) == 1:
            return
        holders: dict[str, list[str]] = {}
        for rank, value in enumerate(values):
            holders.setdefault(value, []).append(str(rank))
        told = "; ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in holders.items())
        raise RankMismatchError(f"{name} differs between the ranks of the group: {told}")

    @contextmanager
    def _named(self, phase: Phase) -> Iterator[None]:
        try:
            yield
        except DeepEPMoEError:
            raise
        except RuntimeError as error:
            waited = "timed out" in str(error).lower()
            kind = PeerTimeoutError if waited else PeerError
            limit = f"{self.timeout_seconds:g} s, or the group's own timeout if shorter"
            what = f"no answer from its group within {limit}" if waited else "its group is broken, a peer may be gone"
            raise kind(
                f"{phase}: rank {self.rank} of {self.world_size}: {what} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error


def _encode(value: Fact) -> int:
    if isinstance(value, torch.dtype):
        return _DTYPES.index(value)
    return list(type(value)).index(value) if isinstance(value, Enum) else int(value)


def _decode(code: int, like: Fact) -> str:
    """What :func:`_encode` made a number of, in words; ``like`` is another rank's value of the same fact."""
    if code == _UNUSED:
        return "nothing"
    if isinstance(like, torch.dtype):
        return str(_DTYPES[code])
    if isinstance(like, Enum):
        return list(type(like))[code].name.lower().replace("_", " ")
    return str(bool(code)) if isinstance(like, bool) else str(code)


def as_bytes(rows: Tensor) -> Tensor:
    """``[n, width]`` of any dtype and strides -> ``[n, width in bytes]`` uint8, dense."""
    rows = rows.detach().contiguous()
    # contiguous() leaves any strides on tensors of no or one row, and view(dtype) is strict about them
    return rows.as_strided(rows.shape, torch.empty(rows.shape, device="meta").stride()).view(torch.uint8)
