"""Codes that ranks of the nvlink backend compare in every dispatch and combine, and their description in errors.

Kernels compare the codes (``Operation`` in csrc/throughput/args.h). The descriptions are for the error if they differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_moe.backends.base import Backward, Wire
from deepep_moe.backends.checks import SENT_DTYPES
from deepep_moe.extension import _C

_WIRES = tuple(Wire)
_DTYPE_INDEX = {dtype: index for index, dtype in enumerate(SENT_DTYPES)}
_WIRE_SHIFT, _SCALES_SHIFT, _BACKWARD_SHIFT, _NUM_SCALES_SHIFT = 4, 6, 8, 10


def format_code(dtype: torch.dtype, wire: Wire, scales: Tensor | None, num_scales: int, backward: Backward) -> int:
    """One integer for everything about the rows of a call that must be equal on all ranks."""
    kind = 0 if scales is None else 1 if scales.dtype.is_floating_point else 2
    return (
        _DTYPE_INDEX[dtype]
        | _WIRES.index(wire) << _WIRE_SHIFT
        | kind << _SCALES_SHIFT
        | int(backward) << _BACKWARD_SHIFT
        | num_scales << _NUM_SCALES_SHIFT
    )


def describe_format(code: int) -> str:
    """The result of :func:`format_code` in words."""
    two_bits = 3
    words = [str(SENT_DTYPES[code & 15]), f"sent {_WIRES[code >> _WIRE_SHIFT & two_bits].value}"]
    kind = code >> _SCALES_SHIFT & two_bits
    if kind:
        words.append(f"{code >> _NUM_SCALES_SHIFT} {'fp32' if kind == 1 else 'int32'} scales per row")
    backward = Backward(code >> _BACKWARD_SHIFT & two_bits)
    words.append(f"gradients wanted: {backward.name.lower().replace('_', ' ')}")
    return ", ".join(words)


def describe_operation(code: int) -> str:
    """``Operation::kind`` in words."""
    kind = _C.OperationKind(code & 0xFF).name
    if kind == "GROW":
        return "a call whose rows need more staging memory"
    if kind in ("PLAN", "REFUSE"):
        return "plan" if kind == "PLAN" else "a refused call"
    layout = "by expert" if code & _C.OPERATION_BY_EXPERT else "by source"
    return f"{kind.lower()} {layout}{' with weights' if code & _C.OPERATION_WITH_WEIGHTS else ''}"
