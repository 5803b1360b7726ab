"""Teach Megatron-Core the token dispatcher type ``deepep``.

:func:`register` extends the places in Megatron-Core that know dispatcher types by name or run a dispatcher. It checks
first that all of them are where they should be, and does nothing for configurations of another type:

===================================  ==================================================================================
``TransformerConfig`` field type     a ``Literal``; Megatron's command line takes its choices from it
``TransformerConfig.__post_init__``  validates; for us it runs with the type ``alltoall``, whose rules are ours too
``MoELayer.__init__``                builds the dispatcher; for us its ``alltoall`` branch builds our class
``MoELayer.forward``                 runs the dispatcher; for us what goes wrong on one rank is told to all
``should_free_input``                says which inputs the 1F1B communication overlap may free after the forward pass
``DistributedDataParallel``          wraps a model chunk; ``replay_on_overflow`` lets its forward run again (replay.py)
``MegatronModule``                   learns ``copy.deepcopy`` for models with our dispatcher (copying.py)
===================================  ==================================================================================

A configuration reads ``deepep`` at all times except inside the two that validate and build, so copies of it stay true.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import ConfigError, UnsupportedError
from deepep_moe.integrations.megatron import copying, options
from deepep_moe.integrations.megatron.options import check_foreign_options, check_options

NAME = "deepep"
OLDEST, NEWEST = (0, 16, 1), (0, 19)
SUPPORTED = "0.16.1 to 0.19.2"

_MARK = "_deepep_moe_original"
_FIELD = "moe_token_dispatcher_type"
_log = logging.getLogger(__name__)
_grouped_experts = False


def register(*, grouped_experts: bool | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Make ``moe_token_dispatcher_type="deepep"`` known to Megatron-Core. Calling it again changes nothing but what it
    is given.

    Args:
        grouped_experts: True builds layers of this dispatcher type with ``experts.GroupedExperts`` where the
            specification has Megatron-Core's own local experts; False does not; None leaves it as it was (at first
            False).
        settings: fields of ``DispatcherConfig`` for dispatchers that are built from now on, such as
            ``{"num_sms": 24}``; they override ``TransformerConfig``, and a YAML file and the environment override them.
            None leaves what an earlier call gave.

    Raises:
        ConfigError: ``settings`` has an unknown key or an impossible value.
        UnsupportedError: Megatron-Core is missing, its version is not supported, or a patch point is not there.
    """
    global _grouped_experts
    if grouped_experts is not None:
        _grouped_experts = grouped_experts
    if settings is not None:
        DispatcherConfig.load(settings, source="settings of register()", env={})
        options.registered.clear()
        options.registered.update(settings)
    version = _check_version()
    try:
        _attach(version)
    except ModuleNotFoundError as error:  # 0.18 and newer import triton, which CPU builds of torch come without
        raise UnsupportedError(f"megatron-core {version} cannot be imported: it needs {error.name}") from error
    _log.debug("registered token dispatcher %r with megatron-core %s", NAME, version)


def _attach(version: str) -> None:
    config_class = _find("megatron.core.transformer.transformer_config", "TransformerConfig", version)
    layers = importlib.import_module("megatron.core.transformer.moe.moe_layer")
    layer_class = _find(layers.__name__, "MoELayer", version)
    _find(layers.__name__, "MoEAlltoAllTokenDispatcher", version)
    module_class = _find("megatron.core.transformer.module", "MegatronModule", version)
    wrapper_class = _find("megatron.core.distributed", "DistributedDataParallel", version)
    schedule = _schedule_module(version)
    field = getattr(config_class, "__dataclass_fields__", {}).get(_FIELD)
    if field is None or get_origin(field.type) is not Literal:
        raise _missing(f"a Literal-typed field TransformerConfig.{_FIELD}", version)

    choices = get_args(field.type)
    if NAME not in choices:
        field.type = Literal[(*choices, NAME)]  # type: ignore[valid-type]
        config_class.__annotations__[_FIELD] = field.type
    _wrap(config_class, "__post_init__", _post_init)
    _wrap(layer_class, "__init__", functools.partial(_layer_init, layers))
    _wrap(layer_class, "forward", _layer_forward)
    _wrap(schedule, "should_free_input", _should_free_input)
    _wrap(wrapper_class, "__init__", _data_parallel_init)
    copying.attach(module_class)

    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16 leaves the router a NameError where TransformerEngine is missing


def _check_version() -> str:
    try:
        info = importlib.import_module("megatron.core.package_info")
    except ImportError as error:
        raise UnsupportedError(
            f"deepep_moe.integrations.megatron needs megatron-core {SUPPORTED}, which cannot be imported ({error}); "
            "install it with `pip install megatron-core`"
        ) from error
    version = (info.MAJOR, info.MINOR, info.PATCH)
    if version < OLDEST or version[:2] > NEWEST:
        raise UnsupportedError(
            f"megatron-core {info.__version__} is installed; deepep_moe.integrations.megatron supports {SUPPORTED}"
        )
    return str(info.__version__)


def _missing(what: str, version: str) -> UnsupportedError:
    return UnsupportedError(
        f"megatron-core {version} does not have {what}, which the {NAME} dispatcher attaches to; "
        f"supported are unmodified versions {SUPPORTED}"
    )


def _find(module: str, name: str, version: str) -> Any:
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise _missing(f"{module}.{name}", version)
    return found


def _schedule_module(version: str) -> ModuleType:
    """The module with ``should_free_input``: moved in 0.19."""
    for name in ("megatron.core.models.common.utils", "megatron.core.models.gpt.fine_grained_callables"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        if hasattr(module, "should_free_input"):
            return module
    raise _missing("should_free_input", version)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(original, *args, **kwargs)``, once."""
    original = owner.__dict__[name]
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, wrapped)


def _post_init(original: Callable[..., None], config: Any) -> None:
    if config.moe_token_dispatcher_type != NAME:
        original(config)
        return
    check_foreign_options(config)
    config.moe_token_dispatcher_type = "alltoall"
    try:
        original(config)
    finally:
        config.moe_token_dispatcher_type = NAME
    check_options(config)


def _layer_init(
    module: Any,
    original: Callable[..., None],
    layer: Any,
    config: Any,
    submodules: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    if config.moe_token_dispatcher_type != NAME:
        original(layer, config, submodules, *args, **kwargs)
        return
    if _grouped_experts:
        submodules = _with_grouped_experts(submodules)
    from deepep_moe.integrations.megatron.dispatcher import DeepEPTokenDispatcher

    alltoall = module.MoEAlltoAllTokenDispatcher

    def build(*build_args: Any, **build_kwargs: Any) -> Any:
        config.moe_token_dispatcher_type = NAME  # what is built next copies the configuration
        return DeepEPTokenDispatcher(*build_args, **build_kwargs)

    config.moe_token_dispatcher_type, module.MoEAlltoAllTokenDispatcher = "alltoall", build
    try:
        original(layer, config, submodules, *args, **kwargs)
    finally:
        config.moe_token_dispatcher_type, module.MoEAlltoAllTokenDispatcher = NAME, alltoall
    _check_experts(layer, config)


def _layer_forward(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    from deepep_moe.backends.checks import check_tensor
    from deepep_moe.integrations.megatron.dispatcher import DeepEPTokenDispatcher

    if not isinstance(layer.token_dispatcher, DeepEPTokenDispatcher):
        return original(layer, *args, **kwargs)
    with layer.token_dispatcher.tell_peers():
        check_tensor("hidden_states", args[0] if args else kwargs.get("hidden_states"))
        return original(layer, *args, **kwargs)


def _data_parallel_init(
    original: Callable[..., None], wrapper: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **kwargs: Any
) -> None:
    if config.moe_token_dispatcher_type == NAME:
        from deepep_moe.integrations.megatron import replay

        replay.attach(module)
    original(wrapper, config, ddp_config, module, *args, **kwargs)


def _check_experts(layer: Any, config: Any) -> None:
    """Raise :class:`~deepep_moe.errors.ConfigError` for experts that cannot take outputs of a fixed size."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    factor = layer.token_dispatcher.dispatcher.config.capacity_factor
    exact = factor == 0 or config.moe_pad_expert_input_to_capacity or layer.num_local_experts == 1
    if isinstance(layer.experts, SequentialMLP) and not exact:
        raise ConfigError(
            f"capacity_factor = {factor:g} with experts of type SequentialMLP: they want as many rows as their counts "
            "sum to, and an output of a fixed size has more; use GroupedExperts (register(grouped_experts=True), or "
            "--grouped-experts of the launcher), or set capacity_factor to 0"
        )


def _with_grouped_experts(submodules: Any) -> Any:
    """The specification with our experts, if it has experts made of Megatron-Core's own linear layers."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from deepep_moe.integrations.megatron.experts import GroupedExperts

    experts = getattr(submodules, "experts", None)
    # A class, a ModuleSpec of one (before 0.17), or a functools.partial of one.
    kind = getattr(experts, "module", None) or getattr(experts, "func", experts)
    if kind is SequentialMLP:
        return dataclasses.replace(submodules, experts=GroupedExperts)
    if kind is not GroupedExperts:
        _log.warning("grouped_experts: the layer's experts stay %s", getattr(kind, "__name__", kind))
    return submodules


def _should_free_input(
    original: Callable[..., bool], name: str, is_moe: bool, config: Any, *args: Any, **kwargs: Any
) -> bool:
    """Which node of the 1F1B overlap may free its input once its forward is done.

    ``moe_dispatch`` gets a view of the layer norm's output, and ``mlp`` gets rows that the experts save for their
    backward. Nobody needs the experts' output after ``moe_combine``.
    """
    if config.moe_token_dispatcher_type != NAME:
        return original(name, is_moe, config, *args, **kwargs)
    return bool(is_moe) and name == "moe_combine"
