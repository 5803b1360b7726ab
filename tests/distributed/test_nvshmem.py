"""NVSHMEM over groups of processes, with stand-ins for the library: its start, its memory, rows between nodes."""

from __future__ import annotations

import pytest

from tests.launch import all_cases, check_case

CASES = "tests.distributed.cases_nvshmem"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(2, 3, 4)))
def test_nvshmem(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)
