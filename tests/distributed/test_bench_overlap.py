"""``benchmarks overlap`` on two ranks without a GPU: every order does the same work, and what was asked is saved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from tests.launch import torchrun

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
WITH_MEGATRON = importlib.util.find_spec("megatron") is not None
SMALL = ("overlap", "--layer", "64,32,4,2", "--tokens", "24")


def test_overlap(tmp_path: Path) -> None:
    saving = (
        "--json",
        str(tmp_path / "o.json"),
        "--plot",
        str(tmp_path / "o.png"),
        "--trace",
        str(tmp_path / "traces"),
    )
    asked = ("--chunks", "3", "--repeats", "2", *saving)
    torchrun(2, "-m", "benchmarks", *SMALL, *asked, env=NO_GPU)
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["command"] == "torchrun --nproc-per-node 2 -m benchmarks overlap " + " ".join(
        [*SMALL[1:], "--chunks", "3", "--repeats", "2"]
    )
    assert len(saved["tables"]) == 1 + WITH_MEGATRON
    variants = [(row["name"], row["setting"]) for table in saved["tables"] for row in table["measurements"]]
    assert variants == [
        ("collective", "serial"),
        ("collective", "shared expert overlapped"),
        ("collective", "3 chunks"),
    ] + [
        (name, setting)
        for name in ("alltoall", "deepep, collective")
        for setting in ("serial", "shared expert overlapped")
        if WITH_MEGATRON
    ]
    assert not [note for table in saved["tables"] for note in table["notes"] if "Not the same work" in note]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "traces").iterdir()}
    assert names == {f"{row}-{setting}.json".replace(", ", "-").replace(" ", "_") for row, setting in variants}
    assert json.loads((tmp_path / "traces" / "collective-serial.json").read_text())["traceEvents"]


def test_what_is_refused(tmp_path: Path) -> None:
    refusals = {
        ("--chunks", "0"): "--chunks = 0: comma-separated positive integers",
        ("--timeline", str(tmp_path / "t.png")): "--timeline shows kernels, and there is no GPU",
    }
    for option, told in refusals.items():
        result = torchrun(1, "-m", "benchmarks", *SMALL, *option, env=NO_GPU, check=False)
        assert result.returncode and told in result.stdout
