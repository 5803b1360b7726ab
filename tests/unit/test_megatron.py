"""The Megatron-Core plugin without ranks: what it registers, what it refuses, and its launcher."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from deepep_moe.errors import ConfigError, UnsupportedError
from tests.launch import ROOT, torchrun

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from deepep_moe.integrations.megatron import register, registration
from deepep_moe.integrations.megatron.options import dispatcher_config

LAUNCHER = "deepep_moe.integrations.megatron"


def config(kind: type = TransformerConfig, dispatcher: str = "deepep", **options: Any) -> Any:
    base = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_moe_experts": 4}
    return kind(moe_token_dispatcher_type=dispatcher, add_bias_linear=False, **{**base, **options})


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DEEPEP_MOE_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("kind", [TransformerConfig, MLATransformerConfig])
def test_config_keeps_its_type(kind: type) -> None:
    original = config(kind)
    copies = [original, copy.deepcopy(original), copy.copy(original), dataclasses.replace(original, num_layers=3)]
    assert [c.moe_token_dispatcher_type for c in copies] == ["deepep"] * 4


def test_other_types_are_left_alone() -> None:
    assert config(dispatcher="alltoall", moe_enable_deepep=False).moe_token_dispatcher_type == "alltoall"
    with pytest.raises(ValueError, match="flex token dispatcher"):
        config(dispatcher="alltoall", moe_enable_deepep=True)


def test_rules_of_alltoall_hold() -> None:
    with pytest.raises(ValueError, match="moe_expert_capacity_factor must be set"):
        config(moe_pad_expert_input_to_capacity=True)
    assert config(moe_shared_expert_intermediate_size=8, moe_shared_expert_overlap=True).moe_shared_expert_overlap


def test_registering_twice_changes_nothing() -> None:
    before = TransformerConfig.__post_init__, TransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"].type
    register()
    after = TransformerConfig.__post_init__, TransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"].type
    assert before == after
    assert get_args(after[1]).count("deepep") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_enable_deepep", True),
        ("moe_expert_rank_capacity_factor", 1.5),
        ("moe_paged_stash", True),
        ("moe_permute_fusion_into_hybridep", True),
        ("moe_ncclep_zero_copy", True),
        ("moe_pad_experts_for_cuda_graph_inference", True),
        ("transformer_impl", "inference_optimized"),
    ],
)
def test_foreign_options_are_refused(name: str, value: object) -> None:
    from deepep_moe.integrations.megatron.options import check_options

    if name in TransformerConfig.__dataclass_fields__:
        with pytest.raises(ConfigError, match=f"{name} = {value!r} with moe_token_dispatcher_type = 'deepep'"):
            config(**{name: value})
    valid = config()
    setattr(valid, name, value)  # some exist only in newer versions
    with pytest.raises(ConfigError, match=f"{name} = {value!r} with moe_token_dispatcher_type = 'deepep'"):
        check_options(valid)


@pytest.mark.parametrize(
    ("modules", "refused"),
    [
        ([], True),
        (["moe"], True),
        (["attn", "full_iteration"], True),
        (["attn", "moe_router", "moe_preprocess"], False),
    ],
)
def test_cuda_graphs_may_not_cover_the_communication(
    modules: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepep_moe.integrations.megatron.options import check_options

    graphed = config()
    graphed.cuda_graph_impl = "transformer_engine"
    setattr(graphed, "cuda_graph_modules" if hasattr(graphed, "cuda_graph_modules") else "cuda_graph_scope", modules)
    if refused:
        with pytest.raises(ConfigError, match="capture moe_router and moe_preprocess only"):
            check_options(graphed)
        monkeypatch.setenv("DEEPEP_MOE_CAPACITY_FACTOR", "2")
    check_options(graphed)


@pytest.mark.parametrize("setting", ["FP8_DISPATCH", "FP8_DISPATCH_GRAD"])
def test_fp8_wants_whole_blocks_of_channels(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"DEEPEP_MOE_{setting}", "1")
    config(hidden_size=96)  # FP32 tokens travel as they are
    config(hidden_size=256, params_dtype=torch.bfloat16)
    config(hidden_size=96, params_dtype=torch.bfloat16, num_moe_experts=None)  # no experts, nothing is sent
    with pytest.raises(
        ConfigError, match=r"hidden_size = 96 with moe_token_dispatcher_type = 'deepep'.* multiple of 128"
    ):
        config(hidden_size=96, params_dtype=torch.bfloat16)


def test_settings_come_from_megatron_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert dispatcher_config(config(moe_deepep_num_sms=12)).num_sms == 12
    settings = tmp_path / "settings.yaml"
    settings.write_text("num_sms: 16\nexpert_alignment: 6\n")
    monkeypatch.setenv("DEEPEP_MOE_CONFIG", str(settings))
    assert dispatcher_config(config(moe_deepep_num_sms=12)).num_sms == 16
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", "32")
    quantised = config(moe_deepep_num_sms=12)
    quantised.fp8, quantised.moe_router_padding_for_quantization = "e4m3", True
    assert dispatcher_config(quantised).num_sms == 32
    assert dispatcher_config(quantised).expert_alignment == 48  # 6 from the file and 16 of the FP8 recipe


def test_megatrons_default_of_20_sms_counts_only_where_communication_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_overlap": True}
    assert dispatcher_config(config()).num_sms == 0  # the backend's choice
    assert dispatcher_config(config(moe_deepep_num_sms=20)).num_sms == 0
    assert dispatcher_config(config(moe_deepep_num_sms=21)).num_sms == 21
    assert dispatcher_config(config(moe_deepep_num_sms=20, **shared)).num_sms == 20
    both = config(moe_deepep_num_sms=12)
    both.moe_flex_dispatcher_num_sms = 14  # newer releases call it so
    assert dispatcher_config(both).num_sms == 14
    both.moe_flex_dispatcher_num_sms = 20
    both.overlap_moe_expert_parallel_comm = True
    assert dispatcher_config(both).num_sms == 20


def test_alignments_of_both_sides_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_EXPERT_ALIGNMENT", "24")
    assert dispatcher_config(config()).expert_alignment == 24
    quantised = config()
    quantised.moe_router_padding_for_quantization = True
    for recipe, alignment in ((None, 48), ("mxfp8", 96)):  # lcm with 16 and with 32
        quantised.fp8, quantised.fp8_recipe = "e4m3" if recipe else None, recipe
        assert dispatcher_config(quantised).expert_alignment == alignment


def test_unsupported_version_gets_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    info = importlib.import_module("megatron.core.package_info")
    for minor, version in ((15, "0.15.0"), (20, "0.20.0")):
        monkeypatch.setattr(info, "MINOR", minor)
        monkeypatch.setattr(info, "__version__", version)
        with pytest.raises(UnsupportedError, match=f"{version} is installed; .* supports 0.16.1 to 0.19.2"):
            register()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.core.transformer.transformer_config", "TransformerConfig"),
        ("megatron.core.transformer.moe.moe_layer", "MoELayer"),
        ("megatron.core.transformer.moe.moe_layer", "MoEAlltoAllTokenDispatcher"),
        (registration._schedule_module("").__name__, "should_free_input"),
    ],
)
def test_missing_patch_point_is_loud(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(UnsupportedError, match=f"does not have .*{name}"):
        register()


def test_untyped_field_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"], "type", str)
    with pytest.raises(UnsupportedError, match="Literal-typed field"):
        register()


@pytest.mark.parametrize(
    ("node", "is_moe", "freed"),
    [("moe_combine", True, True), ("moe_dispatch", True, False), ("mlp", True, False), ("moe_combine", False, False)],
)
def test_what_the_overlap_may_free(node: str, is_moe: bool, freed: bool) -> None:
    should_free: Callable[..., bool] = registration._schedule_module("").should_free_input
    arguments = () if registration._check_version().startswith("0.16") else (2,)
    assert should_free(node, is_moe, config(), *arguments) is freed
    assert should_free(node, is_moe, config(dispatcher="alltoall"), *arguments) is (is_moe and node != "")


@pytest.mark.parametrize(("name", "value"), [("fp8", "e4m3"), ("add_bias_linear", True), ("delay_wgrad_compute", True)])
def test_grouped_experts_refuse_what_they_lack(name: str, value: object) -> None:
    from deepep_moe.integrations.megatron.experts import GroupedExperts

    asked = config()
    setattr(asked, name, value)
    with pytest.raises(ConfigError, match=f"{name} = {value!r} with GroupedExperts"):
        GroupedExperts(2, asked)


# A stand-in for pretrain_gpt.py: megatron.training is not in the wheel, but its parser is built from the same fields.
PRETRAIN = """
    import argparse, dataclasses, json, sys
    from typing import Literal, Optional, get_args, get_origin
    import neighbour  # beside the script, as megatron.training is beside pretrain_gpt.py
    from megatron.core.transformer import TransformerConfig

    parser = argparse.ArgumentParser(prog="pretrain")
    for field in dataclasses.fields(TransformerConfig):
        option = "--" + field.name.replace("_", "-")
        if get_origin(field.type) is Literal:
            parser.add_argument(option, choices=get_args(field.type), default=field.default)
        elif field.type in (int, Optional[int]):
            parser.add_argument(option, type=int, default=None)
    arguments = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    config = TransformerConfig(add_bias_linear=False, **arguments)
    plugin = sys.modules.get("deepep_moe.integrations.megatron.registration")
    grouped = plugin is not None and plugin._grouped_experts
    print(json.dumps([__name__, sys.argv[0], config.moe_token_dispatcher_type, config.num_moe_experts, grouped]))
"""
OPTIONS = ["--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "4", "--num-moe-experts", "4"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").touch()
    path = tmp_path / "pretrain_stand_in.py"
    path.write_text(textwrap.dedent(PRETRAIN))
    return path


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_launcher_extends_the_command_line(script: Path) -> None:
    asked = [*OPTIONS, "--moe-token-dispatcher-type", "deepep"]
    plain = run(str(script), *asked)
    assert plain.returncode == 2
    assert "invalid choice: 'deepep'" in plain.stderr
    launched = run("-m", LAUNCHER, str(script), *asked)
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout) == ["__main__", str(script), "deepep", 4, False]


def test_launcher_under_torchrun(script: Path) -> None:
    asked = [*OPTIONS, "--moe-token-dispatcher-type", "deepep"]
    assert f'["__main__", "{script}", "deepep", 4, false]' in torchrun(1, "-m", LAUNCHER, str(script), *asked).stdout


def test_launcher_runs_modules_with_grouped_experts(script: Path) -> None:
    asked = [*OPTIONS, "--moe-token-dispatcher-type", "deepep"]
    launched = run("-m", LAUNCHER, "--grouped-experts", "-m", script.stem, *asked, cwd=script.parent)
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout) == ["__main__", str(script), "deepep", 4, True]


def test_launcher_explains_itself() -> None:
    usage = run("-m", LAUNCHER, "--help")
    assert usage.returncode == 0
    assert "torchrun" in usage.stdout
    missing = run("-m", LAUNCHER, "no_such_script.py")
    assert missing.returncode == 1
    assert "no such script: no_such_script.py" in missing.stderr
