"""The CUDA extension ``deepep_moe._C``, where it was built: what it is called with, or why it is not there."""

from __future__ import annotations

import torch

try:
    from deepep_moe import _C as _C
except ImportError as error:  # not built, or for another Python
    _C = None  # type: ignore[assignment]  # whoever imports it asks why_missing first
    why_missing: str | None = f"the CUDA extension is not there ({error}); install with nvcc in PATH to build it"
else:
    why_missing = None

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DataType of csrc/kernels/args.h
VECTOR_BYTES = 16  # kernels move rows in units of this
