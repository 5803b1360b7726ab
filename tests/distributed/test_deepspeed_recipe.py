"""The DeepSpeed recipe: it learns, resumes exactly, and names what is wrong with its settings."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.recipe_runs import assert_learned_and_reported, losses, metrics
from tests.launch import ROOT, torchrun

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

SCRIPT = "recipes/train_deepspeed.py"
STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.json, smaller: the shapes of a test."""
    settings = json.loads((ROOT / "recipes/ds_config/tiny.json").read_text())
    settings["model"].update(hidden_size=32, expert_hidden_size=32, shared_expert_hidden_size=16)
    settings["model"].update(key_value_heads=2, checkpoint_activations=True)
    settings["data"].update(sequence_length=32, held_out_windows=16)
    settings["train"].update(steps=STEPS, log_every=1, evaluate_every=4, save_every=4)
    settings["ds_config"].update(train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2)
    settings["ds_config"]["scheduler"]["params"].update(total_num_steps=STEPS, warmup_num_steps=2)
    path = tmp_path_factory.mktemp("recipe") / "small.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("finished")
    torchrun(2, SCRIPT, str(config), "--output", str(folder))
    return folder


def test_learns_and_reports(finished: Path) -> None:
    assert_learned_and_reported(finished, STEPS)


def test_resumed_run_equals_uninterrupted_run(finished: Path, config: Path) -> None:
    before = losses(finished)
    # as if the run had been killed after its checkpoint of step 4: later files are there, but not the newest
    latest = finished / "checkpoints/latest"
    assert latest.read_text() == "step-0000008"
    latest.write_text("step-0000004")

    output = torchrun(2, SCRIPT, str(config), "--output", str(finished), "--resume").stdout
    assert "resumed after step 4" in output
    assert losses(finished) == before


def test_checkpoint_of_another_run_is_refused(finished: Path, config: Path) -> None:
    result = alone(str(config), "--output", str(finished), "--resume")
    assert result.returncode == 1
    assert "written with processes = 2, this run has processes = 1" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.num_expert=4", "unknown key model.num_expert"),
        ("train.expert_parallel=3", "train.expert_parallel = 3 does not divide the 1 processes"),
        ("ds_config.deepep_moe={enabled: true, num_sm: 4}", "did you mean num_sms?"),
    ],
)
def test_wrong_setting_is_named(config: Path, tmp_path: Path, setting: str, message: str) -> None:
    result = alone(str(config), "--output", str(tmp_path), "--set", setting)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["mixtral_like", "deepseek_v3_proxy"])
def test_gpu_recipe_runs_in_small_on_cpus(name: str, tmp_path: Path) -> None:
    """The options of the file, bf16 and ZeRO-2 too, at sizes that a CPU can take."""
    settings = json.loads((ROOT / f"recipes/ds_config/{name}.json").read_text())
    settings["model"].update(
        layers=2, hidden_size=64, heads=8, key_value_heads=2, expert_hidden_size=32, vocab_size=256
    )
    if "shared_expert_hidden_size" in settings["model"]:
        settings["model"]["shared_expert_hidden_size"] = 32
    settings["data"].update(text="python-docs", sequence_length=32, held_out_windows=2)
    settings["train"].update(steps=2, log_every=1)
    (tmp_path / "small.json").write_text(json.dumps(settings))

    torchrun(2, SCRIPT, str(tmp_path / "small.json"), "--output", str(tmp_path / "run"))
    trained = [entry["train_loss"] for entry in metrics(tmp_path / "run") if "train_loss" in entry]
    assert len(trained) == 2
    assert all(math.isfinite(loss) for loss in trained)
    assert not list((tmp_path / "run").glob("checkpoints/*"))  # save_every: 0


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
