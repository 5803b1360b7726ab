"""setup.py: what it finds, what it says, and that it works without a CUDA toolkit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT

NO_TOOLKIT = {"CUDA_HOME": "/nonexistent"}


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    names = ("TORCH_CUDA_ARCH_LIST", "NVSHMEM_DIR", "DISABLE_SM90_FEATURES", "DISABLE_AGGRESSIVE_PTX_INSTRS")
    env = {name: value for name, value in os.environ.items() if name not in (*names, "DEEPEP_MOE_CUDA")}
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=280)


def test_without_toolkit_the_extension_is_left_out(tmp_path: Path) -> None:
    result = build(tmp_path, **NO_TOOLKIT)
    assert result.returncode == 0, result.stderr
    assert "not built: no CUDA toolkit found" in result.stdout
    assert not list(tmp_path.rglob("_C*"))


def test_the_extension_can_be_required_and_refused(tmp_path: Path) -> None:
    required = build(tmp_path, DEEPEP_MOE_CUDA="1", **NO_TOOLKIT)
    assert required.returncode != 0
    assert "DEEPEP_MOE_CUDA=1, but the extension cannot be built: no CUDA toolkit found" in required.stderr

    refused = build(tmp_path, DEEPEP_MOE_CUDA="0")
    assert refused.returncode == 0
    assert "not built: DEEPEP_MOE_CUDA=0" in refused.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DEEPEP_MOE_CUDA": "maybe"}, "DEEPEP_MOE_CUDA=maybe: use 0 or 1"),
        ({"NVSHMEM_DIR": "/nonexistent"}, "NVSHMEM_DIR=/nonexistent: no include directory there"),
    ],
)
def test_impossible_variables_are_named(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    result = build(tmp_path, **NO_TOOLKIT, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_nvshmem_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "nvshmem/include").mkdir(parents=True)
    result = build(tmp_path, NVSHMEM_DIR=str(tmp_path / "nvshmem"), **NO_TOOLKIT)
    assert f"found by NVSHMEM_DIR: {tmp_path / 'nvshmem'}" in result.stdout


def test_integrations_are_importable_as_installed() -> None:
    """The tree's integrations/ is deepep_moe.integrations, also from another directory and in an editable install."""
    code = "import deepep_moe.integrations as i; print(i.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parts[-2:] in (("integrations", "__init__.py"),)
