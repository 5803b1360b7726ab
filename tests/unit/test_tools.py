"""``python -m deepep_moe``: the doctor's verdicts, and the list of tools. Which GPUs the extension serves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deepep_moe
from deepep_moe import Buffer, __version__, extension
from deepep_moe.tools import doctor
from tests.launch import ROOT, torchrun


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepep_moe", *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_help_and_version_do_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    for arguments, shown in (
        ((), "doctor "),
        (("--help",), "doctor "),
        (("--version",), f"deepep_moe {__version__}\n"),
    ):
        result = tool(*arguments, PYTHONPATH=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert shown in result.stdout
    assert "torch was imported" in tool("doctor", PYTHONPATH=str(tmp_path)).stderr  # the trap works


def test_a_wrong_name_is_an_error() -> None:
    wrong = tool("docter")
    assert wrong.returncode == 2
    assert "no tool 'docter'; there is doctor, nvshmem\n" in wrong.stderr
    moved = tool("bench", "ops")
    assert moved.returncode == 2
    assert "python -m benchmarks --help" in moved.stderr


def test_the_self_test_of_nvshmem_says_why_it_cannot_run() -> None:
    result = tool("nvshmem", "--timeout", "20")
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("expected: one node\nfailed: rank 0: ")
    result = tool("nvshmem", "--timeout", "0")
    assert result.returncode == 2
    assert "timeout_seconds = 0.0 from argument: allowed is a number from 0.001" in result.stderr


def test_every_public_name_is_imported_on_first_use() -> None:
    for name in deepep_moe.__all__:
        assert getattr(deepep_moe, name) is getattr(deepep_moe, name)
        assert name in dir(deepep_moe)
    with pytest.raises(AttributeError, match="module 'deepep_moe' has no attribute 'Bufer'"):
        deepep_moe.Bufer  # noqa: B018
    code = "import deepep_moe, sys; assert 'torch' not in sys.modules; deepep_moe.errors.InputError; deepep_moe.Buffer"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_doctor_names_the_backend_and_checks_a_round_trip() -> None:
    result = tool("doctor", COLUMNS="40", NCCL_DEBUG="WARN")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\033" not in result.stdout  # no colours in a pipe, and no finding is broken into lines
    lines = [re.split(r" {2,}", line, maxsplit=2) for line in result.stdout.splitlines()]
    found = {subject: (state, text) for state, subject, text in lines}
    assert found["backend"][1].startswith("collective (gloo, cpu): nvlink needs CUDA tensors")
    assert found["ranks"] == ("ok", "1, started without torchrun")
    assert "NCCL_DEBUG=WARN" in found["environment"][1]
    assert found["round trip"][1].startswith("dispatch and combine of 64 tokens, largest error ")
    assert {state for state, _, _ in lines} <= {"ok", "note"}


def test_doctor_looks_at_the_group_of_all_ranks() -> None:
    run = torchrun(2, "-m", "deepep_moe", "doctor", "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    report = json.loads(run.stdout[run.stdout.index("{\n") : run.stdout.rindex("\n}") + 2])
    found = {finding["subject"]: finding["text"] for finding in report["findings"]}
    assert (report["state"], report["deepep_moe"], report["torch"]) == ("ok", __version__, torch.__version__)
    assert found["ranks"] == "2, started by torchrun; all find the same"
    assert found["backend"].startswith("collective (gloo, cpu)")
    assert found["nodes"].endswith("ranks 0, 1")


def test_doctor_json_is_all_there_is_on_stdout() -> None:
    result = tool("doctor", "--json", DEEPEP_MOE_BACKEND="nvlink")
    report = json.loads(result.stdout)
    assert (result.returncode, report["state"]) == (1, "wrong")
    wrong = [finding for finding in report["findings"] if finding["state"] == "wrong"]
    assert [finding["subject"] for finding in wrong] == ["backend"]
    assert "backend nvlink cannot run here" in wrong[0]["text"]


def test_doctor_fails_on_settings_that_cannot_work() -> None:
    result = tool("doctor", DEEPEP_MOE_NUM_SMS="many")
    assert result.returncode == 1
    assert re.search(r"^wrong +settings +.*DEEPEP_MOE_NUM_SMS", result.stdout, re.MULTILINE)
    assert tool("doctor", "--jsn").returncode == 2


def test_doctor_tells_where_ranks_differ() -> None:
    same, old = doctor.Finding("ok", "deepep_moe", "0.1.0"), doctor.Finding("ok", "torch", "2.11.0")
    bad = doctor.Finding("wrong", "settings", "DEEPEP_MOE_NUM_SMS = many")
    mine = [same, doctor.Finding("ok", "torch", "2.13.0")]
    world = SimpleNamespace(size=4, gather=lambda value: [value, [same, old], value, [same, old, bad]])
    ranks, *different = doctor.compare_ranks(world, mine)  # type: ignore[arg-type]
    assert ranks.text.endswith("2 findings differ from those of rank 0")
    assert different == [
        ("note", "rank 1, 3", "torch: 2.11.0"),
        ("wrong", "rank 3", "settings: DEEPEP_MOE_NUM_SMS = many"),
    ]


def test_doctor_wraps_and_colours_on_a_terminal() -> None:
    text = doctor.as_text([doctor.Finding("note", "GPUs", "none of them " * 5)], columns=40, colour=True)
    assert text.startswith("\033[33mnote \033[0m  GPUs  none of them none of")
    assert all(line.startswith(" " * 13) for line in text.splitlines()[1:])


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


def test_an_extension_that_cannot_be_loaded_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_missing", "the CUDA extension cannot be loaded: libcuda.so.1")
    for built, state in ((True, doctor.BAD), (False, doctor.NOTE)):
        monkeypatch.setattr(extension, "BUILT", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        (finding,) = doctor.look_at_extension()
        assert (finding.state, finding.subject) == (state, "extension")
        assert "libcuda.so.1; without it backend nvlink is off" in finding.text


def test_without_the_extension_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_missing", "it was not built")
    extension.why_not_on.cache_clear()
    assert extension.why_not_on(torch.device("cuda", 0)) == "it was not built"
    extension.why_not_on.cache_clear()
    assert "it was not built" in doctor.look_at_extension()[0].text
