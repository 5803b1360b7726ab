"""Overlapped and pipelined calls on 1 to 4 gloo ranks; the cases themselves are in cases_overlap.py."""

from __future__ import annotations

import pytest

from tests.launch import all_cases, check_case

CASES = "tests.distributed.cases_overlap"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(1, 2, 3, 4)))
def test_overlap(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)
