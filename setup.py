"""Build deepep_moe: the Python package always, the CUDA extension ``deepep_moe._C`` where nvcc is found.

    pip install --no-build-isolation .                    # package, and extension if possible
    python setup.py build_ext --inplace                   # only (re)compile the extension

Environment variables:

``TORCH_CUDA_ARCH_LIST``
    GPU architectures, for example ``9.0``, ``8.0;9.0``, ``9.0a`` or ``9.0+PTX``. Default: ``9.0``.
``DISABLE_SM90_FEATURES``
    ``1`` for GPUs before sm_90. Kernels use nothing that only Hopper has, so this only changes what
    ``Buffer.is_sm90_compiled()`` reports.
``DISABLE_AGGRESSIVE_PTX_INSTRS``
    ``1`` avoids load/store instructions whose cache hints are undocumented for this use.
``NVSHMEM_DIR``
    NVSHMEM installation. Default: the nvidia-nvshmem wheel of this Python, if there.
``DEEPEP_MOE_CUDA``
    ``0`` skips the extension, ``1`` fails when it cannot be built. Default: build it when nvcc is there.
``CUDA_HOME``, ``CXX``, ``MAX_JOBS``
    CUDA toolkit, host compiler, number of parallel compilations.

The extension links no libtorch and carries its own CUDA runtime, so one build serves every torch version.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "9.0"

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} is too old to read pyproject.toml: pip install 'setuptools>=77'")


def switch(name: str) -> bool | None:
    """Value of an on/off environment variable; None when it is not set."""
    text = os.environ.get(name, "").strip().lower()
    if text == "":
        return None
    if text in ("1", "true", "on", "yes"):
        return True
    if text in ("0", "false", "off", "no"):
        return False
    sys.exit(f"{name}={text}: use 0 or 1")


def package_directory(module: str) -> Path | None:
    """Directory of an importable package (namespace packages too), without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def find_cuda_home() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, else the one of the nvcc in PATH, else /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            home = Path(os.environ[variable])
            return home if (home / "bin" / "nvcc").exists() else None
    candidates = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        candidates.insert(0, Path(nvcc).resolve().parent.parent)
    for home in candidates:
        # a wrapper script elsewhere in PATH is not a toolkit: the headers must be beside it
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home.resolve()
    return None


def find_nvshmem() -> tuple[Path | None, str]:
    """NVSHMEM's directory and how it was found."""
    if value := os.environ.get("NVSHMEM_DIR"):
        if not (Path(value) / "include").is_dir():
            sys.exit(f"NVSHMEM_DIR={value}: no include directory there")
        return Path(value), "NVSHMEM_DIR"
    wheel = package_directory("nvidia.nvshmem")
    return (wheel, "nvidia-nvshmem wheel") if wheel else (None, "")


def gencode_flags(archs: str) -> list[str]:
    """nvcc flags of a TORCH_CUDA_ARCH_LIST."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST={archs}: '{arch}' is not like 8.0, 9.0, 9.0a or 9.0+PTX")
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def nvcc_version(cuda_home: Path) -> str:
    text = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else "unknown version"


class CudaBuild:
    """What was found on this machine and switched on: the flags of every compilation."""

    def __init__(self) -> None:
        self.cuda_home = find_cuda_home()
        self.pybind11 = package_directory("pybind11")
        self.nvshmem, self.nvshmem_source = find_nvshmem()
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        self.sm90 = not switch("DISABLE_SM90_FEATURES")
        self.aggressive_ptx = not switch("DISABLE_AGGRESSIVE_PTX_INSTRS")
        self.wanted = switch("DEEPEP_MOE_CUDA")
        self.cxx = shlex.split(os.environ.get("CXX", "g++"))
        self.jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        self.why_not = self._why_not()
        if self.why_not and self.wanted:
            sys.exit(f"DEEPEP_MOE_CUDA=1, but the extension cannot be built: {self.why_not}")

    def _why_not(self) -> str:
        if self.wanted is False:
            return "DEEPEP_MOE_CUDA=0"
        if self.cuda_home is None:
            return "no CUDA toolkit found (nvcc in PATH, or CUDA_HOME)"
        if not shutil.which(self.cxx[0]):
            return f"no host compiler ({self.cxx[0]}; set CXX)"
        if self.pybind11 is None:
            return "pybind11 is not installed for this Python (pip install pybind11)"
        if not self.sources():
            return "csrc holds no sources"
        return ""

    @staticmethod
    def sources() -> list[Path]:
        return sorted([*CSRC.glob("*.cpp"), *CSRC.glob("runtime/*.cpp"), *CSRC.glob("kernels/*.cu")])

    @staticmethod
    def headers() -> list[Path]:
        return sorted(path for suffix in ("h", "hpp", "cuh") for path in CSRC.rglob(f"*.{suffix}"))

    def command(self, source: Path) -> list[str]:
        """Compiler call for one source, without its output."""
        assert self.cuda_home is not None
        assert self.pybind11 is not None
        common = ["-O3", "-std=c++17", f"-I{CSRC}"]
        common += [] if self.sm90 else ["-DDISABLE_SM90_FEATURES"]
        common += [] if self.aggressive_ptx else ["-DDISABLE_AGGRESSIVE_PTX_INSTRS"]
        if source.suffix == ".cu":
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
            nvcc = [str(self.cuda_home / "bin" / "nvcc"), "-ccbin", self.cxx[0]]
            return [*nvcc, "-c", str(source), *common, "-lineinfo", *host, *gencode_flags(self.archs)]
        includes = [self.cuda_home / "include", self.pybind11 / "include", sysconfig.get_paths()["include"]]
        flags = ["-fPIC", "-fvisibility=hidden", "-Wall", *(f"-isystem{path}" for path in includes)]
        return [*self.cxx, "-c", str(source), *common, *flags]

    def summary(self) -> str:
        on_off = {True: "on", False: "off"}
        rows = [("Python", f"{sys.version.split()[0]}, {sysconfig.get_config_var('EXT_SUFFIX')}")]
        if self.why_not:
            rows.append(("CUDA extension", f"not built: {self.why_not}"))
        else:
            assert self.cuda_home is not None
            rows += [
                ("CUDA extension", f"deepep_moe._C from {len(self.sources())} sources"),
                ("CUDA toolkit", f"{nvcc_version(self.cuda_home)} in {self.cuda_home}"),
                ("architectures", self.archs),
                ("sm_90 features", on_off[self.sm90]),
                ("aggressive PTX", on_off[self.aggressive_ptx]),
            ]
        found = f"found by {self.nvshmem_source}: {self.nvshmem}" if self.nvshmem else "not found"
        rows.append(("NVSHMEM", f"{found} (no kernel uses it yet)"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(["deepep_moe build:", *(f"  {name:<{width}}  {value}" for name, value in rows)])


class BuildExtension(build_ext):
    """Compiles what changed, in parallel, and links without torch."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        with ThreadPoolExecutor(BUILD.jobs) as pool:
            objects = list(pool.map(self.compile_one, BUILD.sources()))
        assert BUILD.cuda_home is not None
        library_dirs = [BUILD.cuda_home / name for name in ("lib64", "lib")]
        link = [*BUILD.cxx, "-shared", "-o", str(target), *map(str, objects)]
        link += [f"-L{path}" for path in library_dirs if path.is_dir()]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        # always: the objects of another architecture may be older than what is there
        target.parent.mkdir(parents=True, exist_ok=True)
        self.call(link)

    def compile_one(self, source: Path) -> Path:
        """Object file of ``source``; recompiled when the source, any header or the command is new."""
        command = BUILD.command(source)
        key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
        # the key keeps builds for several Pythons or architectures beside each other
        target = ROOT / "build" / "csrc" / f"{source.stem}-{key}{source.suffix}.o"
        newest = max(path.stat().st_mtime for path in [source, *BUILD.headers()])
        if not target.exists() or target.stat().st_mtime < newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(f".{os.getpid()}.tmp.o")
            self.call([*command, "-o", str(unfinished)])
            unfinished.replace(target)
        return target

    @staticmethod
    def call(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        if subprocess.run(command).returncode:
            sys.exit(f"failed: {shlex.join(command)}")


BUILD = CudaBuild()
if {"build", "build_ext", "install", "develop", "bdist_wheel", "editable_wheel"} & set(sys.argv):
    print(BUILD.summary(), flush=True)

# integrations/ stands beside deepep_moe/ in the tree and is imported as deepep_moe.integrations
INTEGRATIONS = ["deepep_moe.integrations", *(f"deepep_moe.integrations.{p}" for p in find_packages("integrations"))]
EXTENSION = [Extension("deepep_moe._C", [str(path.relative_to(ROOT)) for path in BUILD.sources()])]

setup(
    packages=[*find_packages(include=["deepep_moe", "deepep_moe.*"]), *INTEGRATIONS],
    package_dir={"deepep_moe": "deepep_moe", "deepep_moe.integrations": "integrations"},
    package_data={"deepep_moe": ["py.typed", "_C.pyi"]},
    ext_modules=[] if BUILD.why_not else EXTENSION,
    cmdclass={"build_ext": BuildExtension},
)
