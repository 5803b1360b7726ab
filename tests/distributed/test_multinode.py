"""The recipes for several nodes, as far as one machine goes: two torchrun agents, and stand-ins for SLURM."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.nodes import crossing_rows
from benchmarks.ops import Shape
from tests.distributed.recipe_runs import metrics
from tests.launch import ROOT, environment

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)
SMALL = (
    *("--set", "model.hidden_size=32", "--set", "model.moe_ffn_hidden_size=32", "--set", "data.sequence_length=32"),
    *("--set", "data.held_out_windows=4", "--set", "train.steps=2", "--set", "train.log_every=1"),
    *("--set", "train.sequences=2", "--set", "train.save_every=0"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_both(commands: list[list[str]], variables: dict[str, str]) -> list[str]:
    """Outputs of commands that run side by side; all of them end here."""
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(), **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in running]
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, output in zip(running, outputs):
        assert process.returncode == 0, output[-4000:]
    return outputs


@needs_megatron
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_torchrun_agents_train_together(tmp_path: Path) -> None:
    """Two nodes of two ranks each, and the hierarchical backend between them."""
    variables = {
        "NODES": "2",
        "ENDPOINT": f"127.0.0.1:{free_port()}",
        "RANKS": "2",
        "DEEPEP_MOE_PYTHON": sys.executable,
        "DEEPEP_MOE_BACKEND": "hierarchical",
        "DEEPEP_MOE_RANKS_PER_NODE": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", "recipes/multinode.sh", "recipes/tiny.yaml", "--output", str(tmp_path / "run"), *SMALL]
    run_both([command, command], variables)
    trained = [entry for entry in metrics(tmp_path / "run") if "train_loss" in entry]
    assert [entry["step"] for entry in trained] == [1, 2]


def test_the_sbatch_file_starts_one_torchrun_per_node(tmp_path: Path) -> None:
    """With stand-ins for SLURM's own commands."""
    for name, text in {
        "scontrol": 'echo "node7"; echo "node8"',
        "srun": 'echo "srun $*"; shift; exec "$@"',
        "python": 'echo "python $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DEEPEP_MOE_PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "41",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RANKS": "8",
    }
    (output,) = run_both([["bash", "recipes/multinode.sbatch", "recipes/tiny.yaml"]], variables)
    assert "srun --kill-on-bad-exit=1 bash recipes/multinode.sh recipes/tiny.yaml" in output
    assert "--nnodes 2 --nproc-per-node 8" in output
    assert "--rdzv-endpoint node7:20041 --rdzv-id 41 recipes/train_megatron.py recipes/tiny.yaml" in output


def test_rows_that_cross_are_counted_from_the_routing() -> None:
    """Top-8 of 256 over two nodes of two: what ../docs/multinode.md quotes."""
    rows = crossing_rows(Shape(512, 8, 8, 256), ranks=4, size=2)
    assert rows["alltoall"] == pytest.approx(4.0, abs=0.1)
    assert rows["collective"] == pytest.approx(1.8, abs=0.05)
    assert 0.98 < rows["hierarchical"] <= 1.0
