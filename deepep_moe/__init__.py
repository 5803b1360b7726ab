"""Expert-parallel communication for mixture-of-experts training: tokens to their experts and back.

* :mod:`deepep_moe.nn`: an MoE layer for plain PyTorch, also under DDP and FSDP2.
* :class:`TokenDispatcher`: expert-grouped rows, differentiable; what framework integrations use.
* :func:`scale_rows`: rows times routing weights, for experts that scale their own output.
* :class:`DispatcherConfig`: every setting, from arguments, YAML or ``DEEPEP_MOE_*`` variables.
* :class:`Buffer`, :class:`Config`, :class:`EventHandle`, :class:`EventOverlap`: the DeepEP 1.x interface.
* :class:`ElasticBuffer`, :class:`EPHandle`: the part of the DeepEP 2.x interface that trainers use.

Names and submodules are imported on first use, so that ``python -m deepep_moe --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepep_moe.buffer import Buffer, topk_idx_t
    from deepep_moe.config import Config, DispatcherConfig
    from deepep_moe.dispatcher import Dispatched, TokenDispatcher
    from deepep_moe.elastic import ElasticBuffer, EPHandle
    from deepep_moe.events import EventHandle, EventOverlap
    from deepep_moe.row_scaling import scale_rows

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here
__all__ = [
    "Buffer",
    "Config",
    "Dispatched",
    "DispatcherConfig",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "TokenDispatcher",
    "scale_rows",
    "topk_idx_t",
]

_MODULES = {
    "Buffer": "buffer",
    "topk_idx_t": "buffer",
    "Config": "config",
    "DispatcherConfig": "config",
    "Dispatched": "dispatcher",
    "TokenDispatcher": "dispatcher",
    "ElasticBuffer": "elastic",
    "EPHandle": "elastic",
    "EventHandle": "events",
    "EventOverlap": "events",
    "scale_rows": "row_scaling",
}
"""The module of every public name; the same as the imports above, which type checkers read."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # found there the next time
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")  # deepep_moe.errors after `import deepep_moe`
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
