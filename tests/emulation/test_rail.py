"""The kernels of the rail transport ``nvshmem`` without a GPU: csrc/nvshmem/rail.cu, compiled for the CPU.

rail.cpp executes operations over a network that delivers puts late, out of order and word by word (test_low_latency.py
says how). It compares every row, also after peers have begun later operations.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulation.build import LIMIT_SECONDS, SEEDS, build, run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    return build(folder, ("nvshmem/rail.cu",), ("network.cpp", "rail.cpp"), "rail")


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_arrive_as_they_were_sent(program: Path, ranks: int, seed: int) -> None:
    done = run(program, ranks, seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_signals_before_their_data_are_noticed(program: Path, seed: int) -> None:
    done = run(program, 3, seed, 2)
    assert done.returncode == 1
    assert "program.run" in done.stderr or "chunk.received" in done.stderr, done.stderr
