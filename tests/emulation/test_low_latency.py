"""The low-latency kernels without a GPU: csrc/latency and csrc/nvshmem/latency.cu, compiled for the CPU.

A stand-in for CUDA (cuda.h) runs all threads of all ranks as fibers, in an order that a seed determines, and a stand-in
for NVSHMEM (nvshmem.h) delivers puts late, out of order and word by word, as a network may. low_latency.cpp makes calls
over several nodes and on one domain, with hooks, refusals, masks and a lost rank, and compares them with a reference
that needs no kernels (reference.h). This cannot show what depends on weak memory order, nor speed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT

HERE = Path(__file__).parent
KERNELS = ("latency/dispatch", "latency/combine", "latency/control", "latency/refuse", "nvshmem/latency")
HOST = ("latency/engine.cpp", "runtime/domain.cpp", "runtime/give_up.cu")
SEEDS = int(os.environ.get("EMULATION_SEEDS", "2"))
LIMIT_SECONDS = 240


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next(
        (Path(home) / "include" for home in homes if home and (Path(home) / "include/cuda_bf16.h").exists()), None
    )


def for_the_cpu(source: str) -> str:
    """CUDA C++ without launches and shared memory, which are no C++."""
    launch = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?), ([^;]*?), 0, stream>>>\(([^;]*)\);")
    source = launch.sub(r"emulation::launch(\2, \3, [=] { \1(\4); });", source)

    def of_the_block(found: re.Match[str]) -> str:
        variables = re.findall(r"(\w+)(\[[^\]]+\])?", found[2])
        return " ".join(
            f"static char {name}_key; auto& {name} = emulation::shared<{found[1]}{size}>(&{name}_key);"
            for name, size in variables
        )

    name = r"\w+(?:\[[^\]]+\])?"
    source = re.sub(rf"__shared__ ((?:unsigned |long )?[\w ]+?(?:<\w+>)?) ({name}(?:, {name})*);", of_the_block, source)
    assert "__shared__" not in re.sub(r"//.*", "", source), source
    return source


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers, compiler = cuda_headers(), shutil.which(os.environ.get("CXX", "g++"))
    if headers is None or compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs the headers of a CUDA toolkit, a C++20 compiler and x86-64")
    folder = tmp_path_factory.mktemp("emulation")
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copy(HERE / "ptx.cuh", csrc / "device" / "ptx.cuh")
    for header in csrc.rglob("*.cuh"):
        header.write_text(for_the_cpu(header.read_text()))
    sources = [csrc / name for name in HOST]
    for kernel in KERNELS:
        sources.append(csrc / f"{kernel}.cu")
    units = []
    for source in sources:
        unit = source.with_suffix(".emulated.cpp")
        unit.write_text('#include "cuda.h"\n' + for_the_cpu(source.read_text()))
        units.append(unit)
    units += [HERE / name for name in ("cuda.cpp", "network.cpp", "low_latency.cpp")]
    options = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", f"-I{HERE}", f"-I{csrc}", "-isystem", str(headers)]
    running = [
        subprocess.Popen([compiler, *options, "-c", str(unit), "-o", f"{folder / unit.name}.o"], stderr=subprocess.PIPE)
        for unit in units
    ]
    for unit, compiling in zip(units, running):
        _, errors = compiling.communicate(timeout=LIMIT_SECONDS)
        assert compiling.returncode == 0, f"{unit}: {errors.decode()}"
    target = folder / "low_latency"
    objects = [f"{folder / unit.name}.o" for unit in units]
    subprocess.run([compiler, *objects, "-lpthread", "-o", str(target)], check=True, timeout=LIMIT_SECONDS)
    return target


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (3, 1), (4, 2), (6, 3)])
def test_calls_return_what_the_reference_does(program: Path, ranks: int, per_node: int, seed: int) -> None:
    done = run(program, ranks, per_node, seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("fault", "engine"), [(1, "one domain"), (2, "nodes")])
def test_a_fault_of_the_machine_is_noticed(program: Path, fault: int, engine: str, seed: int) -> None:
    """Packets that arrive in halves, signals before their data: the order of events is hard enough to show either."""
    done = run(program, 4, 2, seed, fault)
    assert done.returncode == 1
    assert re.search(rf"rank \d, ({engine}: wrong|line \d+:)", done.stderr), done.stderr
