"""The DeepEP 2.x interface on 1 to 4 gloo ranks; the cases themselves are in cases_elastic.py."""

from __future__ import annotations

import pytest

from tests.launch import all_cases, check_case

CASES = "tests.distributed.cases_elastic"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(1, 2, 3, 4)))
def test_elastic(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)
