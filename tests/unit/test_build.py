"""setup.py: what it finds, what it says, that it works without a CUDA toolkit, and how it links."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

from tests.launch import ROOT

NO_TOOLKIT = {"CUDA_HOME": "/nonexistent"}


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepep_moe_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
NVCC_13 = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"]
NVCC_12_4 = ["5.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0"]


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
    assert "DEEPEP_MOE_CUDA=1, but the CUDA extension cannot be built: no CUDA toolkit found" in required.stderr

    refused = build(tmp_path, DEEPEP_MOE_CUDA="0")
    assert refused.returncode == 0
    assert "not built: DEEPEP_MOE_CUDA=0" in refused.stdout


def test_a_build_that_has_nvcc_fails_without_what_else_it_needs(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel without kernels on a machine that could compile them would be noticed at the first slow training run."""
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert (
        f"nvcc is in {machine}, but the CUDA extension cannot be built: no host compiler (no-such-compiler; set CXX); "
        "to install without the extension, set DEEPEP_MOE_CUDA=0"
    ) in result.stderr
    assert build(tmp_path, CXX="no-such-compiler", DEEPEP_MOE_CUDA="0").returncode == 0

    monkeypatch.setattr(SETUP, "package_directory", lambda name: None)
    assert "pybind11 is not installed" in SETUP.Toolchain().failure()
    program(machine / "bin/nvidia-smi", "echo 7.0")
    assert "compiles for none of the GPUs found: 7.0" in SETUP.Toolchain().failure()
    monkeypatch.setenv("DEEPEP_MOE_CUDA", "0")
    assert SETUP.Toolchain().failure() == ""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DEEPEP_MOE_CUDA": "maybe"}, "DEEPEP_MOE_CUDA=maybe: use 0 or 1"),
        ({"NVSHMEM_DIR": "/nonexistent"}, "NVSHMEM_DIR=/nonexistent: no include directory there"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "TORCH_CUDA_ARCH_LIST=8.0;Hopper: 'Hopper' is not like 8.0, 9.0"),
    ],
)
def test_impossible_variables_are_named(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    result = build(tmp_path, **NO_TOOLKIT, **environment)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize(
    ("gpus", "nvcc", "archs"),
    [
        ([], NVCC_13, ["8.0", "9.0", "10.0+PTX"]),
        ([], NVCC_12_4, ["8.0", "9.0+PTX"]),
        (["9.0"], NVCC_13, ["9.0"]),
        (["8.0", "12.0"], NVCC_13, ["8.0", "12.0"]),
        (["10.0"], NVCC_12_4, ["9.0+PTX"]),  # newer than nvcc: the driver compiles the PTX
        (["8.0", "10.0"], NVCC_12_4, ["8.0", "9.0+PTX"]),
        (["9.0", "10.0"], NVCC_12_4, ["9.0+PTX"]),
        (["7.0"], NVCC_13, []),  # older than all that nvcc knows
    ],
)
def test_default_architectures(gpus: list[str], nvcc: list[str], archs: list[str]) -> None:
    assert SETUP.default_archs(gpus, nvcc) == archs


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a CUDA toolkit and two kinds of GPU, as far as setup.py asks."""
    archs = "".join(f"compute_{arch.replace('.', '')}\n" for arch in NVCC_13)
    program(tmp_path / "bin/nvcc", f"echo '{archs}'")
    program(tmp_path / "bin/nvidia-smi", "printf '9.0\\n8.0\\n9.0\\n'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    names = ("TORCH_CUDA_ARCH_LIST", "DISABLE_SM90_FEATURES", "DEEPEP_MOE_CUDA", "NVSHMEM_DIR")
    for name in (*names, "DEEPEP_MOE_NVSHMEM", "DEEPEP_MOE_DELAY_PUTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_nvshmem_is_a_module_of_its_own_where_it_is_found(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = machine / "nvshmem"
    (home / "include").mkdir(parents=True)
    monkeypatch.setenv("NVSHMEM_DIR", str(home))
    toolchain = SETUP.Toolchain()
    assert [module.name for module in toolchain.modules()] == ["deepep_moe._C"]
    assert f"no libnvshmem_device.a with libnvshmem_host.so.3 in {home}/lib" in toolchain.summary([])
    (home / "lib").mkdir()
    for library in ("libnvshmem_device.a", "libnvshmem_host.so.3"):
        (home / "lib" / library).touch()
    toolchain = SETUP.Toolchain()
    base, module = toolchain.modules()
    assert f"{home} (NVSHMEM_DIR)" in toolchain.summary([base, module])
    assert (base.name, base.device_link) == ("deepep_moe._C", False)
    assert (module.name, module.device_link) == ("deepep_moe._nvshmem", True)
    assert not [source for source in base.sources if "nvshmem" in source]
    assert module.sources and all(source.startswith("csrc/nvshmem/") for source in module.sources)
    assert not {str(home / "include"), "-rdc=true"} & set(toolchain.compile(base, Path("csrc/x.cu")))
    assert {str(home / "include"), "-rdc=true"} <= set(toolchain.compile(module, Path("csrc/nvshmem/rail.cu")))
    assert "-DDEEPEP_MOE_DELAY_PUTS" not in toolchain.compile(module, Path("csrc/nvshmem/rail.cu"))
    twice = [str(source.relative_to(SETUP.CSRC)) for one in (base, module) for source, wide in one.units() if wide]
    assert sorted(twice) == [
        *(f"latency/{name}" for name in ("bindings.cpp", "combine.cu", "control.cu", "dispatch.cu", "engine.cpp")),
        "latency/refuse.cu",
        *(f"nvshmem/latency{name}" for name in (".cu", "_bindings.cpp")),
        *(f"runtime/{name}" for name in ("bindings.cpp", "domain.cpp", "give_up.cu")),
    ]
    for one in (base, module):
        assert [source for source, wide in one.units() if not wide] == [SETUP.ROOT / source for source in one.sources]
    assert "-DDEEPEP_MOE_WIDE" in toolchain.compile(base, Path("csrc/x.cu"), wide=True)
    assert "-DDEEPEP_MOE_WIDE" not in toolchain.compile(base, Path("csrc/x.cu"))

    monkeypatch.setenv("DEEPEP_MOE_DELAY_PUTS", "1")
    delayed = SETUP.Toolchain()
    assert "DEBUG BUILD" in delayed.summary([])
    assert "-DDEEPEP_MOE_DELAY_PUTS" in delayed.compile(delayed.modules()[1], Path("csrc/nvshmem/rail.cu"))
    assert "-DDEEPEP_MOE_DELAY_PUTS" not in delayed.compile(delayed.modules()[0], Path("csrc/x.cu"))

    monkeypatch.setenv("DEEPEP_MOE_NVSHMEM", "0")
    assert [module.name for module in SETUP.Toolchain().modules()] == ["deepep_moe._C"]
    monkeypatch.setenv("DEEPEP_MOE_NVSHMEM", "1")
    (home / "lib/libnvshmem_device.a").unlink()
    required = SETUP.Toolchain().failure()
    assert required.startswith("DEEPEP_MOE_NVSHMEM=1, but _nvshmem cannot be built: no libnvshmem_device.a")


def test_nvshmem_is_found_from_an_isolated_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip hides installed packages from a build; the wheel is in the folder of this Python's packages all the same."""
    monkeypatch.delenv("NVSHMEM_DIR", raising=False)
    monkeypatch.setattr(SETUP, "package_directory", lambda name: None)
    monkeypatch.setattr(SETUP.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    assert SETUP.find_nvshmem() == (None, "")
    (tmp_path / "nvidia/nvshmem").mkdir(parents=True)
    assert SETUP.find_nvshmem() == (tmp_path / "nvidia/nvshmem", "nvidia-nvshmem wheel")


def test_architectures_are_those_of_the_gpus_unless_the_caller_says_otherwise(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SETUP.Toolchain().archs == ["8.0", "9.0"]
    assert "8.0;9.0 (GPUs found: 8.0, 9.0)" in SETUP.Toolchain().summary([])
    for no_gpu in ("exit 9", "echo 'No devices were found'"):
        program(machine / "bin/nvidia-smi", no_gpu)
        assert SETUP.Toolchain().archs == ["8.0", "9.0", "10.0+PTX"]
    program(machine / "bin/nvidia-smi", "echo 7.0")
    assert "compiles for none of the GPUs found: 7.0" in SETUP.Toolchain().why_not
    monkeypatch.setenv("DISABLE_SM90_FEATURES", "1")
    assert SETUP.Toolchain().archs == ["8.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0+PTX")
    toolchain = SETUP.Toolchain()
    assert toolchain.archs == ["9.0a", "12.0+PTX"]
    assert [flag for flag in toolchain.nvcc() if "gencode" in flag] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


KERNEL = """
extern __device__ int in_the_archive(int x);
__global__ void kernel(int* out) { *out = in_the_archive(*out); }
void launch(int* out) { kernel<<<1, 1>>>(out); }
"""
PYTHON_MODULE = """
#include <Python.h>
void launch(int* out);
__attribute__((visibility("default"))) int exported_by_mistake(int* out) { launch(out); return 0; }
static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_tiny", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__tiny() {
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddStringConstant(module, "ARCHITECTURES", DEEPEP_MOE_ARCHITECTURES);
    return module;
}
"""


@pytest.mark.skipif(SETUP.find_cuda_home() is None, reason="needs nvcc")
def test_device_code_is_linked_and_only_the_entry_point_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("DEEPEP_MOE_CUDA", raising=False)
    monkeypatch.setattr(SETUP, "ROOT", tmp_path)  # where objects go
    toolchain = SETUP.Toolchain()
    monkeypatch.setattr(SETUP.BuildExtension, "toolchain", toolchain, raising=False)
    (tmp_path / "archived.cu").write_text("__device__ int in_the_archive(int x) { return 2 * x; }")
    archive = tmp_path / "libarchive.a"
    subprocess.run([*toolchain.nvcc(), "-rdc=true", "-lib", str(tmp_path / "archived.cu"), "-o", archive], check=True)
    (tmp_path / "kernel.cu").write_text(KERNEL)
    (tmp_path / "module.cpp").write_text(PYTHON_MODULE)

    module = SETUP.Module("_tiny", ["kernel.cu", "module.cpp"], device_link=True, extra_objects=[str(archive)])
    command = SETUP.BuildExtension(Distribution({"ext_modules": [module]}))
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    command.run()

    (library,) = (tmp_path / "lib").glob("_tiny*.so")
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in exported.stdout.splitlines()] == ["PyInit__tiny"]
    # loading it fails where device code was not linked: its registration is then an undefined symbol
    code = "import _tiny; print(_tiny.ARCHITECTURES)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=library.parent, capture_output=True, text=True)
    assert loaded.stdout == "9.0\n", loaded.stderr


def test_integrations_are_importable_as_installed() -> None:
    """The tree's integrations/ is deepep_moe.integrations, also from another directory and in an editable install."""
    code = "import deepep_moe.integrations as i; print(i.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parts[-2:] in (("integrations", "__init__.py"),)
