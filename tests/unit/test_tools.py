"""``python -m deepep_moe``: the doctor's verdicts, and the list of tools."""

from __future__ import annotations

import os
import subprocess
import sys

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
