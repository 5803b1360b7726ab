"""The benchmark's arithmetic: what counts as bytes over the link, how tables are made, how often things are called."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import latency, ops, peers, timing
from benchmarks.__main__ import parse_budgets, picture
from benchmarks.candidates import Candidate, measure, with_settings
from benchmarks.dispatcher import CAPACITY_FACTOR, capacity_factor
from benchmarks.megatron_layer import LAYERS, Layer
from benchmarks.ops import HOT, LINK_BYTES, Shape, Traffic, ceiling_table, link_targets, routing, sent_bytes
from benchmarks.report import Measurement, Report, Table, bars, command_line
from benchmarks.timing import CALLS, WARMUP, Phases
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import InputError
from deepep_moe.tools.world import World, ranks_of_this_run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A run of one rank on the CPU."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with ranks_of_this_run() as world:
        yield world


def test_shapes_are_read_and_wrong_ones_are_named() -> None:
    assert Shape.parse("4096,7168,8,256") == Shape(tokens=4096, hidden=7168, topk=8, experts=256)
    for text in ("4096", "1,2,3,4,5", "4096,7168,8,many", "0,7168,8,256", "64,64,9,8"):
        with pytest.raises(InputError, match=f"--shape = {text}: four positive integers"):
            Shape.parse(text)
    with pytest.raises(InputError, match="experts must be a multiple of the 3 ranks"):
        Shape(64, 64, 2, 8).check(3)


def test_layers_are_read_by_name_or_numbers() -> None:
    assert Layer.parse("mixtral") == LAYERS["mixtral"] == Layer(hidden=4096, ffn=14336, experts=8, topk=2)
    assert Layer.parse("64,32,4,2") == Layer(hidden=64, ffn=32, experts=4, topk=2)
    for text in ("mistral", "64,32,4", "64,32,4,5"):
        with pytest.raises(InputError, match=f"--layer = {text}: deepseek, mixtral, or"):
            Layer.parse(text)


def test_budgets() -> None:
    assert parse_budgets("0,24") == [0, 24]
    for text in ("", "24,", "-1", "all"):
        with pytest.raises(InputError, match="--num-sms"):
            parse_budgets(text)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_measurement() -> None:
    assert picture("a/latency.svg") == Path("a/latency.svg")
    for text in ("latency.foo", "latency"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} does not end with one of .png, .svg, .pdf"):
            picture(text)


@pytest.mark.parametrize("imbalanced", [False, True])
def test_routing_loads_experts_as_it_says(imbalanced: bool) -> None:
    shape = Shape(tokens=4000, hidden=8, topk=2, experts=64)
    topk_idx = routing(shape, 0, imbalanced)
    assert topk_idx.shape == (4000, 2)
    assert torch.all(topk_idx[:, 0] != topk_idx[:, 1])
    assert torch.equal(topk_idx, routing(shape, 0, imbalanced))
    assert not torch.equal(topk_idx, routing(shape, 1, imbalanced))
    loads = topk_idx.flatten().bincount(minlength=64).float()
    ratio = loads[:8].mean() / loads[8:].mean()
    assert ratio == pytest.approx(HOT if imbalanced else 1, rel=0.1)


def test_only_rows_between_ranks_are_on_the_link() -> None:
    #                    to rank 0   1   2
    traffic = Traffic(torch.tensor([[50, 7, 1], [2, 60, 3], [20, 4, 70]]))
    assert traffic.link == 20 + 4  # rank 2 sends more than any rank receives (2 + 20, 7 + 4, 1 + 3) or sends
    assert traffic.logical == 70 + 3 + 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 32])
def test_link_ceiling_fills_the_memory_of_all_peers_once(ranks: int) -> None:
    part = sent_bytes(ranks) // (ranks - 1)
    assert part % 16 == 0 and LINK_BYTES - 128 * ranks < part * (ranks - 1) <= LINK_BYTES
    addresses = [rank << 40 for rank in range(ranks)]
    sent = [link_targets(rank, addresses) for rank in range(ranks)]
    assert all(target >> 40 != rank for rank, targets in enumerate(sent) for target in targets)
    wanted = [address + number * part for address in addresses for number in range(ranks - 1)]
    assert sorted(target for targets in sent for target in targets) == wanted
    for turn in zip(*sent):  # in every turn each rank is stored to by one other
        assert len({target >> 40 for target in turn}) == ranks


def test_deep_ep_is_left_out_in_words_where_it_is_not_installed(
    alone: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)  # an import of it fails
    backends = ops.make_backends(alone, [0])
    table = ops.measure_case(alone, backends, Shape(4, 128, 2, 4), False, 1, 0.0, lambda name: None)
    assert [note for note in table.notes if note.startswith("DeepEP is not timed: deep_ep is not installed")]
    assert {row.setting for row in table.rows} == {"collective", ""}

    (tmp_path / "deep_ep.py").write_text("class Buffer: ...")
    monkeypatch.delitem(sys.modules, "deep_ep")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.missing(alone) == "deep_ep needs GPUs"
    assert peers.missing(World(0, 1, torch.device("cuda"), "nccl")) == "deep_ep needs several ranks"
    assert peers.missing(World(0, 2, torch.device("cuda"), "nccl")) is None
    assert peers.version() == "of unknown version"


def test_a_picture_has_few_bars_the_best_first() -> None:
    phases = [Measurement(phase, [us], name) for name, us in (("a", 3e3), ("b", 1e3)) for phase in ("forward", "total")]
    assert bars(Table("", {}, rows=phases)) == [("b", 1.0, "b"), ("a", 3.0, "a")]
    moved = [Measurement(f"{kind}{n}", [1e3], "", link_bytes=n * 10**6) for kind in ("call: ", "") for n in range(8)]
    shown = bars(Table("", {}, rows=[*moved, Measurement("host", [1.0])]))
    assert [(label, value) for label, value, _ in shown] == [(f"{n}", n) for n in range(7, 0, -1)]
    assert len(bars(Table("", {}, rows=moved[4:]))) == 11  # few enough: calls too


def test_link_ceiling_is_bytes_over_time(alone: World) -> None:
    table = ceiling_table(World(0, 4, torch.device("cpu"), "nccl"), [sent_bytes(4) / 300e3] * 3)
    assert dict(table.columns())["link GB/s"] == ["300"]
    assert ops.link_ceiling(alone, 1) == []


def test_kernel_time_is_per_call_and_counts_no_warm_up(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        calls.append(len(calls))
        clock[0] += 1.0 if len(calls) <= WARMUP * (1 + CALLS) else 3e-6

    samples = timing.kernel_samples(alone, call, repeats=4)
    assert len(calls) == (WARMUP + 4) * (1 + CALLS)
    assert samples == pytest.approx([3.0] * 4, rel=1e-3)


def test_phases_add_up_to_the_total(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def step(phase: Phases) -> None:
        clock[0] += 2e-6
        phase("dispatch")
        clock[0] += 5e-6
        phase("combine")

    samples = timing.step_samples(alone, step, repeats=2)
    assert list(samples) == ["dispatch", "combine", "total"]
    assert samples["dispatch"] == pytest.approx([2.0] * 2)
    assert samples["combine"] == pytest.approx([5.0] * 2)
    assert samples["total"] == pytest.approx([7.0] * 2)


class FakeGPU:
    """A host clock, and a device that does what is enqueued one after the other; microseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.free = 0.0  # now, and when the device will be done
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.synchronize())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.enqueue(cycles / 2000))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op=None: None)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def enqueue(self, duration: float) -> float:
        self.free = max(self.host, self.free) + duration
        return self.free


class FakeEvent:
    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.time = self.gpu.enqueue(0)

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.time - self.time) / 1e3  # milliseconds, as CUDA's events give them


def test_on_a_busy_gpu_a_step_pays_for_waits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    world = World(0, 1, torch.device("cuda"), "gloo")

    def step(phase: Phases) -> None:
        gpu.host += 300  # Python and launches
        gpu.enqueue(100)
        phase("launched")
        gpu.enqueue(20)
        gpu.synchronize()  # the host reads a result
        gpu.host += 40
        gpu.enqueue(100)
        phase("waited")

    idle = timing.step_samples(world, step, repeats=2)
    busy = timing.step_samples(world, step, repeats=2, busy_ms=1)
    expected = {"launched": 300.0 + 100, "waited": 20.0 + 40 + 100, "total": 560.0}
    assert {name: pytest.approx([time] * 2) for name, time in expected.items()} == idle
    expected.update(launched=100.0, total=260.0)
    assert {name: pytest.approx([time] * 2) for name, time in expected.items()} == busy


def test_the_capacity_mode_gets_the_room_that_the_busiest_rank_needs() -> None:
    assert capacity_factor(Shape(tokens=4096, hidden=8, topk=8, experts=256), ranks=2) == CAPACITY_FACTOR
    for ranks in (2, 4, 8):
        shape = Shape(tokens=3, hidden=8, topk=2, experts=16)
        rows = [0] * ranks
        for rank in range(ranks):
            for expert in routing(shape, rank, imbalanced=False).flatten().tolist():
                rows[expert * ranks // shape.experts] += 1
        factor = capacity_factor(shape, ranks)
        assert max(rows) <= factor * shape.tokens * shape.topk
        assert factor < max(rows) / (shape.tokens * shape.topk) + 0.25 or factor == CAPACITY_FACTOR


def test_settings_hold_while_a_candidate_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_NUM_SMS", "48")
    monkeypatch.delenv("DEEPEP_MOE_CAPACITY_FACTOR", raising=False)
    built = []

    def build() -> Callable[[Phases], torch.Tensor]:
        built.append(DispatcherConfig.load())
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        with_settings(build, num_sms=24, capacity_factor=1.5)()
    assert built == [DispatcherConfig(num_sms=24, capacity_factor=1.5)]
    assert DispatcherConfig.load() == DispatcherConfig(num_sms=48)


def test_candidates_that_do_other_work_are_reported(alone: World) -> None:
    def giving(value: float) -> Candidate:
        def step(phase: Phases) -> torch.Tensor:
            phase("forward")
            return torch.tensor([1.0, value])

        return Candidate(f"{value}", lambda: step)

    table = Table("", {})
    measure(alone, table, [giving(2.0), giving(2.01), giving(2.5)], 2, lambda name: None)
    assert table.notes == ["Not the same work: outputs of 2.5 and 2.0 differ by 25.0% of the largest."]
    shown = [(row.name, row.setting) for row in table.rows]
    assert shown == [(phase, setting) for phase in ("forward", "total") for setting in ("2.0", "2.01", "2.5")]


def test_a_table_shows_what_was_measured() -> None:
    rows = [
        Measurement("dispatch", [400.0, 200.0, 100.0], "new", link_bytes=40_000_000, logical_bytes=80_000_000),
        Measurement("dispatch", [400.0], "old"),
        Measurement("host", [12.34], "new"),
    ]
    table = Table("title", {}, rows=rows, ceiling=400.0, reference="old")
    assert dict(table.columns()) == {
        "": ["dispatch", "dispatch", "host"],
        "setting": ["new", "old", "new"],
        "median us": ["200", "400", "12.3"],
        "min": ["100", "400", "12.3"],
        "max": ["400", "400", "12.3"],
        "/ old": ["0.50", "1.00", ""],
        "link GB/s": ["200", "", ""],  # 40 MB in 200 us
        "of ceiling": ["50 %", "", ""],
        "logical GB/s": ["400", "", ""],
    }


def test_a_table_shows_steps_on_busy_gpus_beside() -> None:
    rows = [
        Measurement("dispatch", [500.0], "alltoall", busy_us=[400.0]),
        Measurement("dispatch", [250.0], "deepep", busy_us=[90.0, 100.0, 150.0]),
    ]
    table = Table("title", {}, rows=rows, reference="alltoall")
    shown = [column for column in table.columns() if column[0] not in ("min", "max")]
    assert shown == [
        ("", ["dispatch", "dispatch"]),
        ("setting", ["alltoall", "deepep"]),
        ("median us", ["500", "250"]),
        ("/ alltoall", ["1.00", "0.50"]),
        ("GPU busy before us", ["400", "100"]),
        ("/ alltoall", ["1.00", "0.25"]),
    ]
    saved = table.as_json()["measurements"][1]
    assert (saved["busy_median_us"], saved["busy_samples_us"]) == (100.0, [90.0, 100.0, 150.0])


def test_a_report_is_saved_with_what_it_takes_to_repeat_it(alone: World, tmp_path: Path) -> None:
    files = {"json": tmp_path / "new" / "a.json", "markdown": tmp_path / "a.md", "plot": tmp_path / "a.png"}
    report = Report.start(alone, files, "abc1234", Console(quiet=True))
    memory = (3 * 2**20, 2**20)
    report.add(Table("One", {"tokens": 4}, ["A note."], [Measurement("copy", [2.0, 4.0], "x", 1000, memory=memory)]))
    report.add(Table("Two", {}, [], [Measurement("plan", [7.0])]))

    saved = json.loads(files["json"].read_text())
    assert saved["environment"]["commit"] == "abc1234"
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["environment"]["devices"] == "1 x CPU rank"
    assert [table["title"] for table in saved["tables"]] == ["One", "Two"]
    assert saved["tables"][0]["case"] == {"tokens": 4}
    assert saved["tables"][0]["measurements"] == [
        {
            "name": "copy",
            "setting": "x",
            "median_us": 3.0,
            "min_us": 2.0,
            "max_us": 4.0,
            "samples_us": [2.0, 4.0],
            "link_bytes": 1000,
            "link_gb_per_s": pytest.approx(1 / 3),
            "peak_bytes": memory[0],
            "outside_allocator_bytes": memory[1],
        }
    ]
    markdown = files["markdown"].read_text()
    for part in markdown.split("### ")[1:]:
        assert report.command in part
        assert f"1 x CPU rank; deepep_moe {saved['environment']['deepep_moe']}; torch {torch.__version__}" in part
        assert "commit abc1234" in part
    assert "| copy | x | 3.0 | 2.0 | 4.0 | 0.3 | 3.0 | 1.0 |" in markdown
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_the_command_is_shown_without_where_results_go(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["ops", "--json", "/x/a.json", "--shape", "8,8,1,2", "--plot=/x/a.png", "--num-sms", "0,24"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert command_line(arguments) == "python -m benchmarks ops --shape 8,8,1,2 --num-sms 0,24"
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert command_line(["ops"]) == "torchrun --nnodes 2 --nproc-per-node 8 -m benchmarks ops"


def test_low_latency_cases_ask_for_the_symmetric_memory_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_MOE_NVSHMEM_BYTES", str(1 << 20))
    layer, counts = latency.Layer(7168, 8, 288), [1, 128, 512]
    rows = 2 * 2 * 2 * 7168 * sum(counts)  # of dispatch and combine, in both halves, from one rank
    asked = latency.config_for(layer, counts, 32).nvshmem_bytes
    assert 32 * rows < asked < 2.2 * 32 * rows
    monkeypatch.setenv("DEEPEP_MOE_NVSHMEM_BYTES", str(1 << 35))
    assert latency.config_for(layer, counts, 32).nvshmem_bytes == 1 << 35
