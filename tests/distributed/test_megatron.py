"""Megatron-Core trains the same on ``deepep`` as on ``alltoall``: losses, outputs and every gradient."""

from __future__ import annotations

import importlib.util

import pytest

from tests.launch import all_cases, check_case

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
CASES = "tests.distributed.megatron_cases"
TRAINING = "tests.distributed.megatron_training_cases"


@pytest.mark.parametrize(("ranks", "name"), all_cases(CASES, ranks=(1, 2, 4)))
def test_megatron(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)


@pytest.mark.parametrize(("ranks", "name"), all_cases(TRAINING, ranks=(2,)))
def test_training(ranks: int, name: str) -> None:
    check_case(TRAINING, ranks, name)
