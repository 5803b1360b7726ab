"""Peers that are silent or die: an error that names the phase, within the configured time, and a clean exit."""

from __future__ import annotations

import pytest

from tests.launch import all_cases, check_case, torchrun

CASES = "tests.distributed.cases_peers"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(2, 3)))
def test_silent_peer(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)


def test_dying_peer() -> None:
    output = torchrun(2, "-m", "tests.distributed.dying_peer", timeout=60).stdout
    assert "told: dispatch: rank 0 of 2: " in output
    assert "a peer may be gone" in output
