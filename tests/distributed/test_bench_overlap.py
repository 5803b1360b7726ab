"""``bench overlap`` on two ranks without a GPU: every order does the same work, and what was asked for is saved."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch import torchrun

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SMALL = ("bench", "overlap", "--layer", "64,32,4,2", "--tokens", "24")


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
    torchrun(2, "-m", "deepep_moe", *SMALL, *asked, env=NO_GPU)
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["command"] == "torchrun --nproc-per-node 2 -m deepep_moe bench overlap " + " ".join(
        [*SMALL[2:], "--chunks", "3", "--repeats", "2"]
    )
    (table,) = saved["tables"]
    assert [row["setting"] for row in table["measurements"]] == ["in turn", "shared expert beside", "3 chunks"]
    assert not [note for note in table["notes"] if "Not the same work" in note]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "traces").iterdir()}
    assert names == {f"collective-{order}.json" for order in ("in_turn", "shared_expert_beside", "3_chunks")}
    assert json.loads((tmp_path / "traces" / "collective-in_turn.json").read_text())["traceEvents"]


def test_what_is_refused(tmp_path: Path) -> None:
    refusals = {
        ("--chunks", "0"): "--chunks = 0: comma-separated positive integers",
        ("--timeline", str(tmp_path / "t.png")): "--timeline shows kernels, and there is no GPU",
    }
    for option, told in refusals.items():
        result = torchrun(1, "-m", "deepep_moe", *SMALL, *option, env=NO_GPU, check=False)
        assert result.returncode and told in result.stdout
