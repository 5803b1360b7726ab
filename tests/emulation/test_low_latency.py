"""The low-latency kernels without a GPU: csrc/latency and csrc/nvshmem/latency.cu, compiled for the CPU.

A stand-in for CUDA (cuda.h) runs all threads of all ranks as fibers, in an order that a seed determines, and a stand-in
for NVSHMEM (nvshmem.h) delivers puts late, out of order and word by word, as a network may. low_latency.cpp makes calls
over several nodes and on one domain, with hooks, refusals, masks and a lost rank, and compares them with a reference
that needs no kernels (reference.h). This cannot show what depends on weak memory order, nor speed.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.emulation.build import LIMIT_SECONDS, SEEDS, build, run

SOURCES = (
    "latency/dispatch.cu",
    "latency/combine.cu",
    "latency/control.cu",
    "latency/refuse.cu",
    "latency/engine.cpp",
    "nvshmem/latency.cu",
    "runtime/domain.cpp",
    "runtime/give_up.cu",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    return build(folder, SOURCES, ("network.cpp", "low_latency.cpp"), "low_latency")


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (3, 1), (4, 2), (6, 3)])
def test_calls_return_what_the_reference_does(program: Path, ranks: int, per_node: int, seed: int) -> None:
    done = run(program, ranks, per_node, seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wide_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for up to 128 ranks."""
    folder = tmp_path_factory.mktemp("wide")
    return build(folder, SOURCES, ("network.cpp", "low_latency.cpp"), "low_latency", wide=True)


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("ranks", "per_node"), [(3, 1), (33, 31), (40, 40), (72, 72)])
def test_more_than_32_ranks(wide_program: Path, ranks: int, per_node: int, seed: int) -> None:
    """Sets of ranks are several words, and a block sends tables to several ranks."""
    done = run(wide_program, ranks, per_node, seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(2 * LIMIT_SECONDS)
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(("fault", "engine"), [(1, "one domain"), (2, "nodes")])
def test_a_fault_of_the_machine_is_noticed(program: Path, fault: int, engine: str, seed: int) -> None:
    """Packets that arrive in halves, signals before their data: the order of events is hard enough to show either."""
    done = run(program, 4, 2, seed, fault)
    assert done.returncode == 1
    assert re.search(rf"rank \d, ({engine}: wrong|line \d+:)", done.stderr), done.stderr
