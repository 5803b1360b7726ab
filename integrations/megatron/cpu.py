"""Run Megatron-Core on a machine without a GPU: for tests, recipes and debugging, not for speed.

    from deepep_moe.integrations.megatron import cpu
    cpu.enable()                                  # before building a model; does nothing where CUDA is available
    config = TransformerConfig(..., **cpu.CONFIG)  # fused paths need CUDA: CONFIG switches them off

Megatron-Core runs on CPU tensors and gloo except for a few places that name ``torch.cuda``: the current device,
streams and events, and the random-number states. :func:`enable` gives these a CPU meaning. On a CPU one
generator plays both the "CPU" and the "CUDA" part, so parameter initialisation, dropout and recomputation behave
as on GPUs: seeds per tensor- and expert-parallel rank included.

Still GPU only: Megatron's distributed optimizer and bf16 optimizer, CUDA graphs, TransformerEngine.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}
"""``TransformerConfig`` arguments that a CPU needs: every kernel fusion off."""

_enabled = False


class Stream:
    """Stands in for ``torch.cuda.Stream``: CPU work is done when its call returns, so there is no order to keep."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Event:
        return event or Event()


class Event:
    """Stands in for ``torch.cuda.Event``: always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def enable() -> bool:
    """Make Megatron-Core usable without a GPU. Returns False, and changes nothing, where CUDA is available.

    Changes ``torch.cuda`` and Megatron-Core for the whole process; calling it again is harmless.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _enabled = True
        _patch_torch()
        _patch_megatron()
    return True


def _patch_torch() -> None:
    default_stream = Stream()
    replacements = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: default_stream,
        "default_stream": lambda device=None: default_stream,
        "stream": _on_stream,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    nvtx: Any = torch.cuda.nvtx
    nvtx.range_push = nvtx.range_pop = lambda *args: None
    tensor: Any = Tensor
    tensor.record_stream = lambda self, stream: None


def _patch_megatron() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # With one generator for both parts this warning of the RNG tracker describes what is meant to happen.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 defines the name only when TransformerEngine is installed

    token_dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts split sizes to numpy only on their way from a GPU; all_to_all_single wants integers.
        if as_numpy and isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move
