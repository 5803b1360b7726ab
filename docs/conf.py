"""Sphinx configuration: ``python -m sphinx -W --keep-going docs build/docs`` builds the documentation site."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepep_moe

project = "deepep_moe"
author = "the deepep_moe authors"
version = release = deepep_moe.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_type_aliases = {"ProcessGroup": "torch.distributed.ProcessGroup"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def reachable(inventories: dict[str, tuple[str, None]]) -> dict[str, tuple[str, None]]:
    """Those inventories that can be read now: a build without a network has no links to other projects."""
    found = {}
    for name, (address, _) in inventories.items():
        try:
            urllib.request.urlopen(address + "objects.inv", timeout=5).close()
        except (urllib.error.URLError, OSError):
            continue
        found[name] = (address, None)
    return found


intersphinx_mapping = reachable(
    {
        "python": ("https://docs.python.org/3/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
)

html_theme = "furo"
html_title = f"deepep_moe {release}"
