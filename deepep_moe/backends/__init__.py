"""The registry of backends: chooses the backend of a process group. No other module refers to backends by name."""

from __future__ import annotations

import logging
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from deepep_moe.backends.base import Backend, Backward, Destinations, Layout, Plan, Rows, Tokens, Wire
from deepep_moe.backends.collective import CollectiveBackend
from deepep_moe.backends.collective_cuda import make_collective
from deepep_moe.backends.exchange import gather, given_up
from deepep_moe.backends.headers import compare
from deepep_moe.backends.hierarchical import HierarchicalBackend
from deepep_moe.backends.nvlink import NVLinkBackend
from deepep_moe.config import DispatcherConfig
from deepep_moe.domain import SEVERAL_HOSTS
from deepep_moe.errors import InputError, PeerError, UnsupportedError
from deepep_moe.notices import warn_once

__all__ = [
    "BACKENDS",
    "Backend",
    "Backward",
    "Destinations",
    "Layout",
    "Plan",
    "Rows",
    "Tokens",
    "Wire",
    "default_device",
    "get_backend",
    "why_not",
]

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (NVLinkBackend, HierarchicalBackend, CollectiveBackend)
}
"""By name, in order of preference: ``auto`` takes the first that every rank can use. The last one runs anywhere."""

_log = logging.getLogger(__name__)
# Weak: dispatchers and Buffers keep a backend alive. A backend holds its group, so the group's id is not reused.
_backends: WeakValueDictionary[tuple[int, torch.device, DispatcherConfig], Backend] = WeakValueDictionary()


def get_backend(
    group: dist.ProcessGroup | None, device: torch.device | None = None, config: DispatcherConfig | None = None
) -> Backend:
    """The backend of ``group`` on ``device``. Calls with an equal ``config`` share one, while it is usable.

    Args:
        group: the expert-parallel group; None for the default group. On a GPU the call is collective.
        device: where tensors live; None for :func:`default_device`.
        config: None for the defaults. With ``backend="auto"`` the first of :data:`BACKENDS` that every rank of the
            group can use is chosen, and the log says why the ones before it were not.

    Raises:
        InputError: no process group, or this process is not in it.
        UnsupportedError: ``config.backend`` names a backend that cannot run here; the message gives the reason.
        PeerError: an operation over the group has failed before.
        RankMismatchError: ranks differ in settings that must be equal (:meth:`DispatcherConfig.shared`); on a CPU the
            first plan raises it.
    """
    config = config or DispatcherConfig()
    if not dist.is_initialized():
        raise InputError("group", group, "torch.distributed is not initialised: call init_process_group first")
    chosen = group if group is not None else dist.group.WORLD
    if not isinstance(chosen, dist.ProcessGroup):
        raise InputError("group", group, "must be a torch.distributed process group that this process belongs to")
    device = _with_index(device) if device is not None else default_device(chosen)
    failed = given_up(chosen, device)
    if failed is not None:
        raise PeerError(f"the group was given up after an earlier error. Make a new group. ({failed})")
    key = (id(chosen), device, config)
    backend = _backends.get(key)
    found = backend is not None and backend.usable
    if device.type == "cuda" or config.backend == HierarchicalBackend.name:
        # Garbage collection and failures differ per rank, so ranks agree before reusing a cached backend.
        found = _agree(chosen, device, config, found)
    if backend is None or not found:
        backend = _backends[key] = _make(chosen, device, config)
    return backend


def default_device(group: dist.ProcessGroup) -> torch.device:
    """The current CUDA device when the group can use it, else the CPU."""
    on_gpu = torch.cuda.is_available() and "nccl" in dist.get_backend_config(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def why_not(
    name: str, group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig | None = None
) -> str | None:
    """Why the group cannot use the backend ``name``: the reasons of all ranks that cannot, or None if all can.

    The result is equal on all ranks. Collective if ``device`` is a GPU.
    """
    config = config or DispatcherConfig()
    reason = BACKENDS[name].supports(group, device, config)
    if device.type != "cuda":
        return reason
    told: dict[str, list[str]] = {}
    for rank, one in enumerate(gather("set-up", group, device, config.timeout_seconds, reason)):
        if one:
            told.setdefault(one, []).append(str(rank))
    return "; ".join(f"rank {', '.join(ranks)}: {one}" for one, ranks in told.items()) or None


def _make(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig) -> Backend:
    auto = config.backend == "auto"
    refused: dict[str, str] = {}
    fixable: dict[str, str] = {}  # reasons that a user may be able to remove
    for name in BACKENDS if auto else (config.backend,):
        skipped = BACKENDS[name].why_not_auto(group, device, config) if auto else None
        reason = skipped or why_not(name, group, device, config)
        if reason is None:
            why = "".join(f": {reason}" for reason in refused.values())
            _log.info("deepep_moe: backend %s on %s, %d ranks%s", name, device, dist.get_world_size(group), why)
            if fixable and device.type == "cuda":
                _warn_slower(name, dist.get_world_size(group), fixable)
            _warn_ignored(name, config)
            make = make_collective if name == CollectiveBackend.name else BACKENDS[name]
            return make(group, device, config)
        refused[name] = reason
        if skipped is None and SEVERAL_HOSTS not in reason:
            fixable[name] = reason
    told = "; ".join(f"backend {name} cannot run here: {reason}" for name, reason in refused.items())
    raise UnsupportedError(f"{told}; backend {list(BACKENDS)[-1]} runs anywhere")


def _warn_slower(name: str, ranks: int, fixable: dict[str, str]) -> None:
    """Warn once per job that a group gets a slower backend than its GPUs allow, with the reason."""
    told = "; ".join(f"{better} cannot run here: {reason}" for better, reason in fixable.items())
    text = f"{ranks} ranks use backend {name}, which is slower than these GPUs allow, because {told}"
    warn_once(f"{text} (docs/multinode.md; DEEPEP_MOE_BACKEND={name} accepts it)")


def _warn_ignored(name: str, config: DispatcherConfig) -> None:
    """Warn once per job of settings that the chosen backend does not read."""
    default = DispatcherConfig()
    for setting in BACKENDS[name].ignores:
        value = getattr(config, setting)
        if value != getattr(default, setting):
            warn_once(f"{setting} = {value} has no effect: backend {name} does not use it")
    if config.replay_on_overflow and config.capacity_factor == 0:
        warn_once("replay_on_overflow has no effect: capacity_factor is 0, so nothing overflows")


def _agree(group: dist.ProcessGroup, device: torch.device, config: DispatcherConfig, found: bool) -> bool:
    """Whether all ranks found a cached backend. Raises RankMismatchError if their settings differ."""
    settings = {"backend": config.backend, "rail": config.rail, **config.shared()}
    answers = gather("set-up", group, device, config.timeout_seconds, [found, settings])
    compare({name: [str(others[name]) for _, others in answers] for name in settings})
    return all(one_found for one_found, _ in answers)


def _with_index(device: torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
