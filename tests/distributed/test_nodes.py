"""The hierarchical backend on 2 to 6 gloo ranks, cut into nodes; see cases_nodes.py."""

from __future__ import annotations

import re

import pytest

from tests.distributed.lost_on_node import TIMEOUT_SECONDS
from tests.launch import all_cases, check_case, torchrun

CASES = "tests.distributed.cases_nodes"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(2, 3, 4, 6)))
def test_nodes(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)


ON_NODES = "tests.distributed.cases_on_nodes"


@pytest.mark.parametrize(("ranks", "name"), all_cases(ON_NODES, ranks=(2, 4)))
def test_core_on_nodes(ranks: int, name: str) -> None:
    check_case(ON_NODES, ranks, name)


FRAMEWORKS = "tests.distributed.cases_frameworks_on_nodes"


@pytest.mark.parametrize(("ranks", "name"), all_cases(FRAMEWORKS, ranks=(4,)))
def test_frameworks_on_nodes(ranks: int, name: str) -> None:
    check_case(FRAMEWORKS, ranks, name)


def test_doctor_shows_nodes_and_rails() -> None:
    settings = {"DEEPEP_MOE_BACKEND": "hierarchical", "DEEPEP_MOE_RANKS_PER_NODE": "2", "COLUMNS": "200"}
    output = torchrun(4, "-m", "deepep_moe", "doctor", env=settings).stdout
    assert re.search(r"backend +hierarchical \(gloo, cpu\): chosen by the settings", output)
    assert re.search(r"nodes +2; node 0 \(.*part 0\): ranks 0, 1; node 1 \(.*part 1\): ranks 2, 3", output)
    assert re.search(r"rails +2; ranks 0, 2; ranks 1, 3", output)
    assert re.search(r"between nodes +gloo, over each rail", output)
    settings = {"DEEPEP_MOE_RANKS_PER_NODE": "2", "COLUMNS": "200"}
    output = torchrun(3, "-m", "deepep_moe", "doctor", env=settings).stdout
    assert re.search(r"rails +none: nodes have different numbers .* start equally many on each", output)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("before a call", "rank 3 may be gone"),
        ("in a call", "rank 3 may be gone"),
        ("inside its node", "rank 3 may be gone"),
        ("failing in a call", "rank 3 broke off dispatch: MemoryError: no memory for the rows"),
    ],
)
def test_a_rank_lost_on_another_node_is_named_on_all(when: str, message: str) -> None:
    """Also by rank 0, which shares neither a node nor a rail with it."""
    output = torchrun(4, "-m", "tests.distributed.lost_on_node", when, timeout=100).stdout
    told = re.findall(r"told (\d) after ([\d.]+): (.*)", output)
    assert sorted(rank for rank, _, _ in told) == ["0", "1", "2"], output
    for _, seconds, text in told:
        assert message in text
        assert "ranks 2, 3 may" not in text  # rank 2 is there
        assert float(seconds) < TIMEOUT_SECONDS / 2  # nobody waited for the timeout
