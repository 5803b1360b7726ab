"""Build the sdist, the wheel from it, and use the wheel in an environment that has only what it declares to need.

    python .ci/package.py

The environment is a new venv. torch and the other dependencies are linked into it from the Python that runs this, as
far as the package's metadata asks for them, and nothing else is: an import of an undeclared package fails there.
The wheel has no CUDA extension.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"DEEPEP_MOE_CUDA": "0"}


IMPORT_ALL = """
import importlib, pkgutil
import deepep_moe
names = {module.name for module in pkgutil.walk_packages(deepep_moe.__path__, "deepep_moe.", onerror=lambda name: None)}
for name in sorted(names):
    if not name.startswith("deepep_moe.integrations.") and name != "deepep_moe.__main__":
        importlib.import_module(name)
from deepep_moe import *
"""  # integrations need their frameworks


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command; ends this script where it fails."""
    result = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
    )
    if result.returncode:
        sys.exit(f"failed with status {result.returncode}: {' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it by pip in an isolated environment, as ``python -m build`` does it."""
    code = f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """What must be in them, and what must not."""
    version = run(sys.executable, "-c", "import deepep_moe; print(deepep_moe.__version__)", cwd=ROOT).strip()
    assert sdist.name == f"deepep_moe-{version}.tar.gz", sdist.name
    assert wheel.name == f"deepep_moe-{version}-py3-none-any.whl", wheel.name
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(ROOT)) for kind in ("c*", "h") for path in (ROOT / "csrc").rglob(f"*.{kind}")}
    missing = {*native, "setup.py", "CHANGELOG.md", "integrations/megatron/dispatcher.py"} - sources
    assert not missing, f"missing in the sdist: {missing}"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    needed = {"deepep_moe/py.typed", "deepep_moe/_C.pyi", "deepep_moe/integrations/megatron/dispatcher.py"}
    assert needed <= packed, f"missing in the wheel: {needed - packed}"
    tops = {name.partition("/")[0] for name in packed}
    assert tops == {"deepep_moe", f"deepep_moe-{version}.dist-info"}, tops
    assert not [name for name in packed if name.endswith(".so")]


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that these requirements bring, directly or not."""
    names: set[str] = set()
    while requirements:
        requirement = Requirement(requirements.pop())
        if requirement.name in names or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(requirement.name)
        requirements += importlib.metadata.requires(requirement.name) or []
    return names


def make_environment(folder: Path, wheel: Path) -> Path:
    """A venv with the wheel and its dependencies. Returns its ``bin``."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    requires = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    for name in closure(requires):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    # --no-index: fails where a dependency is not among what was linked
    run(folder / "bin/python", "-m", "pip", "install", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def use(programs: Path) -> None:
    """Version, checks and a dispatch and combine of two processes, away from the checkout."""
    away = programs.parent
    version = run(programs / "deepep-moe", "--version", cwd=away)
    where = run(programs / "python", "-c", "import deepep_moe; print(deepep_moe.__file__)", cwd=away)
    assert where.startswith(str(away)), where
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    report = run(programs / "python", *ranks, "-m", "deepep_moe", "doctor", cwd=away)
    assert "dispatch and combine of 64 tokens" in report, report
    run(programs / "python", "-c", IMPORT_ALL, cwd=away)
    print(f"{version}{report}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        check_contents(sdist, wheel)
        use(make_environment(folder / "environment", wheel))


if __name__ == "__main__":
    main()
