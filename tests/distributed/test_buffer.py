"""The DeepEP 1.x interface on 1 to 4 gloo ranks; the cases themselves are in cases_buffer.py."""

from __future__ import annotations

import pytest

from tests.launch import all_cases, check_case

CASES = "tests.distributed.cases_buffer"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(1, 2, 3, 4)))
def test_buffer(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)
