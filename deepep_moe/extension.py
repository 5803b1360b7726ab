"""The CUDA extension ``deepep_moe._C``: dtype codes for its calls, or the reason why it cannot be used on a device."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

BUILT = importlib.util.find_spec("deepep_moe._C") is not None  # for this Python
try:
    from deepep_moe import _C as _C
except ImportError as error:
    _C = None  # type: ignore[assignment]  # callers check why_missing first
    why_missing: str | None = f"the CUDA extension cannot be loaded: {error}"
    if not BUILT:
        why_missing = (
            f"the CUDA extension is not built for this Python ({sys.version_info.major}.{sys.version_info.minor}); "
            "install with nvcc in PATH to build it"
        )
    ARCHITECTURES: tuple[str, ...] = ()
else:
    why_missing = None
    ARCHITECTURES = tuple(_C.ARCHITECTURES.split(";"))  # as in TORCH_CUDA_ARCH_LIST, such as "9.0" or "10.0+PTX"

_DTYPE_NAMES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
# The dtypes that kernels compute with, by the name that the extension has for them.
DTYPE_CODES = {dtype: None if _C is None else getattr(_C.DataType, name) for dtype, name in _DTYPE_NAMES.items()}
MAX_RANKS, MAX_LOW_LATENCY_RANKS = 32, 128  # of a group whose GPUs map each other's memory
VECTOR_BYTES = 16  # kernels move rows in units of this


@cache
def why_not_on(device: torch.device) -> str | None:
    """The reason why the extension's kernels cannot run on ``device``, or None. Cached."""
    if why_missing is not None:
        return why_missing
    if device.type != "cuda":
        return f"the CUDA extension needs a CUDA device, not {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if any(runs_on(architecture, (major, minor)) for architecture in ARCHITECTURES):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} ({device}) has compute capability {major}.{minor}, and the CUDA "
        f"extension was built for {', '.join(ARCHITECTURES)}: build it on this machine, or with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def module_for(module: Any, ranks: int) -> Any:
    """The part of an extension module that serves so many ranks: itself up to ``MAX_RANKS``, else its ``wide``."""
    return module if ranks <= MAX_RANKS else module.wide


def aligned(rows: Tensor) -> Tensor:
    """``rows`` as kernels read them: contiguous, starting at a multiple of 16 bytes (views may start anywhere)."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % VECTOR_BYTES == 0 else rows.clone()


def vector_padded(num_bytes: int) -> int:
    """``num_bytes`` rounded up to a multiple of 16: bytes from row to row."""
    return -(-num_bytes // VECTOR_BYTES) * VECTOR_BYTES


def address(tensor: Tensor | None) -> int:
    """The address of the tensor's data as the extension takes it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the current GPU records a CUDA graph; False on a CPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The current CUDA stream of ``device``, which has an index, as the extension takes it."""
    address: int = torch._C._cuda_getCurrentRawStream(device.index)  # without making an object of it
    return address


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code built for one entry of ``ARCHITECTURES`` runs on a GPU of this compute capability.

    Machine code runs within its major version, on its own minor version and later ones; PTX on everything later.
    ``a`` stands for one GPU and ``f`` for its family, also in PTX.
    """
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    assert match is not None, architecture
    built = (int(match[1]), int(match[2]))
    if match[3] == "a":
        return capability == built
    later = capability >= built
    return later and (capability[0] == built[0] or (match[4] is not None and not match[3]))
