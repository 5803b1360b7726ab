"""The arithmetic of ``benchmarks overlap``: what a trace says about hidden communication."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from benchmarks.overlap import Span, Timeline, covered, draw, hidden_time, in_both, length, spans_of

DISPATCH = "void deepep_moe::(anonymous namespace)::dispatch_kernel(deepep_moe::DispatchArgs)"
GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"


def kernel(name: str, stream: int, start: float, duration: float) -> dict[str, object]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def test_spans_of_a_trace() -> None:
    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1000.0, "dur": 9.0, "args": {}},
            kernel(GEMM, 7, 1030.0, 5.0),
            kernel(DISPATCH, 20, 1020.0, 12.5),
            {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 1021.0, "dur": 1.0, "args": {"stream": 7}},
        ]
    }
    spans = spans_of(trace)
    assert [(span.stream, span.start, span.stop) for span in spans] == [(20, 0, 12.5), (7, 1, 2), (7, 10, 15)]
    assert [span.kind for span in spans] == ["communication", "other kernels", "GEMMs"]
    assert spans_of({"traceEvents": []}) == []


def test_hidden_time() -> None:
    spans = [
        Span(DISPATCH, 20, 0.0, 10.0),  # alone until 4, then beside a fill and a GEMM
        Span("fill", 7, 4.0, 7.0),
        Span(GEMM, 7, 6.0, 12.0),
        Span("combine_kernel", 20, 30.0, 34.0),  # beside a dispatch only: that hides nothing
        Span("dispatch_kernel", 21, 32.0, 40.0),
    ]
    told = hidden_time(spans)
    assert told == {"communication us": 20, "hidden us": 6, "hidden %": 30, "GEMMs us": 6}
    assert hidden_time([])["hidden %"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_intervals_against_a_count_of_ticks(seed: int) -> None:
    draws = random.Random(seed)
    sets = []
    for _ in range(2):
        starts = [draws.randrange(200) for _ in range(draws.randrange(30))]
        sets.append([Span("k", 0, start, start + draws.randrange(1, 20)) for start in starts])
    ticks = [{t for span in spans for t in range(int(span.start), int(span.stop))} for spans in sets]
    for spans, wanted in zip(sets, ticks):
        intervals = covered(spans)
        assert length(intervals) == len(wanted)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(intervals))
    assert length(in_both(covered(sets[0]), covered(sets[1]))) == len(ticks[0] & ticks[1])


def test_timeline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spans = [Span(DISPATCH, 20, 0.0, 10.0), Span(GEMM, 7, 6.0, 12.0)]
    picture = tmp_path / "new" / "timeline.png"
    draw([Timeline("serial", spans), Timeline("2 chunks", [])], "a title", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
