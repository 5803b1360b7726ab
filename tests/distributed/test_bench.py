"""``python -m benchmarks`` on two ranks without a GPU: every subcommand measures what it says, and saves it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ops import Shape, routing
from tests.launch import torchrun

WITH_DEEP_EP = "tests.distributed.bench_with_compat"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
WITH_MEGATRON = importlib.util.find_spec("megatron") is not None
WITH_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def bench(folder: Path, *arguments: str, module: str = "benchmarks") -> tuple[str, list[dict[str, Any]]]:
    """Output and tables of one run."""
    file = folder / "bench.json"
    saving = ("--json", str(file), "--markdown", str(folder / "bench.md"), "--plot", str(folder / "bench.png"))
    output = torchrun(2, "-m", module, *arguments, "--repeats", "2", *saving, env=NO_GPU, timeout=240).stdout
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads(file.read_text())
    assert saved["command"].startswith(f"torchrun --nproc-per-node 2 -m benchmarks {arguments[0]}")
    assert str(folder) not in saved["command"]
    assert saved["environment"]["ranks"] == 2
    for table in saved["tables"]:
        assert output.count(table["title"]) == 1  # rank 0 alone speaks
        assert table["title"] in (folder / "bench.md").read_text()
        assert not [note for note in table["notes"] if "Not the same work" in note]
        for row in table["measurements"]:
            assert 0 < row["min_us"] <= row["median_us"] <= row["max_us"]
            assert len(row["samples_us"]) == 2
    return output, saved["tables"]


def test_ops(tmp_path: Path) -> None:
    shape = Shape(tokens=40, hidden=256, topk=2, experts=8)
    _, tables = bench(tmp_path, "ops", "--shape", "40,256,2,8", "--routing", "both", module=WITH_DEEP_EP)
    assert [table["case"]["imbalanced"] for table in tables] == [False, True]
    for table in tables:
        deep_ep = [row for row in table["measurements"] if row["setting"].startswith("deep_ep of deepep_moe ")]
        others = [row for row in table["measurements"] if row not in deep_ep]
        rows = {row["name"]: row for row in others}
        assert len(rows) == len(others)
        assert {row["setting"] for row in others} == {"collective", ""}

        # Tokens with a route to the other rank, counted from the routing itself.
        goes = [
            [(routing(shape, s, table["case"]["imbalanced"]) // 4 == d).any(1).sum() for d in (0, 1)] for s in (0, 1)
        ]
        link, logical = int(max(goes[0][1], goes[1][0])), int(torch.tensor(goes).sum(0).max())
        bf16, fp8, weights = 2 * 256, 256 + 4 * 2, 4 * 2
        for name, row_bytes in {
            "dispatch BF16": bf16,
            "dispatch FP8": fp8,
            "combine BF16": bf16,
            "grouped dispatch BF16 + weights": bf16 + weights,
            "grouped dispatch FP8": fp8,
            "grouped dispatch BF16, sent as FP8": fp8,
            "grouped dispatch BF16, through FP8": fp8,
            "grouped combine BF16": bf16,
            "call: plan + dispatch BF16, wall clock": bf16,
            "call: plan + dispatch FP8, wall clock": fp8,
            "call: plan + grouped dispatch BF16 + weights, wall clock": bf16 + weights,
            "call: plan + dispatch + combine BF16, wall clock": 2 * bf16,
            "gloo all_to_all_single BF16, own rows excluded": bf16,
            "gloo all_to_all_single FP8, own rows included": fp8,
        }.items():
            assert rows[name]["link_bytes"] == link * row_bytes, name
            assert rows[name]["logical_bytes"] == logical * row_bytes, name
        names = ["dispatch BF16", "dispatch FP8", "combine BF16"]
        names += [f"call: plan + {name}, wall clock" for name in (*names[:2], "dispatch + combine BF16")]
        assert [(row["name"], row["setting"].split()[-1]) for row in deep_ep] == [
            (name, interface) for interface in ("Buffer", "ElasticBuffer") for name in names
        ]
        for row in deep_ep:
            assert row["link_bytes"] == rows[row["name"]]["link_bytes"]
        assert "plan: until the host knows the counts" in rows
        assert "host time of dispatch + combine" in rows


def test_dispatcher(tmp_path: Path) -> None:
    _, (table,) = bench(tmp_path, "dispatcher", "--shape", "24,128,2,4", module=WITH_DEEP_EP)
    settings = ["TokenDispatcher, collective"]
    if WITH_MEGATRON:
        deepep = [f"Megatron deepep, {mode}collective" for mode in ("", "capacity mode, ")]
        settings = ["Megatron alltoall", *deepep, "Megatron flex, deep_ep of deepep_moe", *settings]
    phases = ["dispatch", "experts", "combine", "backward", "total"]
    shown = [(row["name"], row["setting"]) for row in table["measurements"]]
    assert shown == [(phase, setting) for phase in phases for setting in settings]
    assert table["reference"] == settings[0]
    assert not any("busy_samples_us" in row for row in table["measurements"])  # what a CPU computes is never behind


def test_latency(tmp_path: Path) -> None:
    _, tables = bench(tmp_path, "latency", "--layer", "256,2,8", "--tokens", "1,16")
    assert [table["case"]["tokens"] for table in tables] == [1, 16]
    for table in tables:
        tokens = table["case"]["tokens"]
        assert table["case"]["engine"] == "reference"
        rows = {(row["name"], row["setting"]): row for row in table["measurements"]}
        goes = [[(routing(Shape(tokens, 256, 2, 8), s, False) // 4 == d).any(1).sum() for d in (0, 1)] for s in (0, 1)]
        link = int(max(goes[0][1], goes[1][0]))
        if link:
            assert rows["dispatch FP8", "eager"]["link_bytes"] == link * (256 + 4 * 2)
            assert rows["combine BF16", "eager"]["link_bytes"] == link * 2 * 256
            assert rows["gloo all_to_all_single BF16", "eager"]["link_bytes"] == link * 2 * 256
        assert ("dispatch FP8 + combine", "host") in rows


def test_nodes(tmp_path: Path) -> None:
    shape, layer = ("--shape", "24,128,2,4"), ("--layer", "64,32,4,2", "--tokens", "16")
    _, (network, table, own_cost, *layers) = bench(tmp_path, "nodes", "--ranks-per-node", "1", *shape, *layer)
    assert network["title"] == "Network between 2 nodes of 1"
    assert [(row["setting"], row["link_bytes"]) for row in network["measurements"]] == [("1 MiB", 1 << 20)]
    settings = [f"TokenDispatcher, {name}" for name in ("collective", "hierarchical")]
    if WITH_MEGATRON:
        settings = [
            "Megatron alltoall",
            *(f"Megatron deepep, {name}" for name in ("collective", "hierarchical")),
            *settings,
        ]
        shown = [row["setting"] for row in layers[0]["measurements"] if row["name"] == "total"]
        assert shown == ["alltoall", "deepep, collective", "deepep, hierarchical"]
    shown = [row["setting"] for row in own_cost["measurements"] if row["name"] == "total"]
    name = "hierarchical without rows between nodes"
    assert shown == [name, f"{name}, fixed sizes"]
    totals = [row for row in table["measurements"] if row["name"] == "total"]
    assert [row["setting"] for row in totals] == settings
    assert table["title"].startswith("Dispatchers over 2 nodes of 1: ")
    owners = [routing(Shape(24, 128, 2, 4), rank, imbalanced=False) // 2 for rank in (0, 1)]
    elsewhere = [owner != rank for rank, owner in enumerate(owners)]
    floor = sum(int(e.any(1).sum()) for e in elsewhere) / 48
    for row in totals:
        rows = sum(int(e.sum()) for e in elsewhere) / 48 if "alltoall" in row["setting"] else floor
        assert row["details"] == {"rows across per token": rows, "floor": floor}


@pytest.mark.skipif(not WITH_MEGATRON, reason="megatron-core is not installed")
def test_megatron(tmp_path: Path) -> None:
    _, (table,) = bench(tmp_path, "megatron", "--layer", "64,32,4,2", "--tokens", "16")
    kinds = [("alltoall", ""), ("deepep", ", collective")]
    settings = [f"{name}, {experts}{end}" for experts in ("SequentialMLP", "GroupedExperts") for name, end in kinds]
    shown = [(row["name"], row["setting"]) for row in table["measurements"]]
    assert shown == [(phase, setting) for phase in ("forward", "backward", "total") for setting in settings]
    assert table["case"] == {"hidden": 64, "ffn": 32, "experts": 4, "topk": 2, "tokens": 16, "ranks": 2}


@pytest.mark.skipif(not WITH_DEEPSPEED, reason="deepspeed is not installed")
def test_deepspeed(tmp_path: Path) -> None:
    layers = ("--layer", "64,32,4,2", "--layer", "64,32,8,3")  # DeepSpeed has a gate for two experts, one for more
    _, tables = bench(tmp_path, "deepspeed", *layers, "--tokens", "16")
    # First the native layer, then AutoEP's, each in both shapes.
    expected = [
        (name, dtype, *shape)
        for name, dtype in (("DeepSpeed", "float32"), ("comm", "bfloat16"))
        for shape in ((4, 2), (8, 3))
    ]
    for table, (reference, dtype, experts, topk) in zip(tables, expected, strict=True):
        shown = [(row["name"], row["setting"]) for row in table["measurements"]]
        settings = [reference, "deepep, collective"]
        assert shown == [(phase, setting) for phase in ("forward", "backward", "total") for setting in settings]
        case = {"hidden": 64, "ffn": 32, "experts": experts, "topk": topk, "tokens": 16, "ranks": 2}
        assert table["case"] == {**case, "dtype": dtype}
        assert table["reference"] == reference
        assert not any("Not the same work" in note for note in table["notes"])


def test_a_shape_that_cannot_work_is_told_in_a_line() -> None:
    result = torchrun(2, "-m", "benchmarks", "ops", "--shape", "8,64,1,5", env=NO_GPU, check=False)
    assert result.returncode != 0
    assert "benchmarks: --shape = 8,64,1,5: experts must be a multiple of the 2 ranks" in result.stdout
    assert "InputError" not in result.stdout  # no stack trace
