"""Whether a call must go through registered operators instead of calling a backend or a kernel directly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` is used under torch.compile or a dispatch mode, or is a tensor subclass (FakeTensor included)."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, Parameter)
