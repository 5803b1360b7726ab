"""Calls under torch.compile: whether they must go through registered operators, and those that it must not trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, or under torch.compile one that calls it without being traced, after the end of a graph."""
    if not torch.compiler.is_compiling():
        return function
    from deepep_moe.uncompiled import run

    return partial(run, function)


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: torch.compile does not trace into ``function``."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return uncompiled(function)(*args, **kwargs)

    return call


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` is used under torch.compile or a dispatch mode, or is a tensor subclass (FakeTensor included)."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, Parameter)
