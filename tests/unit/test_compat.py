"""``import deep_ep`` through deepep_moe.compat."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepep_moe
from deepep_moe import compat
from deepep_moe.errors import UnsupportedError


@pytest.fixture(autouse=True)
def _clean_modules() -> Iterator[None]:
    names = [name for name in sys.modules if name.split(".")[0] == "deep_ep"]
    saved = {name: sys.modules.pop(name) for name in names}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "deep_ep"]:
        del sys.modules[name]
    sys.modules.update(saved)


def test_names_resolve_to_ours() -> None:
    module = compat.install()
    deep_ep = importlib.import_module("deep_ep")
    utils = importlib.import_module("deep_ep.utils")
    assert deep_ep is module
    for name in ("Buffer", "Config", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t"):
        assert getattr(deep_ep, name) is getattr(deepep_moe, name)
    assert utils.EventHandle is deepep_moe.EventHandle
    assert utils.EventOverlap is deepep_moe.EventOverlap
    assert importlib.util.find_spec("deep_ep") is not None  # programs probe like this
    with pytest.raises(ImportError):
        importlib.import_module("deep_ep.something_else")


def test_installing_twice_is_once() -> None:
    assert compat.install() is compat.install()


def test_nothing_happens_without_the_call() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deep_ep")


def test_an_installed_deep_ep_is_not_shadowed_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deep_ep"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedError, match=r"deep_ep is installed at .*__init__\.py.*shadow=True"):
        compat.install()
    assert importlib.import_module("deep_ep").real
    with pytest.raises(UnsupportedError, match="is installed at"):  # imported by now
        compat.install()
    assert compat.install(shadow=True).Buffer is deepep_moe.Buffer
