"""Runs a function outside of torch.compile. Imported only under it, because this loads the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@torch.compiler.disable
def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``function``; the compiled graph ends before it."""
    return function(*args, **kwargs)
