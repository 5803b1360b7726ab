"""Forwards that overflow ``capacity_factor`` run again, in Megatron-Core: what its forward changes is put back first.

Where the setting ``replay_on_overflow`` is on, Megatron-Core's ``DistributedDataParallel`` calls :func:`attach` for the
model chunk that it wraps. A program without it calls :func:`replay_on_overflow`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepep_moe import overflow


def replay_on_overflow(model: nn.Module) -> overflow.Replay:
    """:func:`deepep_moe.overflow.replay_on_overflow` for a model chunk, over the ranks of its pipeline stage.

    A replay starts with the states of Megatron's random number generators, and counts for its logs once. The schedules
    that run layers of two micro-batches beside each other (``overlap_moe_expert_parallel_comm``) do not call the
    model's forward, so they are not covered: there an overflow is a :class:`~deepep_moe.errors.CapacityError`.
    """
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return overflow.replay_on_overflow(model, group=group, save_state=_save_state)


def attach(model: nn.Module) -> None:
    """:func:`replay_on_overflow` if a dispatcher in ``model`` has it in its settings."""
    if overflow.replay_of(model) is None and any(
        dispatcher.config.replay_on_overflow and dispatcher.config.capacity_factor > 0
        for dispatcher in overflow.dispatchers_in(model)
    ):
        replay_on_overflow(model)


def _save_state() -> Callable[[], None]:
    tracker = importlib.import_module("megatron.core.tensor_parallel.random").get_cuda_rng_tracker()
    states = {
        name: state.get_state() if isinstance(state, torch.Generator) else state
        for name, state in tracker.get_states().items()
    }
    logged = {name: values.clone() for name, values in _logged().items()}

    def restore() -> None:
        now = tracker.get_states()
        for name, state in states.items():
            if isinstance(now[name], torch.Generator):
                now[name].set_state(state)
            else:
                now[name] = state
        tracker.set_states(now)
        for name, values in _logged().items():
            values.copy_(logged[name]) if name in logged else values.zero_()

    return restore


def _logged() -> dict[str, Tensor]:
    """Losses that forwards add up for Megatron-Core's logs, by name: auxiliary ones, and of multi-token prediction."""
    prediction: Any = importlib.import_module("megatron.core.transformer.multi_token_prediction")
    tracker = prediction.MTPLossLoggingHelper.tracker
    found = {f"prediction {name}": value for name, value in tracker.items() if isinstance(value, Tensor)}
    utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if hasattr(utils, "get_moe_metrics_tracker"):  # 0.19
        return found | {name: entry.values for name, entry in utils.get_moe_metrics_tracker().metrics.items()}
    return found | {name: entry["values"] for name, entry in utils.get_moe_layer_wise_logging_tracker().items()}
