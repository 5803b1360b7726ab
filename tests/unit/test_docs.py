"""What the documents promise that a test can see: every file is in the picture, every setting in the table."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from deepep_moe import DispatcherConfig, __version__
from tests.launch import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def sources() -> list[str]:
    patterns = (
        "deepep_moe/**/*.py",
        "integrations/**/*.py",
        "recipes/*.py",
        "benchmarks/*.py",
        "csrc/**/*.c*",
        "csrc/**/*.h",
    )
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.name != "__init__.py")


@pytest.mark.parametrize("path", sources())
def test_architecture_shows_every_file(path: str) -> None:
    top, _, rest = path.partition("/")
    assert f"`{rest if top not in ('recipes', 'benchmarks') else path}`" in ARCHITECTURE


def test_architecture_shows_no_file_that_is_gone() -> None:
    rows = re.findall(r"^\| (`.*?) \|", ARCHITECTURE, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) > 30
    for name in named:
        assert any((ROOT / top / name).exists() for top in ("", "deepep_moe", "csrc", "integrations")), name


def test_readme_table_is_the_dispatcher_config() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", README, flags=re.MULTILINE))
    assert rows == {field.name: str(field.default) for field in fields(DispatcherConfig)}


def test_changelog_is_ready_for_a_tag() -> None:
    """A release renames ``Unreleased`` to the version and its date."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^## (.*)$", changelog, flags=re.MULTILINE)
    releases = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \(\d{4}-\d\d-\d\d\)", heading) for heading in others]
    assert all(releases), others
    versions = [tuple(map(int, release.groups())) for release in releases if release]
    assert versions == sorted(set(versions), reverse=True)
    assert first == "Unreleased" or first.startswith(f"{__version__} (")


def test_the_oldest_pytorch_is_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.findall(r'"torch>=([\d.]+)"', project)
    assert len(oldest) == 1
    for page in ("README.md", "docs/install.md"):
        assert f"PyTorch {oldest[0]} or newer" in (ROOT / page).read_text(encoding="utf-8"), page


def test_readme_names_files_that_exist() -> None:
    for name in re.findall(r"(?:recipes|tests|docs|deepep_moe|benchmarks)/[\w/]+\.(?:py|sh|md|yaml)", README):
        if name not in ("docs/benchmarks.md", "docs/gpu-status.md"):
            assert (ROOT / name).exists(), name
