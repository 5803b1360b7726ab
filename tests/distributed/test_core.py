"""Dispatcher, Buffer, ElasticBuffer, overlap and failing peers on 1 to 4 gloo ranks; see the cases_*.py files."""

from __future__ import annotations

import pytest

from tests.launch import all_cases, check_case, torchrun

CASES = "tests.distributed.cases_core"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(1, 2, 3, 4)))
def test_core(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)


def test_dying_peer() -> None:
    output = torchrun(2, "-m", "tests.distributed.dying_peer", timeout=60).stdout
    assert "told: dispatch: rank 0 of 2: " in output
    assert "rank 1 may be gone" in output
