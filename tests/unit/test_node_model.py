"""The model of several nodes: it predicts what was measured, and its rows are those of the routing."""

from __future__ import annotations

import pytest

from benchmarks import node_model
from benchmarks.__main__ import main
from benchmarks.node_model import KINDS, MEASURED, Cluster
from benchmarks.nodes import crossing_rows
from benchmarks.ops import Shape

SHAPE = Shape(4096, 7168, 8, 256)


@pytest.mark.parametrize(("kind", "tokens", "measured"), MEASURED)
def test_it_predicts_what_was_measured(kind: str, tokens: int, measured: float) -> None:
    shape = SHAPE._replace(tokens=tokens)
    assert node_model.step_us(kind, shape, node_model.SOCKETS) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("nodes", "size"), [(2, 2), (4, 2), (2, 8)])
def test_its_rows_are_those_of_the_benchmarks_routing(nodes: int, size: int) -> None:
    counted = crossing_rows(Shape(1024, 8, 8, 256), nodes * size, size)
    for kind in KINDS:
        assert node_model.crossing_rows(kind, SHAPE, Cluster(nodes, size, 50.0)) == pytest.approx(
            counted[kind], rel=0.03
        )


def test_one_node_sends_nothing_and_many_never_more_than_top_k() -> None:
    for kind in KINDS:
        assert node_model.crossing_rows(kind, SHAPE, Cluster(1, 8, 50.0)) == 0
        assert 0 < node_model.crossing_rows(kind, SHAPE, Cluster(32, 8, 50.0)) <= SHAPE.topk


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--nodes", "1,4"]) == 0
    printed = capsys.readouterr().out
    assert "Two nodes of two H100s" in printed
    assert "Predicted: 4096 tokens per rank" in printed
    assert main(["model", "--shape", "8,8,1,9"]) == 1
    assert "benchmarks: --shape = 8,8,1,9: experts must be a multiple" in capsys.readouterr().err
