"""The plan kernels of csrc/nodes without a GPU, compiled for the CPU (cuda.h), under the hierarchical backend."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulation import kernels
from tests.emulation.test_low_latency import HERE, cuda_headers, for_the_cpu
from tests.launch import ROOT, all_cases, check_case

CASES = "tests.distributed.cases_nodes_kernels"
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs the headers of a CUDA toolkit, g++ and x86-64")
    folder = tmp_path_factory.mktemp("emulation")
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copy(HERE / "ptx.cuh", csrc / "device" / "ptx.cuh")
    for header in csrc.rglob("*.cuh"):
        header.write_text(for_the_cpu(header.read_text()))
    units = [HERE / "cuda.cpp", HERE / "nodes.cpp"]
    for name in ("plan", "parts"):
        units.append(folder / f"{name}.cpp")
        units[-1].write_text('#include "cuda.h"\n' + for_the_cpu((csrc / "nodes" / f"{name}.cu").read_text()))
    options = [
        "-std=c++20",
        "-O1",
        "-fno-strict-aliasing",
        "-w",
        "-fPIC",
        "-shared",
        f"-I{HERE}",
        f"-I{csrc}",
        "-isystem",
        str(headers),
    ]
    target = folder / "libnodes.so"
    done = subprocess.run(
        [compiler, *options, *map(str, units), "-lpthread", "-o", str(target)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(2, 4)))
def test_plans_over_nodes(library: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, name: str) -> None:
    monkeypatch.setenv(kernels.LIBRARY, str(library))
    check_case(CASES, ranks, name)
