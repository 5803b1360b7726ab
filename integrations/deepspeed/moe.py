"""DeepSpeed's native MoE layer on a :class:`~deepep_moe.TokenDispatcher`.

:func:`convert` changes the class of every ``MOELayer`` in a model to one with another ``forward``. All else stays: the
modules, so state-dict keys and parameter tags; the gate; ``MoE`` around it with its residual branch and the tuple it
returns. :class:`MoE` is DeepSpeed's, converted when it is made. Two things differ inside:

* Rows arrive grouped by expert and as many as there are. The stock layer pads every expert to one capacity.
* With ``drop_tokens=False`` nothing is agreed on beforehand (see :mod:`routing`). With capacity the stock gate decides;
  a gate of another kind always does.

A rank that cannot go on, whoever raised the error, takes its part in the exchange that the others wait in, marked as
refused: they raise :class:`~deepep_moe.errors.PeerError` with its reason.

Under tensor parallelism all ranks of the tensor-parallel group hold the same tokens. Each dispatches its share, and the
shares are gathered afterwards. If the experts are tensor-parallel too, each dispatches all tokens in its own
expert-parallel group instead: the slices of an expert then see the same rows, in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import FIRST_ALLTOALL_TIMER, MOE_TIMER, SECOND_ALLTOALL_TIMER, TOPK_GATE_TIMER, MOELayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deepep_moe.backends.base import Phase
from deepep_moe.backends.checks import check_tensor
from deepep_moe.config import DispatcherConfig
from deepep_moe.dispatcher import Dispatched, TokenDispatcher
from deepep_moe.errors import DeepEPMoEError, HandleError, InputError, UnsupportedError
from deepep_moe.grouped import Groups
from deepep_moe.integrations.deepspeed import tensor_parallel
from deepep_moe.integrations.deepspeed.experts import LocalExperts
from deepep_moe.integrations.deepspeed.routing import Load, call_gate, dropless_routes, load, serves
from deepep_moe.overflow import replay_of, replay_on_overflow
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
        _convert(self, deepep_moe)  # a forward that may be run again is that of the whole model
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
        UnsupportedError: ZeRO-3 has partitioned the parameters, a layer has a forward of its own or BatchNorm in its
            experts, or the configured backend cannot run here.
    """
    settings = _convert(model, config)
    replay_if_set(model, settings)
    return model


def replay_if_set(model: nn.Module, settings: DispatcherConfig) -> None:
    """:func:`~deepep_moe.overflow.replay_on_overflow` for ``model``, if the settings ask for it."""
    if settings.replay_on_overflow and settings.capacity_factor > 0 and replay_of(model) is None:
        replay_on_overflow(model)


def _convert(model: nn.Module, config: DispatcherConfig | Mapping[str, Any] | None) -> DispatcherConfig:
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
        check_layer(layer)
    for layer in layers:
        convert_layer(layer, settings)
    return settings


def check_layer(layer: Any) -> None:
    """Refuse a layer whose code this library's would replace, or whose experts depend on DeepSpeed's padding."""
    for part, known in ((layer, (MOELayer, DispatchedMOELayer)), (layer.experts, (Experts, LocalExperts))):
        if type(part) not in known or "forward" in vars(part):
            raise UnsupportedError(
                f"{type(part).__module__}.{type(part).__qualname__} has a forward of its own, which deepep_moe would "
                f"replace: only {known[0].__module__}.{known[0].__qualname__} itself can be converted"
            )
    for name, module in layer.experts.named_modules():
        if isinstance(module, _NormBase):
            raise UnsupportedError(
                f"{type(module).__name__} in experts.{name}: it computes statistics of an expert's rows, which in "
                "DeepSpeed's layer include padding; LayerNorm, RMSNorm and the like work"
            )


def convert_layer(layer: Any, settings: DispatcherConfig) -> None:
    """:func:`convert` for one ``MOELayer``."""
    layer.__class__ = DispatchedMOELayer
    layer.settings = settings
    LocalExperts.of(layer.experts)
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
    overlap: Overlap

    @property
    def local_experts(self) -> LocalExperts:
        """The module ``experts``, as it is now."""
        if not isinstance(self.experts, LocalExperts):
            check_layer(self)
            LocalExperts.of(self.experts)
        return self.experts

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
        if self.ep_group is None:
            raise HandleError(
                "the MoE layer has no expert-parallel group yet: call deepspeed.initialize, or "
                "set_deepspeed_parallelism() of its MoE module"
            )
        with self._timed(MOE_TIMER, self, "time_moe"):
            whole = tensor_parallel.size() == 1 or tensor_parallel.experts_are_sliced()
            with self._telling_peers("plan"):
                hidden, used_token = input
                check_tensor("hidden_states", hidden)
                if hidden.dim() == 0:
                    raise InputError("hidden_states", "a scalar", "must be [..., M]")
                if used_token is not None:
                    check_tensor("used_token", used_token)
                x = hidden.reshape(-1, hidden.shape[-1])
                self._check(len(x))
                topk_idx, weights, find_load = self._route(x, used_token)
                sent = (x, topk_idx, weights)
                if not whole:
                    own = tensor_parallel.own_share
                    sent = (own(x), own(topk_idx, fill=-1), own(weights))
            out = self._dispatch_and_compute(*sent)
            if not whole:
                out = tensor_parallel.gather_shares(out, len(x))
            self.l_aux, self.exp_counts = find_load()  # now, while the device is busy with the rows
            return out.reshape(*hidden.shape[:-1], out.shape[-1])

    def _route(self, x: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Callable[[], Load]]:
        """Experts ``[T, K]`` and weights ``[T, K]`` of the tokens; what computes the experts' load."""
        if serves(self.gate, x):
            with self._timed(TOPK_GATE_TIMER, self.gate, "gate_time"):
                routes = dropless_routes(self.gate, x, used_token)
            return routes.topk_idx, routes.weights, lambda: load(self.gate, routes)
        topk_idx, weights, found = call_gate(self.gate, x, used_token, self.use_tutel)
        return topk_idx, weights, lambda: found

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
        """The experts' results, and ``weights`` if they are not in the results already."""
        with self._telling_peers("combine"):
            experts, rows = self.local_experts, dispatched.rows
            together = experts.together(rows)
            inside = weights if together is not None and together.weighs_inside else None
            groups = Groups(dispatched.tokens_per_expert, dispatched.tokens_per_expert_host)
            return experts(rows, groups=groups, together=together, weights=inside), weights if inside is None else None

    @contextmanager
    def _telling_peers(self, phase: Phase) -> Iterator[None]:
        """Lets peers, who are on their way into ``phase``, learn of an error of this rank instead of waiting for it."""
        try:
            yield
        except Exception as error:
            told = error if isinstance(error, DeepEPMoEError) else DeepEPMoEError(f"{type(error).__name__}: {error}")
            try:
                self.overlap.dispatcher.backend.refuse(phase, told)
            except DeepEPMoEError as raised:
                raise error from (error.__cause__ if raised is told else raised)

    def __deepcopy__(self, memo: dict[int, Any]) -> DispatchedMOELayer:
        """Weights are copied; process group and dispatcher, which are the process's, are shared."""
        for shared in (self.ep_group, vars(self).get("overlap")):
            memo[id(shared)] = shared
        aux_loss = vars(self).get("l_aux")
        if isinstance(aux_loss, Tensor):  # of the last forward; a tensor with a history cannot be copied
            memo[id(aux_loss)] = aux_loss.detach().clone()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for parameter, original in zip(copied.parameters(), self.parameters()):
            for tag in vars(original).keys() & {"allreduce", "group_name"}:  # by which DeepSpeed knows experts
                setattr(parameter, tag, getattr(original, tag))
        copied.local_experts.pack()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.ep_group is not None:
            raise UnsupportedError(
                "a connected MoE layer cannot be pickled, for its process group means nothing elsewhere: save "
                "model.state_dict(), or use the engine's save_checkpoint; copy.deepcopy works"
            )
        return self.__dict__

    def _check(self, count: int) -> None:
        """That ``count`` tokens are allowed, and that the experts are those that the others dispatch to."""
        found = len(self.local_experts.deepspeed_experts)
        if found != self.num_local_experts:
            raise InputError("experts.deepspeed_experts", f"{found} modules", f"must be {self.num_local_experts}")
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
        try:
            yield
        finally:
            timer.stop()
            setattr(owner, attribute, timer.elapsed(reset=False))
