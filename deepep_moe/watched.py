"""When a call must not bypass PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def watched(x: Tensor) -> bool:
    """Whether something has to see operators: torch.compile, FakeTensor, a dispatch mode, a tensor subclass."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in (Tensor, Parameter)
