"""The plan kernels of csrc/nodes without a GPU, compiled for the CPU (cuda.h), under the hierarchical backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulation import kernels
from tests.emulation.build import build
from tests.launch import all_cases, check_case

CASES = "tests.distributed.cases_nodes_kernels"
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulation"), ("nodes/plan.cu", "nodes/parts.cu"), ("nodes.cpp",), "nodes.so")


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(2, 4)))
def test_plans_over_nodes(library: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, name: str) -> None:
    monkeypatch.setenv(kernels.LIBRARY, str(library))
    check_case(CASES, ranks, name)
