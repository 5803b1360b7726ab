"""``python -m deepep_moe``: the doctor's verdicts, and the list of tools. Which GPUs the extension serves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from deepep_moe import Buffer, extension
from deepep_moe.tools import doctor
from tests.launch import ROOT, torchrun


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepep_moe", *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_help_lists_tools_and_a_wrong_name_is_an_error() -> None:
    assert "doctor" in tool().stdout
    wrong = tool("docter")
    assert wrong.returncode != 0
    assert "no tool 'docter'" in wrong.stderr


def test_doctor_names_the_backend_and_checks_a_round_trip() -> None:
    result = tool("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "collective (1 rank(s), gloo, cpu): nvlink needs CUDA tensors" in result.stdout
    assert "dispatch and combine of 64 tokens" in result.stdout
    assert "wrong" not in result.stdout


def test_doctor_looks_at_the_group_of_all_ranks() -> None:
    output = torchrun(2, "-m", "deepep_moe", "doctor", env={"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}).stdout
    assert output.count("collective (2 rank(s), gloo, cpu)") == 1


def test_doctor_fails_on_settings_that_cannot_work() -> None:
    result = tool("doctor", DEEPEP_MOE_BACKEND="nvlink")
    assert result.returncode == 1
    assert "backend nvlink cannot run here" in result.stdout

    result = tool("doctor", DEEPEP_MOE_NUM_SMS="many")
    assert result.returncode == 1
    assert "DEEPEP_MOE_NUM_SMS" in result.stdout


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not_run"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0", [(9, 0)], [(8, 9), (10, 0)]),
        ("9.0a", [(9, 0)], [(10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("9.0+PTX", [(9, 0), (10, 0), (12, 0)], [(8, 0)]),
        ("10.0", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_what_an_architecture_runs_on(
    architecture: str, runs: list[tuple[int, int]], does_not_run: list[tuple[int, int]]
) -> None:
    assert all(extension.runs_on(architecture, capability) for capability in runs)
    assert not any(extension.runs_on(architecture, capability) for capability in does_not_run)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A build for sm_80 and sm_90 beside an H100 and an RTX 5090."""
    monkeypatch.setattr(extension, "why_missing", None)
    monkeypatch.setattr(extension, "ARCHITECTURES", ("8.0", "9.0"))
    monkeypatch.setattr(extension, "_C", SimpleNamespace(__file__="_C.so"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (12, 0)][device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["H100", "RTX 5090"][device.index])
    extension.why_not_on.cache_clear()
    yield
    extension.why_not_on.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_without_code_is_named() -> None:
    assert extension.why_not_on(torch.device("cuda", 0)) is None
    assert extension.why_not_on(torch.device("cuda", 1)) == (
        "RTX 5090 (cuda:1) has compute capability 12.0, and the CUDA extension was built for 8.0, 9.0: "
        "build it on this machine, or with TORCH_CUDA_ARCH_LIST=12.0"
    )
    assert "needs a CUDA device, not cpu" in str(extension.why_not_on(torch.device("cpu")))

    built, unserved = doctor.look_at_extension()
    assert (built.state, built.text) == (doctor.GOOD, "built for 8.0, 9.0, _C.so")
    assert (unserved.state, unserved.subject) == (doctor.BAD, "GPU 1")
    assert "capability 12.0" in unserved.text


@pytest.mark.parametrize(
    ("architectures", "sm90"), [((), False), (("8.0", "8.6+PTX"), False), (("8.0", "9.0"), True), (("10.0a",), True)]
)
def test_whether_there_is_code_for_sm90(
    architectures: tuple[str, ...], sm90: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "ARCHITECTURES", architectures)
    assert Buffer.is_sm90_compiled() is sm90


def test_without_the_extension_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_missing", "it was not built")
    extension.why_not_on.cache_clear()
    assert extension.why_not_on(torch.device("cuda", 0)) == "it was not built"
    extension.why_not_on.cache_clear()
    assert "it was not built" in doctor.look_at_extension()[0].text
