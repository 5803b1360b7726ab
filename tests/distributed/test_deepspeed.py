"""DeepSpeed trains the same with the block ``deepep_moe`` in ds_config as without it."""

from __future__ import annotations

import importlib.util

import pytest

from tests.launch import all_cases, check_case

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
CASES = "tests.distributed.cases_deepspeed"
FOUND = all_cases(CASES, ranks=(2, 4)) if importlib.util.find_spec("deepspeed") is not None else []


@pytest.mark.parametrize(("ranks", "name"), FOUND)
def test_deepspeed(ranks: int, name: str) -> None:
    check_case(CASES, ranks, name)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="AutoEP's cases need transformers")
def test_autoep_is_among_the_cases() -> None:
    assert any(name.startswith("deepspeed_autoep.") for _, name in FOUND)
