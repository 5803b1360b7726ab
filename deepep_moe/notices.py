"""Warnings that appear once per job, and names for profilers."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

_log = logging.getLogger("deepep_moe")
_warned: set[str] = set()
_nothing: AbstractContextManager[None] = nullcontext()


def warn_once(text: str) -> None:
    """Log ``text`` as a WARNING on rank 0, the first time that this process is asked to."""
    if dist.get_rank() == 0 and text not in _warned:
        _warned.add(text)
        _log.warning("deepep_moe: %s", text)


def span(name: str) -> AbstractContextManager[object]:
    """A range called ``name`` in torch.profiler's timeline; an NVTX range under ``torch.autograd.profiler.emit_nvtx``.

    Costs less than a microsecond where no profiler runs.
    """
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _nothing
