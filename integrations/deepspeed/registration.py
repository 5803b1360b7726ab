"""Teach DeepSpeed the ds_config block ``deepep_moe``.

DeepSpeed leaves blocks that it does not know alone, so one method is extended: ``DeepSpeedEngine``'s
``_configure_expert_parallel``. When it runs, the configuration has been read, but no layer of AutoEP is built and no
process group made: an impossible setting is an error before anything costs time. Without the block, or with
``enabled: false``, the method does what it did.

Settings, a later source wins: defaults < the block < YAML file ($DEEPEP_MOE_CONFIG) < ``DEEPEP_MOE_<FIELD>`` variables.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
from collections.abc import Mapping
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import ConfigError, UnsupportedError
from deepep_moe.integrations.deepspeed import auto_ep
from deepep_moe.integrations.deepspeed.moe import (
    DispatchedMOELayer,
    check_layer,
    convert_layer,
    native_layers,
    replay_if_set,
)

BLOCK = "deepep_moe"
SUPPORTED = "0.19.8 or a later 0.19"

_OLDEST, _SERIES = (0, 19, 8), (0, 19)
_METHOD = "_configure_expert_parallel"
_MARK = "_deepep_moe_original"
_log = logging.getLogger(__name__)


def register() -> None:
    """Make the block known to DeepSpeed; importing the package does it. Calling it again changes nothing.

    Raises:
        UnsupportedError: the DeepSpeed version is not supported, or a patch point is not there.
    """
    version = check_version(importlib.metadata.version("deepspeed"))
    original = getattr(DeepSpeedEngine, _METHOD, None)
    missing = [*auto_ep.missing(), *([f"DeepSpeedEngine.{_METHOD}"] if original is None else [])]
    if original is None or missing:
        raise UnsupportedError(
            f"deepspeed {version} has no {' and no '.join(missing)}, which deepep_moe extends; supported is {SUPPORTED}"
        )
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def configure(engine: DeepSpeedEngine, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        settings = read_block(ds_config_of(engine))
        if settings is not None:
            switch_on(engine, model, settings)
        for layer in native_layers(model):
            if isinstance(layer, DispatchedMOELayer):  # by the block, by convert, or by our MoE
                check_native(engine, layer.settings)
                replay_if_set(model, layer.settings)
        return original(engine, model, *args, **kwargs)

    setattr(configure, _MARK, original)
    setattr(DeepSpeedEngine, _METHOD, configure)


def check_version(version: str) -> str:
    """``version`` if it is supported; builds from source (``0.19.8+abc``) and later patches count too."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
    if numbers < _OLDEST or numbers[:2] != _SERIES:
        raise UnsupportedError(
            f"deepep_moe.integrations.deepspeed needs deepspeed {SUPPORTED}; installed is {version}: "
            "`pip install deepspeed==0.19.8`"
        )
    return version


def ds_config_of(engine: DeepSpeedEngine) -> Mapping[str, Any]:
    """ds_config as a mapping: what the user gave, or what DeepSpeed has read from a file (a private attribute)."""
    if isinstance(engine.config, Mapping):
        return engine.config
    read = getattr(engine._config, "_param_dict", None)
    if isinstance(read, Mapping):
        return read
    _log.warning("the block %s is not looked for: this DeepSpeed does not tell what ds_config holds", BLOCK)
    return {}


def read_block(ds_config: Mapping[str, Any]) -> DispatcherConfig | None:
    """The settings of the block ``deepep_moe``; None where it is absent or not enabled.

    Raises:
        ConfigError: no mapping, ``enabled`` missing or not true or false, an unknown key, an impossible value.
    """
    block = ds_config.get(BLOCK)
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ConfigError(f'{BLOCK} = {block!r} (ds_config): allowed is a mapping such as {{"enabled": true}}')
    enabled = block.get("enabled")
    if not isinstance(enabled, bool):
        raise ConfigError(f"{BLOCK}.enabled = {enabled!r} (ds_config): allowed is true or false")
    fields = {key: value for key, value in block.items() if key != "enabled"}
    settings = DispatcherConfig.load(fields, source=f"ds_config block {BLOCK}")
    return settings if enabled else None


def switch_on(engine: DeepSpeedEngine, model: nn.Module, settings: DispatcherConfig) -> None:
    """Convert native MoE layers and serve AutoEP, as far as the model and ds_config have them."""
    native = native_layers(model)
    expert_parallel = engine._config.expert_parallel_config
    autoep = expert_parallel is not None and expert_parallel.enabled
    if native:
        check_native(engine, settings)
        for layer in native:
            check_layer(layer)
        for layer in native:
            if not getattr(layer, "has_own_settings", False):
                convert_layer(layer, settings)
        _log.info("deepep_moe: %d native MoE layers converted", len(native))
    if autoep and expert_parallel.comm_backend != "deepep":
        raise ConfigError(
            f"expert_parallel.comm_backend = {expert_parallel.comm_backend!r} (ds_config): AutoEP dispatches with "
            f'deepep_moe when it is "deepep"; or set {BLOCK}.enabled to false'
        )
    if autoep:
        auto_ep.check(settings, expert_parallel, bool(engine.bfloat16_enabled()), engine.autotp_size())
        auto_ep.install(settings)
    if not native and not autoep:
        _log.warning("%s is enabled in ds_config, but the model has no MoE layer and AutoEP is off", BLOCK)


def check_native(engine: DeepSpeedEngine, settings: DispatcherConfig) -> None:
    """Refuse what native MoE with these settings cannot do in this engine."""
    if engine.zero_optimization_stage() >= 3:
        raise UnsupportedError(
            "zero_optimization.stage = 3 (ds_config): DeepSpeed's native MoE does not work with ZeRO-3, with or "
            "without deepep_moe; set stage 0, 1 or 2, or use AutoEP (expert_parallel), which supports ZeRO-3"
        )
    if settings.replay_on_overflow and engine.pipeline_parallelism:
        raise UnsupportedError(
            f"{BLOCK}.replay_on_overflow = true (ds_config): not with DeepSpeed's pipeline parallelism, whose stages "
            "run different numbers of forwards at a time; set capacity_factor to 0"
        )
    device = get_accelerator().device_name()
    if engine.fp16_enabled() and device == "cpu":
        raise UnsupportedError("fp16.enabled = true (ds_config): not on a CPU; set bf16.enabled, or neither for fp32")
    if (settings.fp8_dispatch or settings.fp8_dispatch_grad) and not engine.bfloat16_enabled():
        raise ConfigError(
            f"{BLOCK}.fp8_dispatch or fp8_dispatch_grad = true (ds_config): FP8 is made from bfloat16; "
            "set bf16.enabled to true"
        )
