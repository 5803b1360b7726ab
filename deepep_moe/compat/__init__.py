"""Makes ``import deep_ep`` resolve to this library, for programs written for DeepEP.

    import deepep_moe.compat
    deepep_moe.compat.install()
    from deep_ep import Buffer, Config, EventOverlap      # from deepep_moe, in this process

Without the call nothing changes, and no file is written.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from deepep_moe.errors import UnsupportedError

_NAME = "deep_ep"


def install(shadow: bool = False) -> ModuleType:
    """Make ``deep_ep`` and ``deep_ep.utils`` importable in this process. Idempotent.

    Args:
        shadow: replace DeepEP's own ``deep_ep`` if that is installed or already imported.

    Returns:
        The module ``deep_ep``.

    Raises:
        UnsupportedError: DeepEP's own ``deep_ep`` is installed and ``shadow`` is false.
    """
    import deepep_moe

    present = sys.modules.get(_NAME)
    if present is not None and getattr(present, "provided_by", None) == deepep_moe.__name__:
        return present
    if not shadow:
        spec = present.__spec__ if present is not None else importlib.util.find_spec(_NAME)
        if present is not None or spec is not None:
            place = getattr(spec, "origin", None) or "this process"
            raise UnsupportedError(
                f"{_NAME} is installed at {place}; uninstall it, or call deepep_moe.compat.install(shadow=True)"
            )

    module = _module(_NAME, {name: getattr(deepep_moe, name) for name in _NAMES}, is_package=True)
    utils = _module(f"{_NAME}.utils", {name: getattr(deepep_moe, name) for name in ("EventHandle", "EventOverlap")})
    vars(module).update(utils=utils, provided_by=deepep_moe.__name__)
    sys.modules[_NAME], sys.modules[utils.__name__] = module, utils
    return module


_NAMES = ("Buffer", "Config", "ElasticBuffer", "EPHandle", "EventHandle", "EventOverlap", "topk_idx_t")


def _module(name: str, content: dict[str, object], is_package: bool = False) -> ModuleType:
    module = ModuleType(name, "Served by deepep_moe.compat.")
    module.__spec__ = ModuleSpec(name, loader=None, is_package=is_package)
    if is_package:
        module.__path__ = []
    vars(module).update(content)
    return module
