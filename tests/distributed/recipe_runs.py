"""What the tests of all recipes look at: what a run wrote down, and that it learned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, float]]:
    entries = metrics(folder)
    return [(entry["step"], entry.get("train_loss", entry.get("held_out_loss", math.nan))) for entry in entries]


def assert_learned_and_reported(folder: Path, steps: int) -> None:
    """A run of ``steps`` that logged each of them and evaluated before, in the middle and at the end."""
    held_out = [entry["held_out_loss"] for entry in metrics(folder) if "held_out_loss" in entry]
    assert len(held_out) == 3
    assert held_out[0] == pytest.approx(math.log(256), abs=0.5)  # it starts knowing nothing about bytes
    assert held_out[0] > held_out[1] > held_out[2]

    trained = [entry for entry in metrics(folder) if "train_loss" in entry]
    assert [entry["step"] for entry in trained] == list(range(1, steps + 1))
    for entry in trained:
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["dispatch_percent"] < 100
        assert 0 < entry["combine_percent"] < 100
        assert 1 <= entry["imbalance"] <= 8
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
