"""Copies of models with the ``deepep`` dispatcher: ``copy.deepcopy`` copies weights and shares what belongs to ranks.

Megatron-Core's modules hold process groups, of which there is no copy, so that ``copy.deepcopy`` refuses them. A model
for an exponential moving average, or a frozen teacher, wants weights of its own on the same ranks: process groups,
dispatchers and CUDA streams are shared, everything else is copied. Parameters keep what Megatron-Core marks them with
(``allreduce``, ``tensor_model_parallel``, ...), which PyTorch's copies of parameters lose.

Only modules with the dispatcher inside are treated so; others stay as Megatron-Core has them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter

from deepep_moe.errors import UnsupportedError

_SHARED = (dist.ProcessGroup, torch.Stream, torch.Event)
_MARKS = (bool, int, float, str)


def attach(module_class: Any) -> None:
    """Teach ``MegatronModule`` to be copied, and to say why it cannot be pickled."""
    module_class.__deepcopy__ = _deepcopy
    module_class.__reduce_ex__ = _reduce_ex
    module_class.__copy__ = _copy  # PyTorch's, which would ask __reduce_ex__


def _copy(module: Any) -> Any:
    create, arguments, state = _parts(module)
    new = create(*arguments)
    new.__setstate__(state)
    return new


def _deepcopy(module: Any, memo: dict[int, Any]) -> Any:
    ours = _has_dispatcher(module)
    if ours:
        _refuse_wrapper(module)
        for shared in _shared(module):
            memo[id(shared)] = shared
    create, arguments, state = _parts(module)
    new = memo[id(module)] = create(*arguments)
    new.__setstate__(copy.deepcopy(state, memo))
    if ours:
        for original, parameter in zip(module.parameters(), new.parameters(), strict=True):
            _copy_marks(original, parameter)
    return new


def _reduce_ex(module: Any, protocol: Any) -> Any:
    if _has_dispatcher(module):
        raise UnsupportedError(
            f"{type(module).__name__} with moe_token_dispatcher_type = 'deepep' cannot be pickled: its dispatcher and "
            "process groups exist in running processes only; save its state_dict() or a sharded checkpoint"
        )
    return object.__reduce_ex__(module, protocol)


def _parts(module: Any) -> Any:
    """What makes an empty module of the same class, its arguments, and the module's state."""
    parts: Any = object.__reduce_ex__(module, 4)
    return parts[:3]


def _has_dispatcher(module: Module) -> bool:
    from deepep_moe.integrations.megatron.dispatcher import DeepEPTokenDispatcher

    return any(isinstance(getattr(m, "token_dispatcher", None), DeepEPTokenDispatcher) for m in module.modules())


def _refuse_wrapper(module: Module) -> None:
    from megatron.core.distributed.data_parallel_base import _BaseDataParallel

    if isinstance(module, _BaseDataParallel):
        raise UnsupportedError(
            f"{type(module).__name__} cannot be copied: its gradient buffers and hooks serve the original; "
            "copy the model inside of it (its attribute module)"
        )


def _shared(module: Module) -> list[Any]:
    """All process groups, because modules hold them in collections too, and the streams and events of the modules."""
    held = [value for m in module.modules() for value in vars(m).values() if isinstance(value, _SHARED)]
    return [*held, *dist.distributed_c10d._world.pg_map]


def _copy_marks(original: Parameter, parameter: Parameter) -> None:
    for name, value in vars(original).items():
        if isinstance(value, _MARKS):
            setattr(parameter, name, value)
