"""Choose the backend of a process group: :func:`get_backend` is the only place that knows backends by name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from deepep_moe.backends.base import Backend, Layout, Plan, Rows, Tokens
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from deepep_moe.backends.nvlink import NVLinkBackend

__all__ = ["Backend", "Layout", "Plan", "Rows", "Tokens", "default_device", "get_backend"]

_log = logging.getLogger(__name__)
# Weak: dispatchers and Buffers keep a backend alive. A backend holds its group, so the id stays the group's own. When
# the garbage collector ends one differs between ranks: they agree before they use one that is found here.
_backends: WeakValueDictionary[tuple[int, torch.device, DispatcherConfig], Backend] = WeakValueDictionary()


def get_backend(
    group: dist.ProcessGroup | None, device: torch.device | None = None, config: DispatcherConfig | None = None
) -> Backend:
    """The backend of ``group`` on ``device``, shared by everyone who asks with the same ``config``.

    ``config.backend == "auto"`` takes ``nvlink`` when every rank of the group can use it and ``collective``
    otherwise, with one log line saying why. Collective on a GPU: all ranks of the group make the call.

    Raises:
        InputError: no process group, or this process is not in it.
        UnsupportedError: ``config.backend`` names a backend that cannot run here; the message says why.
    """
    config = config or DispatcherConfig()
    if not dist.is_initialized():
        raise InputError("group", group, "torch.distributed is not initialised: call init_process_group first")
    chosen = group if group is not None else dist.group.WORLD
    if not isinstance(chosen, dist.ProcessGroup):
        raise InputError("group", group, "must be a torch.distributed process group that this process belongs to")
    device = _with_index(device) if device is not None else default_device(chosen)
    key = (id(chosen), device, config)
    backend = _backends.get(key)
    found = backend is not None
    if device.type == "cuda" and config.backend != "collective":  # else a backend is made without the other ranks
        found = _all_found_one(chosen, found)
    if backend is None or not found:
        backend = _backends[key] = _make(chosen, device, config)
    return backend


def default_device(group: dist.ProcessGroup) -> torch.device:
    """The current CUDA device when the group can use it, else the CPU."""
    on_gpu = torch.cuda.is_available() and "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _with_index(device: torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _make(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> Backend:
    if config.backend == "collective":
        return CollectiveBackend(group, device, config)
    reason, nvlink = _why_not_nvlink(group, device)
    if nvlink is not None and reason is None:
        _log.info("deepep_moe: backend nvlink on %s, %d ranks", device, dist.get_world_size(group))
        return nvlink(group, device, config)
    if config.backend == "nvlink":
        raise UnsupportedError(f"backend nvlink cannot run here: {reason}; backend collective runs anywhere")
    _log.info("deepep_moe: backend collective on %s, %d ranks: %s", device, dist.get_world_size(group), reason)
    return CollectiveBackend(group, device, config)


def _all_found_one(group: dist.ProcessGroup, found: bool) -> bool:
    answers = [False] * dist.get_world_size(group)
    dist.all_gather_object(answers, found, group=group)
    return all(answers)


def _why_not_nvlink(group: dist.ProcessGroup, device: torch.device) -> tuple[str | None, type[NVLinkBackend] | None]:
    """The reason some rank of the group cannot use nvlink, the same on all ranks."""
    if device.type != "cuda":
        return f"nvlink needs CUDA tensors, the device is {device}", None
    from deepep_moe.backends.nvlink import NVLinkBackend

    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, NVLinkBackend.why_not(group, device), group=group)
    told = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    return ("; ".join(told) or None), NVLinkBackend
