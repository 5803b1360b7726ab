"""Build deepep_moe: the Python package always, the CUDA extension ``deepep_moe._C`` where nvcc is found, and
``deepep_moe._nvshmem`` (transfers between nodes) where NVSHMEM is found as well.

    pip install .                          # package and extension; -v shows what was found
    python setup.py build_ext --inplace    # only (re)compile the extension

Where there is no nvcc the package is built without the extension. Where nvcc is there and the extension cannot be
built, the build fails and says why.

Environment variables:

``TORCH_CUDA_ARCH_LIST``
    GPU architectures, for example ``9.0``, ``8.0;9.0``, ``9.0a`` or ``9.0+PTX``. Default: those of this machine's GPUs;
    without a GPU ``8.0;9.0;10.0+PTX``, whose PTX also runs on GPUs that are newer than all of them.
``DISABLE_SM90_FEATURES``
    ``1`` makes the default ``8.0`` alone, as in DeepEP. The kernels are the same for every architecture.
``DISABLE_AGGRESSIVE_PTX_INSTRS``
    ``1`` avoids load/store instructions whose cache hints are undocumented for this use.
``NVSHMEM_DIR``
    NVSHMEM installation, version 3. Default: the nvidia-nvshmem wheel of this Python, if there.
``DEEPEP_MOE_NVSHMEM``
    ``0`` skips ``_nvshmem``, ``1`` fails when it cannot be built. Default: build it when NVSHMEM is there.
``DEEPEP_MOE_DELAY_PUTS``
    ``1`` makes a debug build of ``_nvshmem`` that waits a random time before each transfer.
``DEEPEP_MOE_CUDA``
    ``0`` skips the extension, ``1`` fails where there is no nvcc either.
``CUDA_HOME``, ``CXX``, ``MAX_JOBS``
    CUDA toolkit, host compiler, number of parallel compilations.

The extensions link no libtorch and carry their own CUDA runtime, so one build serves every torch version.
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
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WIDTH = "namespace deepep_moe::DEEPEP_MOE_WIDTH"  # sources with it are compiled twice (csrc/runtime/ranks.h)
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")  # where there is no GPU to ask; the last one as PTX too

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} is too old to read pyproject.toml: pip install 'setuptools>=77'")


def switch(name: str) -> bool | None:
    """Value of an on/off environment variable; None if it is not set."""
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
    if wheel is None:  # pip's isolated build hides installed packages: this Python's are still in their folder
        installed = Path(sysconfig.get_paths()["purelib"], "nvidia", "nvshmem")
        wheel = installed if installed.is_dir() else None
    return (wheel, "nvidia-nvshmem wheel") if wheel else (None, "")


def nvshmem_libraries(home: Path) -> tuple[Path, Path] | None:
    """NVSHMEM's device archive and host library in ``home``, or None."""
    for directory in (home / "lib", home / "lib64"):
        # a wheel has no libnvshmem_host.so
        host = [directory / "libnvshmem_host.so.3", *sorted(directory.glob("libnvshmem_host.so"))]
        found = [path for path in host if path.exists()]
        if found and (directory / "libnvshmem_device.a").exists():
            return directory / "libnvshmem_device.a", found[0]
    return None


def split_archs(text: str) -> list[str]:
    """Architectures of a TORCH_CUDA_ARCH_LIST."""
    archs = [arch for arch in re.split(r"[;,\s]+", text) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            sys.exit(f"TORCH_CUDA_ARCH_LIST={text}: '{arch}' is not like 8.0, 9.0, 9.0a or 9.0+PTX")
    return archs


def gencode_flags(archs: list[str]) -> list[str]:
    """nvcc flags for code that runs on ``archs``, and PTX where they end in ``+PTX``."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def by_number(arch: str) -> tuple[int, ...]:
    return tuple(map(int, arch.split(".")))


def gpus_here() -> list[str]:
    """Compute capabilities of this machine's GPUs, such as ``9.0``, each once; none where nvidia-smi finds no GPU."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", text, re.MULTILINE)), key=by_number)


def nvcc_archs(cuda_home: Path) -> list[str]:
    """Every architecture that nvcc compiles for, ascending."""
    command = [str(cuda_home / "bin" / "nvcc"), "--list-gpu-arch"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted((f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", text)), key=by_number)


def default_archs(gpus: list[str], supported: list[str]) -> list[str]:
    """Architectures to build for on a machine with ``gpus``, by an nvcc that compiles for ``supported``.

    A GPU newer than nvcc gets PTX of the newest architecture before it, which its driver compiles.
    """
    archs = [arch for arch in gpus or DEFAULT_ARCHS if arch in supported]
    if gpus and len(archs) == len(gpus):
        return archs
    newest = [arch for arch in supported if by_number(arch) <= by_number((gpus or DEFAULT_ARCHS)[-1])]
    return [*(arch for arch in archs if arch != newest[-1]), f"{newest[-1]}+PTX"] if newest else archs


def nvcc_version(cuda_home: Path) -> str:
    text = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match.group(1) if match else "unknown version"


class Toolchain:
    """The CUDA toolkit, compilers and options of this build, and the commands that use them."""

    def __init__(self) -> None:
        self.cuda_home = find_cuda_home()
        self.pybind11 = package_directory("pybind11")
        self.nvshmem, self.nvshmem_source = find_nvshmem()
        self.aggressive_ptx = not switch("DISABLE_AGGRESSIVE_PTX_INSTRS")
        self.wanted = switch("DEEPEP_MOE_CUDA")
        self.cxx = shlex.split(os.environ.get("CXX", "g++"))
        self.jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        self.archs, self.archs_source = self._archs()
        self.why_not = self._why_not()
        self.delay_puts = bool(switch("DEEPEP_MOE_DELAY_PUTS"))
        self.why_not_nvshmem = self.why_not or self._why_not_nvshmem()

    def failure(self) -> str:
        """Why a build must not go on without the extension, and what to do; empty where it may."""
        if self.wanted and self.why_not:
            return f"DEEPEP_MOE_CUDA=1, but the CUDA extension cannot be built: {self.why_not}"
        if self.wanted is None and self.cuda_home is not None and self.why_not:
            remedy = "to install without the extension, set DEEPEP_MOE_CUDA=0"
            return f"nvcc is in {self.cuda_home}, but the CUDA extension cannot be built: {self.why_not}; {remedy}"
        if self.why_not_nvshmem and switch("DEEPEP_MOE_NVSHMEM"):
            return f"DEEPEP_MOE_NVSHMEM=1, but _nvshmem cannot be built: {self.why_not_nvshmem}"
        return ""

    def _archs(self) -> tuple[list[str], str]:
        """Architectures to build for, and where they come from."""
        if given := split_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
            return given, "TORCH_CUDA_ARCH_LIST"
        if switch("DISABLE_SM90_FEATURES"):
            return ["8.0"], "DISABLE_SM90_FEATURES"
        if self.cuda_home is None or self.wanted is False:
            return [], ""
        gpus = gpus_here()
        source = f"GPUs found: {', '.join(gpus)}" if gpus else "no GPU found"
        return default_archs(gpus, nvcc_archs(self.cuda_home)), source

    def _why_not(self) -> str:
        if self.wanted is False:
            return "DEEPEP_MOE_CUDA=0"
        if self.cuda_home is None:
            return "no CUDA toolkit found (nvcc in PATH, or CUDA_HOME)"
        if not self.archs:
            return f"nvcc {nvcc_version(self.cuda_home)} compiles for none of the {self.archs_source}"
        if not shutil.which(self.cxx[0]):
            return f"no host compiler ({self.cxx[0]}; set CXX)"
        if self.pybind11 is None:
            return "pybind11 is not installed for this Python (pip install pybind11, or leave out --no-build-isolation)"
        return ""

    def _why_not_nvshmem(self) -> str:
        if switch("DEEPEP_MOE_NVSHMEM") is False:
            return "DEEPEP_MOE_NVSHMEM=0"
        if self.nvshmem is None:
            return "NVSHMEM not found (pip install nvidia-nvshmem-cu13, or set NVSHMEM_DIR)"
        if nvshmem_libraries(self.nvshmem) is None:
            return f"no libnvshmem_device.a with libnvshmem_host.so.3 in {self.nvshmem}/lib"
        return ""

    def modules(self) -> list[Module]:
        """The extension modules that can be built here."""
        sources = [path for pattern in ("*.cpp", "*/*.cpp", "*/*.cu") for path in CSRC.glob(pattern)]
        of_nvshmem = [path for path in sources if path.parent.name == "nvshmem"]

        def relative(paths: list[Path]) -> list[str]:
            return sorted(str(path.relative_to(ROOT)) for path in paths)

        modules = []
        if not self.why_not:
            modules.append(Module("deepep_moe._C", relative([path for path in sources if path not in of_nvshmem])))
        if not self.why_not_nvshmem:
            assert self.cuda_home is not None and self.nvshmem is not None
            includes = [self.nvshmem / "include", self.cuda_home / "include", self.cuda_home / "include" / "cccl"]
            libraries = nvshmem_libraries(self.nvshmem)
            assert libraries is not None
            modules.append(
                Module(
                    "deepep_moe._nvshmem",
                    relative(of_nvshmem),
                    device_link=True,
                    include_dirs=[str(path) for path in includes],
                    extra_objects=[str(path) for path in libraries],
                    define_macros=[("DEEPEP_MOE_DELAY_PUTS", None)] if self.delay_puts else [],
                )
            )
        return modules

    def nvcc(self) -> list[str]:
        assert self.cuda_home is not None
        return [str(self.cuda_home / "bin" / "nvcc"), "-ccbin", self.cxx[0], *gencode_flags(self.archs)]

    def compile(self, module: Module, source: Path, wide: bool = False) -> list[str]:
        """Compiler call for one source of ``module``, for more ranks if ``wide``, without its output."""
        assert self.cuda_home is not None
        assert self.pybind11 is not None
        common = ["-c", str(source), "-O3", "-std=c++17", f"-I{CSRC}"]
        common += [word for path in module.include_dirs for word in ("-isystem", path)]
        common += [f"-D{name}" for name, _ in module.define_macros]
        common += ["-DDEEPEP_MOE_WIDE"] if wide else []
        common += [] if self.aggressive_ptx else ["-DDISABLE_AGGRESSIVE_PTX_INSTRS"]
        if source.suffix == ".cu":
            device = ["-lineinfo", *(["-rdc=true"] if module.device_link else [])]
            return [*self.nvcc(), *common, *device, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
        includes = [self.cuda_home / "include", self.pybind11 / "include", sysconfig.get_paths()["include"]]
        flags = ["-fPIC", "-fvisibility=hidden", "-Wall", *(f"-isystem{path}" for path in includes)]
        return [*self.cxx, *common, f'-DDEEPEP_MOE_ARCHITECTURES="{";".join(self.archs)}"', *flags]

    def device_link(self, module: Module, objects: list[Path]) -> list[str]:
        """nvcc call that resolves device code between ``objects`` and the module's archives, without its output."""
        archives = [path for path in module.extra_objects if path.endswith(".a")]
        return [*self.nvcc(), "-dlink", "-Xcompiler", "-fPIC", *map(str, objects), *archives]

    def link(self, module: Module, objects: list[Path], version_script: Path, target: Path) -> list[str]:
        """Linker call for the module itself."""
        assert self.cuda_home is not None
        directories = [self.cuda_home / name for name in ("lib64", "lib")]
        libraries = [*module.extra_objects, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link = [*self.cxx, "-shared", "-o", str(target), *map(str, objects)]
        link += [*(f"-L{path}" for path in directories if path.is_dir()), *libraries]
        return [*link, f"-Wl,--version-script={version_script}"]

    def summary(self, modules: list[Module]) -> str:
        on_off = {True: "on", False: "off"}
        rows = [("Python", f"{sys.version.split()[0]}, {sysconfig.get_config_var('EXT_SUFFIX')}")]
        if self.why_not:
            rows.append(("CUDA extension", f"not built: {self.why_not}"))
        else:
            assert self.cuda_home is not None
            rows += [("CUDA extension", f"{module.name} from {len(module.sources)} sources") for module in modules]
            rows += [
                ("CUDA toolkit", f"{nvcc_version(self.cuda_home)} in {self.cuda_home}"),
                ("architectures", f"{';'.join(self.archs)} ({self.archs_source})"),
                ("aggressive PTX", on_off[self.aggressive_ptx]),
            ]
        if self.why_not_nvshmem:
            rows.append(("NVSHMEM", f"not built: {self.why_not_nvshmem}"))
        else:
            delays = ", DEBUG BUILD with delays before puts" if self.delay_puts else ""
            rows.append(("NVSHMEM", f"{self.nvshmem} ({self.nvshmem_source}){delays}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(["deepep_moe build:", *(f"  {name:<{width}}  {value}" for name, value in rows)])


class Module(Extension):
    """An extension module; of what setuptools has for one, sources, include_dirs, extra_objects and the names of
    define_macros count.

    Args:
        device_link: kernels call functions of other sources or of archives in extra_objects (relocatable device code).
    """

    def __init__(self, name: str, sources: list[str], *, device_link: bool = False, **given: Any) -> None:
        super().__init__(name, sources, **given)
        self.device_link = device_link

    def units(self) -> list[tuple[Path, bool]]:
        """What to compile: each source, and those of two widths once more, for more ranks."""
        sources = [ROOT / source for source in self.sources]
        twice = [source for source in sources if WIDTH in source.read_text()]
        return [*((source, False) for source in sources), *((source, True) for source in twice)]


class BuildExtension(build_ext):
    """Compiles what changed, in parallel, and links without torch."""

    toolchain: Toolchain

    def build_extension(self, ext: Extension) -> None:
        assert isinstance(ext, Module)
        target = Path(self.get_ext_fullpath(ext.name))
        with ThreadPoolExecutor(self.toolchain.jobs) as pool:
            objects = list(pool.map(lambda unit: self.compile_one(ext, *unit), ext.units()))
        name = ext.name.rpartition(".")[2]
        temporary = Path(self.build_temp) / name
        temporary.mkdir(parents=True, exist_ok=True)
        if ext.device_link:
            resolved = temporary / "device_link.o"
            self.call([*self.toolchain.device_link(ext, objects), "-o", str(resolved)])
            objects.append(resolved)
        # Everything else stays inside, so that it never meets a library of the process that has the same names.
        version_script = temporary / "version_script"
        version_script.write_text(f"{{ global: PyInit_{name}; local: *; }};\n")
        # always: the objects of another architecture may be older than what is there
        target.parent.mkdir(parents=True, exist_ok=True)
        self.call(self.toolchain.link(ext, objects, version_script, target))

    def compile_one(self, module: Module, source: Path, wide: bool) -> Path:
        """Object file of ``source``; recompiled when the source, any header or the command is new."""
        command = self.toolchain.compile(module, source, wide)
        key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
        # the key keeps builds for several Pythons or architectures beside each other
        target = ROOT / "build" / "csrc" / f"{source.stem}-{key}{source.suffix}.o"
        headers = (path for suffix in ("h", "hpp", "cuh") for path in CSRC.rglob(f"*.{suffix}"))
        newest = max(path.stat().st_mtime for path in [source, *headers])
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


def main() -> None:
    toolchain = BuildExtension.toolchain = Toolchain()
    modules = toolchain.modules()
    if {"build", "build_ext", "install", "develop", "bdist_wheel", "editable_wheel"} & set(sys.argv):
        print(toolchain.summary(modules), flush=True)
        if failure := toolchain.failure():
            sys.exit(f"deepep_moe: {failure}")
    # integrations/ stands beside deepep_moe/ in the tree and is imported as deepep_moe.integrations
    integrations = [f"deepep_moe.integrations.{name}" for name in find_packages("integrations")]
    setup(
        packages=[*find_packages(include=["deepep_moe", "deepep_moe.*"]), "deepep_moe.integrations", *integrations],
        package_dir={"deepep_moe": "deepep_moe", "deepep_moe.integrations": "integrations"},
        package_data={"deepep_moe": ["py.typed", "_C.pyi", "_nvshmem.pyi"]},
        ext_modules=modules,
        cmdclass={"build_ext": BuildExtension},
    )


if __name__ == "__main__":  # so that tests can import what is above; pip runs it as __main__ too
    main()
