"""The Megatron-Core recipe: it learns, resumes exactly, has the right gradients and readable errors."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.recipe_runs import assert_learned_and_reported, losses, metrics
from tests.launch import ROOT, all_cases, check_case, torchrun

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
if importlib.util.find_spec("megatron") is not None:
    CASES = all_cases("tests.distributed.cases_recipe", ranks=(2, 4))
else:
    CASES = []

SCRIPT = "recipes/train_megatron.py"
STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.yaml, smaller: the shapes of a test."""
    settings = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())
    settings["model"].update(hidden_size=32, moe_ffn_hidden_size=32)
    settings["data"].update(sequence_length=32, held_out_windows=16)
    settings["train"].update(
        steps=STEPS, sequences=4, accumulate=2, warmup_steps=2, log_every=1, evaluate_every=4, save_every=4
    )
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("finished")
    torchrun(2, SCRIPT, str(config), "--output", str(folder))
    return folder


def test_learns_and_reports(finished: Path) -> None:
    assert_learned_and_reported(finished, STEPS)
    assert sorted(p.name for p in (finished / "checkpoints/step-0000008").iterdir()) == ["rank-0.pt", "rank-1.pt"]


def test_resumed_run_equals_uninterrupted_run(finished: Path, config: Path, tmp_path: Path) -> None:
    before = losses(finished)
    # as if the run had been killed after its checkpoint of step 4: later files are there, but not complete
    pointer = finished / "checkpoints/latest.json"
    latest = json.loads(pointer.read_text())
    assert latest["step"] == STEPS
    pointer.write_text(json.dumps({**latest, "step": 4}))

    output = torchrun(2, SCRIPT, str(config), "--output", str(finished), "--resume").stdout
    assert "resumed after step 4" in output
    assert losses(finished) == before


def test_checkpoint_of_another_run_is_refused(finished: Path, config: Path) -> None:
    command = [sys.executable, SCRIPT, str(config), "--output", str(finished), "--resume"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "written with processes = 2, this run has processes = 1" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.precision=bf16", "written with precision = fp32, this run has precision = bf16"),
        ("gpt.rotary_base=2", "written with gpt = {"),
    ],
)
def test_checkpoint_of_another_model_is_refused(finished: Path, config: Path, setting: str, message: str) -> None:
    options = ["--output", str(finished), "--resume", "--set", setting]
    result = torchrun(2, SCRIPT, str(config), *options, check=False)
    assert result.returncode == 1
    assert message in result.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dispatcher.num_smss=4", "unknown setting 'num_smss' from section dispatcher (did you mean num_sms?)"),
        ("train.expert_parallel=3", "train.expert_parallel = 3 does not divide the 1 processes"),
        ("dispatcher.capacity_factor=1.5", "dispatcher.capacity_factor = 1.5 needs gpt.grouped_experts=true"),
        ("model.num_attention_heads=0", "section model: Megatron-Core refuses it"),
        ("model.normalization=5", "section model: Megatron-Core refuses it: Only LayerNorm, RMSNorm"),
    ],
)
def test_wrong_setting_is_named(config: Path, tmp_path: Path, setting: str, message: str) -> None:
    command = [sys.executable, SCRIPT, str(config), "--output", str(tmp_path), "--set", setting]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_two_ranks_end_with_one_sentence(config: Path, tmp_path: Path) -> None:
    settings = ["--set", "model.num_moe_experts=7", "--output", str(tmp_path)]
    result = torchrun(2, SCRIPT, str(config), *settings, check=False)
    assert result.returncode == 1
    sentence = "model.num_moe_experts = 7: allowed is a positive multiple of 2"
    assert sentence in [line for line in result.stdout.splitlines() if line.strip("= ")][-1]
    assert len(result.stdout.splitlines()) < 60


def test_an_error_of_rank_1_alone_is_not_lost(config: Path, tmp_path: Path) -> None:
    """Whichever rank torchrun ends first, its report has the error of the rank that failed."""
    (tmp_path / "train_badly.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "import train_megatron\n"
        "original = train_megatron.build_model\n"
        "def build_model(config, gpt, length, world):\n"
        "    assert world.rank == 0, 'only here'\n"
        "    return original(config, gpt, length, world)\n"
        "train_megatron.build_model = build_model\n"
        "train_megatron.app()\n"
    )
    result = torchrun(2, str(tmp_path / "train_badly.py"), str(config), "--output", str(tmp_path), check=False)
    assert result.returncode == 1
    report = result.stdout[result.stdout.index("Root Cause") :]
    assert "error on rank 1: AssertionError: only here" in report
    assert "in build_model: assert world.rank == 0" in report


@pytest.mark.parametrize("name", ["mixtral_like", "deepseek_v3_proxy", "qwen3_30b_a3b_like"])
def test_gpu_recipe_runs_in_small_on_cpus(name: str, tmp_path: Path) -> None:
    """The options of the file, at sizes that a CPU can take; fewer heads and groups only where sizes ask for it."""
    small = {
        "model": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 32, "kv_channels": 16},
        "gpt": {"vocab_size": 256},
        "data": {"text": "python-docs", "sequence_length": 32, "held_out_windows": 2},
        "train": {"steps": 2, "log_every": 1},
    }
    settings = yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())
    assert settings["model"]["moe_token_dispatcher_type"] == "deepep"
    for section, values in small.items():
        settings[section].update(values)
    if settings["model"]["num_layers"] > 4:
        settings["model"]["num_layers"] = 2
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))

    torchrun(2, SCRIPT, str(tmp_path / "small.yaml"), "--output", str(tmp_path / "run"))
    trained = [entry["train_loss"] for entry in metrics(tmp_path / "run") if "train_loss" in entry]
    assert len(trained) == 2
    assert all(math.isfinite(loss) for loss in trained)
    assert not list((tmp_path / "run").glob("checkpoints/*"))  # save_every: 0


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_gradients_do_not_depend_on_expert_parallelism(ranks: int, name: str) -> None:
    check_case("tests.distributed.cases_recipe", ranks, name)
