"""DispatcherConfig: sources and their order, errors that name key, source and allowed values; Config."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from deepep_moe import Buffer, Config, DispatcherConfig
from deepep_moe.config import _RULES
from deepep_moe.errors import ConfigError, DeepEPMoEError


def load(overrides: dict | None = None, yaml_text: str | None = None, tmp_path: Path | None = None, **env: str):
    path = None
    if yaml_text is not None:
        assert tmp_path is not None
        path = tmp_path / "settings.yaml"
        path.write_text(yaml_text)
    return DispatcherConfig.load(overrides, yaml_path=path, env=env)


def test_later_sources_win(tmp_path: Path) -> None:
    assert load().expert_alignment == DispatcherConfig().expert_alignment
    assert load({"expert_alignment": 2}).expert_alignment == 2
    text = "expert_alignment: 3\n"
    assert load({"expert_alignment": 2}, text, tmp_path).expert_alignment == 3
    assert load({"expert_alignment": 2}, text, tmp_path, DEEPEP_MOE_EXPERT_ALIGNMENT="4").expert_alignment == 4
    mixed = load({"num_sms": 8}, "fp8_dispatch: true\n", tmp_path, DEEPEP_MOE_BACKEND="collective")
    assert mixed == DispatcherConfig(num_sms=8, fp8_dispatch=True, backend="collective")


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("timeout_seconds: 5\n")
    assert load(DEEPEP_MOE_CONFIG=str(path)).timeout_seconds == 5.0
    with pytest.raises(ConfigError, match="cannot read settings file"):
        load(DEEPEP_MOE_CONFIG=str(tmp_path / "missing.yaml"))


def test_a_variable_with_empty_text_is_not_set(tmp_path: Path) -> None:
    env = {"DEEPEP_MOE_BACKEND": "", "DEEPEP_MOE_NUM_SMS": " ", "DEEPEP_MOE_CONFIG": ""}
    assert load({"num_sms": 8}, **env) == DispatcherConfig(num_sms=8)
    with pytest.raises(ConfigError, match=r"unknown setting 'bakend' from environment variable DEEPEP_MOE_BAKEND"):
        load(DEEPEP_MOE_BAKEND="")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load(None, "# nothing\n", tmp_path) == DispatcherConfig()


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_a_file_must_hold_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="allowed is a mapping"):
        load(None, text, tmp_path)


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("NUM_SMS", "16", 16),
        ("CAPACITY_FACTOR", "1.25", 1.25),
        ("CHECK_AGREEMENT", "off", False),
        ("FP8_DISPATCH", "TRUE", True),
        ("DEBUG_WAITS", "1", True),
        ("BACKEND", "nvlink", "nvlink"),
    ],
)
def test_text_of_variables_is_converted(variable: str, text: str, expected: object) -> None:
    assert getattr(load(**{f"DEEPEP_MOE_{variable}": text}), variable.lower()) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "nccl"),
        ("backend", 3),
        ("expert_alignment", 0),
        ("expert_alignment", 1.5),
        ("expert_alignment", True),
        ("num_sms", -1),
        ("num_sms", "many"),
        ("max_tokens_per_rank", -5),
        ("fp8_dispatch", "perhaps"),
        ("fp8_dispatch", 1),
        ("capacity_factor", -0.5),
        ("capacity_factor", float("nan")),
        ("num_chunks", 0),
        ("timeout_seconds", 0),
        ("timeout_seconds", float("inf")),
        ("check_agreement", None),
        ("timeout_seconds", 1e15),
        ("timeout_seconds", 1e-4),
        ("timeout_seconds", 10**400),
        ("capacity_factor", 1e308),
        ("expert_alignment", 2**62),
        ("max_tokens_per_rank", 2**31),
        ("num_chunks", 2**40),
        ("num_sms", 2**31),
    ],
)
def test_impossible_values_name_key_value_source_and_what_is_allowed(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as raised:
        load({key: value})
    for part in (key, repr(value), "from overrides", _RULES[key][1]):
        assert part in str(raised.value)
    with pytest.raises(ConfigError, match=f"{key} = .* from argument"):
        DispatcherConfig(**{key: value})


def test_a_file_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes("num_sms: 4  # für\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot read settings file .*settings\.yaml.*utf-8"):
        DispatcherConfig.load(yaml_path=path, env={})


def test_values_that_python_itself_stumbles_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_rank = a number of thousands of digits"):
        DispatcherConfig(max_tokens_per_rank=10**5000)
    path = tmp_path / "settings.yaml"
    path.write_text("num_sms: 2020-99-99\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot read settings file .*month"):
        DispatcherConfig.load(yaml_path=path, env={})
    with pytest.raises(ConfigError, match="null byte"):
        DispatcherConfig.load(yaml_path="a\0b", env={})


def test_the_settings_that_ranks_share() -> None:
    shared = DispatcherConfig(capacity_factor=2.0).shared()
    assert shared["capacity_factor"] == 2.0
    assert {"timeout_seconds", "num_sms", "debug_waits", "backend"}.isdisjoint(shared)


def test_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_sms = 'x' from environment variable DEEPEP_MOE_NUM_SMS"):
        load(DEEPEP_MOE_NUM_SMS="x")
    with pytest.raises(ConfigError, match=r"num_sms = -2 from .*settings\.yaml"):
        load(None, "num_sms: -2\n", tmp_path)


def test_the_source_of_overrides_is_named() -> None:
    with pytest.raises(ConfigError, match="num_sms = -2 from section dispatcher: allowed is"):
        DispatcherConfig.load({"num_sms": -2}, source="section dispatcher", env={})
    with pytest.raises(ConfigError, match=r"unknown setting 'num_smss' from section dispatcher \(did you mean num_sms"):
        DispatcherConfig.load({"num_smss": 2}, source="section dispatcher", env={})


def test_unknown_keys_are_errors_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'expert_alignement' from overrides .*expert_alignment\?"):
        load({"expert_alignement": 4})
    with pytest.raises(ConfigError, match=r"'sms' from environment variable DEEPEP_MOE_SMS"):
        load(DEEPEP_MOE_SMS="4")
    with pytest.raises(ConfigError, match=r"'banana' from .*settings\.yaml.*allowed: backend"):
        load(None, "banana: 1\n", tmp_path)


def test_variables_of_the_build_are_no_settings() -> None:
    assert load(DEEPEP_MOE_CUDA="0", DEEPEP_MOE_PYTHON="python3", HOME="x") == DispatcherConfig()


def test_every_field_has_a_rule() -> None:
    assert [f.name for f in fields(DispatcherConfig)] == list(_RULES)


def test_config_errors_are_value_errors_of_this_library() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, DeepEPMoEError)


def test_kernel_tuning_is_validated() -> None:
    assert Config() == Config(20, 6, 256, 6, 256)
    with pytest.raises(ConfigError, match="num_sms = 0"):
        Config(0)
    with pytest.raises(ConfigError, match=r"num_max_nvl_chunked_send_tokens = 300.*at most"):
        Config(20, 300, 256)


def test_size_hints_grow_with_what_they_hold() -> None:
    config = Config()
    base = config.get_nvl_buffer_size_hint(7168 * 2, 4)
    assert base >= 4 * 256 * 7168 * 2  # at least the rows of all peers
    assert config.get_nvl_buffer_size_hint(7168 * 4, 4) > base
    assert config.get_nvl_buffer_size_hint(7168 * 2, 8) > base
    assert Config(40).get_nvl_buffer_size_hint(7168 * 2, 4) > base
    assert config.get_rdma_buffer_size_hint(7168 * 2, 8) == 0  # one node
    assert config.get_rdma_buffer_size_hint(7168 * 2, 16) > 0
    for hint in (config.get_nvl_buffer_size_hint, config.get_rdma_buffer_size_hint):
        with pytest.raises(ConfigError, match="hidden_bytes = 0"):
            hint(0, 4)
        with pytest.raises(ConfigError, match="num_ranks = 0"):
            hint(16, 0)
        for wrong in (1e3, "16", None, True):
            with pytest.raises(ConfigError, match=f"hidden_bytes = {wrong!r}: allowed is an integer >= 1"):
                hint(wrong, 4)  # type: ignore[arg-type]


def test_buffer_tuning_follows_the_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)
    monkeypatch.setattr(Buffer, "_num_sms_chosen", False)
    Buffer.set_num_sms(24)
    assert Buffer.get_dispatch_config(3).num_sms == Buffer.get_combine_config(48).num_sms == 24
    for wrong in (0, 7, -2, None, 24.0):
        with pytest.raises(ConfigError, match=f"num_sms = {wrong}"):
            Buffer.set_num_sms(wrong)  # type: ignore[arg-type]
    for wrong in (0, None, 2.5):
        with pytest.raises(ValueError, match=f"num_ranks = {wrong}"):
            Buffer.get_dispatch_config(wrong)  # type: ignore[arg-type]


def test_low_latency_size_hint_holds_what_is_sent_and_received() -> None:
    hint = Buffer.get_low_latency_rdma_size_hint
    # rows of a dispatch and of a combine in both halves, received from all ranks and sent to the others
    rows = 2 * 2 * 128 * 7168 * 2
    assert rows * 15 <= hint(128, 7168, 8, 256) <= 1.2 * rows * 16
    assert hint(1, 8, 1, 1) < 1 << 20
    with pytest.raises(ValueError, match="num_experts = 10: must be a positive multiple of the group's 8 ranks"):
        hint(128, 7168, 8, 10)
    for wrong in (128.5, "128", None):
        with pytest.raises(ValueError, match=f"num_max_dispatch_tokens_per_rank = {wrong!r}: must be an integer"):
            hint(wrong, 7168, 8, 256)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden = 0"):
        hint(128, 0, 8, 256)


LIMITS: list[tuple[str, float, float]] = [  # smallest and largest value
    ("expert_alignment", 1, 2**16),
    ("num_sms", 0, 2**31 - 1),
    ("max_tokens_per_rank", 0, 2**31 - 1),
    ("capacity_factor", 0.0, 1e6),
    ("num_chunks", 1, 2**16),
    ("rail_chunk_bytes", 0, 2**31 - 1),
    ("ranks_per_node", 0, 2**31 - 1),
    ("timeout_seconds", 1e-3, 1e6),
]


@pytest.mark.parametrize(("key", "smallest", "largest"), LIMITS)
def test_limits_belong_to_the_allowed_values(key: str, smallest: float, largest: float) -> None:
    for value in (smallest, largest):
        assert getattr(DispatcherConfig(**{key: value}), key) == value
    step = 1 if isinstance(smallest, int) else 1e-4
    for value in (smallest - step, largest + step):
        with pytest.raises(ConfigError, match=f"{key} = "):
            DispatcherConfig(**{key: value})


@pytest.mark.parametrize("value", [True, False])
def test_every_spelling_of_a_boolean(value: bool) -> None:
    for text in ("1", "true", "yes", "on") if value else ("0", "false", "no", "off"):
        for spelling in (text, text.upper(), f" {text} "):
            assert load(DEEPEP_MOE_DEBUG_WAITS=spelling).debug_waits is value
            assert load(DEEPEP_MOE_CHECK_AGREEMENT=spelling).check_agreement is value


def test_size_hints_reserve_what_a_node_and_its_rows_need() -> None:
    config = Config(2, 1, 1, 1, 1)  # one channel, one token in flight
    assert config.get_rdma_buffer_size_hint(1, 8) == 0
    assert config.get_rdma_buffer_size_hint(1, 9) > 0
    # Of one peer: the row, a scale per 128 bytes, 128 indices and weights.
    assert config.get_nvl_buffer_size_hint(256, 1) >= 256 + 2 * 4 + 128 * (8 + 4)
    per_peer = config.get_nvl_buffer_size_hint(2**20, 1)
    assert 7.9 * per_peer < config.get_nvl_buffer_size_hint(2**20, 8) < 8.1 * per_peer
    assert config.get_nvl_buffer_size_hint(2**20, 16) < 8.1 * per_peer  # peers of one node only
