"""The programs of examples/ on two gloo ranks: what they print, beside the same program on one rank."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.launch import ROOT, environment, torchrun

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.[ps]*"))


def free_port(candidates: Iterable[int] = (0,)) -> int:
    for port in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise AssertionError("no free port")


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the only rank of a job, for a process group in this process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(variable, str(value))


def on_one_rank(name: str) -> Any:
    """The result of the example's ``train()`` in this process, where all experts are local."""
    dist.init_process_group("gloo")
    try:
        return runpy.run_path(str(ROOT / "examples" / name))["train"]()
    finally:
        dist.destroy_process_group()


def losses(output: str, start: str) -> tuple[float, float]:
    """First and last loss of the line that begins with ``start``."""
    found = re.search(rf"^{start}: .*?([\d.]+) -> ([\d.]+)$", output, flags=re.MULTILINE)
    assert found is not None, output
    return float(found[1]), float(found[2])


def run(name: str) -> str:
    return torchrun(2, f"examples/{name}", env={"CUDA_VISIBLE_DEVICES": ""}, timeout=200).stdout


def test_the_table_lists_every_example() -> None:
    table = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\S+)` \|", table, flags=re.MULTILINE)) == EXAMPLES
    for name in EXAMPLES:
        assert f" examples/{name}" in table, name


@pytest.mark.usefixtures("one_rank")
def test_the_page_on_pytorch_begins_with_a_program() -> None:
    page = (ROOT / "docs/pytorch.md").read_text(encoding="utf-8")
    program = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)[0]
    names: dict[str, Any] = {}
    try:
        exec(program, names)
        x = torch.randn(4, 256)
        names["net"](x).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in names["net"].parameters())
    finally:
        names.clear()
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp() -> None:
    first, last = losses(run("ddp.py"), "2 ranks, 4 experts each")
    alone = on_one_rank("ddp.py")
    assert last < 0.7 * first
    assert (first, last) == pytest.approx((alone[0], alone[-1]), abs=1e-4)


@pytest.mark.usefixtures("one_rank")
def test_fsdp2_as_slurm_starts_it(tmp_path: Path) -> None:
    for name, text in (
        ("srun", 'shift; exec "$@"'),
        ("scontrol", "echo localhost"),
        ("python", f'exec {sys.executable} "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": str(free_port(range(20000 + os.getpid() % 10000, 40000)) - 20000),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "GPUS": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "examples/slurm.sbatch", "examples/fsdp2.py", "--experts", "1"],
        cwd=ROOT,
        env={**environment(), **variables},
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, last = losses(done.stdout, "2 ranks, 8 experts each")
    alone = on_one_rank("fsdp2.py")
    assert last < 0.8 * first
    assert (first, last) == pytest.approx((alone[0], alone[-1]), abs=1e-4)


def test_checkpointing_and_compiling_change_nothing() -> None:
    output = run("checkpoint_and_compile.py")
    first, last = losses(output, "eager")
    assert last < first
    for name in ("checkpointed", "compiled"):
        assert losses(output, name) == pytest.approx((first, last), abs=1e-5)


def test_huggingface() -> None:
    pytest.importorskip("transformers", minversion="5")
    output = run("huggingface.py")
    found = re.search(r"^largest difference of logits to the original model: (\S+)$", output, flags=re.MULTILINE)
    assert found is not None and float(found[1]) < 1e-5
    first, last = losses(output, "2 ranks, 4 experts each")
    assert last < 0.1 * first


def test_rollout_and_train() -> None:
    output = run("rollout_and_train.py")
    first, last = losses(output, "2 ranks")
    assert first < 0.5 and last > 0.9  # mean rewards
    found = re.search(r"differ by at most ([\d.]+)", output)
    assert found is not None and 0 < float(found[1]) < 0.5


def test_torchtitan() -> None:
    pytest.importorskip("torchtitan.distributed.deepep", reason="torchtitan is not installed", exc_type=ImportError)
    found = re.search(r"output ([\d.]+), gradients ([\d.]+)", run("torchtitan_deepep.py"))
    assert found is not None and float(found[1]) < 0.01 and float(found[2]) < 0.02
