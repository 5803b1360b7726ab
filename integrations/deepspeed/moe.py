"""DeepSpeed's native MoE layer on a :class:`~deepep_moe.TokenDispatcher`.

:func:`convert` changes the class of every ``MOELayer`` in a model to one with another ``forward``. All else stays: the
modules, so state-dict keys and parameter tags; the gate; ``MoE`` around it with its residual branch and the tuple it
returns. :class:`MoE` is DeepSpeed's, converted when it is made. Two things differ inside:

* Rows arrive grouped by expert and as many as there are. The stock layer pads every expert to one capacity.
* With ``drop_tokens=False`` nothing is agreed on beforehand (see :mod:`routing`); with capacity the stock gate decides.

Under tensor parallelism all ranks of the tensor-parallel group hold the same tokens. Each dispatches its share, and the
shares are gathered afterwards. If the experts are tensor-parallel too, each dispatches all tokens in its own
expert-parallel group instead: the slices of an expert then see the same rows, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import FIRST_ALLTOALL_TIMER, MOE_TIMER, SECOND_ALLTOALL_TIMER, TOPK_GATE_TIMER, MOELayer
from torch import Tensor, nn

from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.errors import InputError, UnsupportedError
from deepep_moe.integrations.deepspeed import tensor_parallel
from deepep_moe.integrations.deepspeed.experts import LocalExperts
from deepep_moe.integrations.deepspeed.routing import Load, dropless_routes, load
from deepep_moe.overlap import Overlap

Model = TypeVar("Model", bound=nn.Module)


class MoE(StockMoE):  # type: ignore[misc]
    """``deepspeed.moe.layer.MoE`` that dispatches with this library: the same arguments, state-dict keys and results.

    For models where an import is easier to change than ds_config. The block ``deepep_moe`` is not needed; where
    ds_config has it, it gives the settings of layers that were made without ``deepep_moe``.

    Args:
        *args, **kwargs: DeepSpeed's.
        deepep_moe: settings of this layer, as for :func:`convert`.

    Raises:
        ConfigError, UnsupportedError: as :func:`convert`.
    """

    def __init__(
        self, *args: Any, deepep_moe: DispatcherConfig | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        convert(self, deepep_moe)
        self.deepspeed_moe.has_own_settings = deepep_moe is not None


def convert(model: Model, config: DispatcherConfig | Mapping[str, Any] | None = None) -> Model:
    """Let every ``deepspeed.moe.layer.MoE`` in ``model`` dispatch with this library. In place; returns the model.

    Call it on all ranks, before or after ``deepspeed.initialize``. Converting again changes the settings.

    Args:
        config: settings, or some by name as in ds_config (``{"num_sms": 24}``); YAML file and environment override
            those given by name.

    Raises:
        InputError: the model has no such layer.
        ConfigError: an unknown setting or an impossible value.
        UnsupportedError: ZeRO-3 has partitioned the parameters, or the configured backend cannot run here.
    """
    settings = config if isinstance(config, DispatcherConfig) else DispatcherConfig.load(config)
    layers = native_layers(model)
    if not layers:
        raise InputError("model", type(model).__name__, "has no deepspeed.moe.layer.MoE to convert")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedError(
            "DeepSpeed's native MoE does not work with ZeRO-3, with or without deepep_moe: set "
            "zero_optimization.stage to 0, 1 or 2, or use AutoEP (expert_parallel), which supports ZeRO-3"
        )
    for layer in layers:
        convert_layer(layer, settings)
    return model


def convert_layer(layer: Any, settings: DispatcherConfig) -> None:
    """:func:`convert` for one ``MOELayer``."""
    layer.__class__ = DispatchedMOELayer
    layer.settings = settings
    layer.local_experts = LocalExperts(layer.experts.deepspeed_experts)
    if layer.ep_group is not None:
        layer.connect()


def native_layers(model: nn.Module) -> list[Any]:
    """The ``MOELayer`` of each native MoE layer in ``model``."""
    return [module.deepspeed_moe for module in model.modules() if isinstance(module, StockMoE)]


class DispatchedMOELayer(MOELayer):  # type: ignore[misc]
    """``MOELayer`` that dispatches and combines with this library. Made by :func:`convert`."""

    settings: DispatcherConfig
    has_own_settings = False
    """Whether they were given for this layer: ds_config then leaves them alone."""
    local_experts: LocalExperts
    overlap: Overlap

    def _set_ep_group(self, ep_group: Any) -> None:
        super()._set_ep_group(ep_group)
        self.connect()

    def connect(self) -> None:
        """Make the dispatcher of the layer's expert-parallel group. Collective."""
        dispatcher = TokenDispatcher(self.ep_group, self.ep_size * self.num_local_experts, self.settings)
        self.overlap = Overlap(dispatcher)
        self.local_experts.pack()

    def forward(self, *input: Tensor, **kwargs: Any) -> Tensor:
        """Tokens ``[..., M]`` and ``used_token`` or None; returns ``[..., M]``, sets ``l_aux`` and ``exp_counts``."""
        hidden, used_token = input
        with self._timed(MOE_TIMER, self, "time_moe"):
            x = hidden.reshape(-1, hidden.shape[-1])
            self._check_tokens(len(x))
            topk_idx, weights, find_load = self._route(x, used_token)
            if tensor_parallel.size() == 1 or tensor_parallel.experts_are_sliced():
                out = self._dispatch_and_compute(x, topk_idx, weights)
            else:
                own = tensor_parallel.own_share
                out = self._dispatch_and_compute(own(x), own(topk_idx, fill=-1), own(weights))
                out = tensor_parallel.gather_shares(out, len(x))
            self.l_aux, self.exp_counts = find_load()  # now, while the device is busy with the rows
            return out.reshape(*hidden.shape[:-1], out.shape[-1])

    def _route(self, x: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Callable[[], Load]]:
        """Experts ``[T, K]`` and weights ``[T, K]`` of the tokens; what computes the experts' load."""
        if not self.gate.drop_tokens:
            with self._timed(TOPK_GATE_TIMER, self.gate, "gate_time"):
                routes = dropless_routes(self.gate, x, used_token)
            return routes.topk_idx, routes.weights, lambda: load(self.gate, routes)
        l_aux, _, _, topk_idx, _, weights, exp_counts = self.gate(x, used_token, sparse_routes=True)
        return topk_idx.t().contiguous(), weights.t().contiguous(), lambda: Load(l_aux, exp_counts)

    def _dispatch_and_compute(self, x: Tensor, topk_idx: Tensor, weights: Tensor) -> Tensor:
        if self.settings.num_chunks > 1:
            return self.overlap.pipeline(lambda chunk: self._compute(chunk, None)[0], x, topk_idx, weights)
        dispatcher = self.overlap.dispatcher
        with self._timed(FIRST_ALLTOALL_TIMER, self, "time_falltoall"):
            dispatched = dispatcher.dispatch(x, topk_idx, weights)
        rows, still_to_weigh = self._compute(dispatched, dispatched.weights)
        with self._timed(SECOND_ALLTOALL_TIMER, self, "time_salltoall"):
            return dispatcher.combine(rows, dispatched, weights=still_to_weigh)

    def _compute(self, dispatched: Dispatched, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        counts, counts_host = dispatched.tokens_per_expert, dispatched.tokens_per_expert_host
        return self.local_experts(dispatched.rows, counts, counts_host, weights)

    def _check_tokens(self, count: int) -> None:
        limit = self.settings.max_tokens_per_rank
        if 0 < limit < count:
            raise InputError(
                "max_tokens_per_rank",
                limit,
                f"this rank has {count} tokens in one layer; set it to at least train_micro_batch_size_per_gpu times "
                "the longest sequence, or to 0 (grow on demand)",
            )

    @contextmanager
    def _timed(self, name: str, owner: Any, attribute: str) -> Iterator[None]:
        """DeepSpeed's own timers, read by the engine with ``wall_clock_breakdown``."""
        if not self.wall_clock_breakdown:
            yield
            return
        timer = owner.timers(name)
        timer.start()
        yield
        timer.stop()
        setattr(owner, attribute, timer.elapsed(reset=False))
