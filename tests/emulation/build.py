"""Compiles kernels for the CPU: what every test here starts with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT

HERE = Path(__file__).parent
SEEDS = int(os.environ.get("EMULATION_SEEDS", "1"))
LIMIT_SECONDS = 240


def _cuda_headers() -> Path | None:
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
        variables = [re.fullmatch(r"(\w+)(.*)", one) for one in found[2].split(", ")]
        return " ".join(
            f"static char {one[1]}_key; auto& {one[1]} = emulation::shared<{found[1]}{one[2]}>(&{one[1]}_key);"
            for one in variables
            if one is not None
        )

    variable = r"\w+(?:\[[^\]]+\])?"
    source = re.sub(rf"__shared__ ([\w<> ]+?) ({variable}(?:, {variable})*);", of_the_block, source)
    assert "__shared__" not in re.sub(r"//.*", "", source), source
    return source


def build(folder: Path, sources: Sequence[str], programs: Sequence[str], target: str, wide: bool = False) -> Path:
    """Compile ``sources`` of csrc and ``programs`` of this folder. Skips the test where a compiler or CUDA is missing.

    Args:
        folder: an empty folder for the results.
        sources: names of .cu and .cpp files below csrc.
        programs: names of .cpp files of this folder.
        target: name of the executable, or of a library that ends with .so.
        wide: compile for more ranks (csrc/runtime/ranks.h).

    Returns:
        The path of the target.
    """
    headers, compiler = _cuda_headers(), shutil.which(os.environ.get("CXX", "g++"))
    if headers is None or compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs the headers of a CUDA toolkit, a C++20 compiler and x86-64")
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copy(HERE / "ptx.cuh", csrc / "device" / "ptx.cuh")
    for header in csrc.rglob("*.cuh"):
        header.write_text(for_the_cpu(header.read_text()))
    units = [HERE / name for name in ("cuda.cpp", *programs)]
    for name in sources:
        unit = (csrc / name).with_suffix(".emulated.cpp")
        unit.write_text('#include "cuda.h"\n' + for_the_cpu((csrc / name).read_text()))
        units.append(unit)
    options = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-fPIC", "-w", *(["-DDEEPEP_MOE_WIDE"] if wide else [])]
    # A misaligned address, an index outside of an array, or a shift by too much ends the program (SIGILL).
    options += ["-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error"]
    paths = [f"-I{HERE}", f"-I{csrc}", "-isystem", str(headers)]
    objects = [str(folder / f"{number}.o") for number in range(len(units))]
    running = [
        subprocess.Popen([compiler, *options, *paths, "-c", str(unit), "-o", made], stderr=subprocess.PIPE)
        for unit, made in zip(units, objects)
    ]
    for unit, compiling in zip(units, running):
        _, errors = compiling.communicate(timeout=LIMIT_SECONDS)
        assert compiling.returncode == 0, f"{unit}: {errors.decode()}"
    shared = ["-shared"] if target.endswith(".so") else []
    subprocess.run([compiler, *shared, *objects, "-o", str(folder / target)], check=True, timeout=LIMIT_SECONDS)
    return folder / target


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    """Run an executable that :func:`build` made."""
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
