"""What the recipes share: settings, text, optimizer, timing, journal, checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import typer

from tests.launch import ROOT

sys.path.insert(0, str(ROOT / "recipes"))

import common
import optimizer
import reports
import sections
import timing
from sections import RecipeError

CPU = torch.device("cpu")
ALONE = common.World(0, 1, CPU)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SECTIONS = ("train", "model", "dispatcher")


@dataclass
class Section:
    steps: sections.Positive
    warmup: int = 3
    rate: float = 0.5
    tied: bool = False
    text: str = "a"
    groups: int | None = None


def test_settings_take_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 5, lr: 1.0e-3, adam: {betas: [0.9, 0.95]}}\nmodel:\n")
    overrides = ["train.steps=7", "model.moe_layer_freq=[0, 1]", "dispatcher.num_sms=24", "train.adam.eps=1e-8"]
    assert sections.read_settings(path, overrides, SECTIONS) == {
        "train": {"steps": 7, "lr": 1e-3, "adam": {"betas": [0.9, 0.95], "eps": "1e-8"}},
        "model": {"moe_layer_freq": [0, 1]},
        "dispatcher": {"num_sms": 24},
    }


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {steps: 5}\nmodel: {}\n")
    for wrong in ("train.steps", "steps=3", "optimizer.lr=1", "train.=1"):
        with pytest.raises(RecipeError, match=r"section\.key=value with a section of train, model, dispatcher"):
            sections.read_settings(path, [wrong], SECTIONS)
    with pytest.raises(RecipeError, match=r"--set train\.steps\.most=3: steps is 5, not a mapping"):
        sections.read_settings(path, ["train.steps.most=3"], SECTIONS)
    with pytest.raises(RecipeError, match=r"--set train\.steps=\[3: the value is not YAML"):
        sections.read_settings(path, ["train.steps=[3"], SECTIONS)
    with pytest.raises(RecipeError, match="cannot read"):
        sections.read_settings(tmp_path / "b.yaml", [], SECTIONS)
    for content, message in (
        ("trian: {}", "unknown section trian .*allowed: train, model, dispatcher"),
        ("train: 3", "section train in .* must be a mapping, not 3"),
        ("- train", "must hold a mapping of sections"),
    ):
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            sections.read_settings(path, [], SECTIONS)


def test_sections_are_checked() -> None:
    given = {"steps": 9, "rate": "1e-4", "groups": None, "text": "b"}
    assert sections.fill(Section, "train", given) == Section(9, rate=1e-4, text="b")
    assert sections.fill(Section, "train", {"steps": 9, "rate": 1, "groups": 4}) == Section(9, rate=1.0, groups=4)
    for values, message in (
        ({"step": 9}, r"unknown key train\.step \(did you mean steps\?\); allowed: steps, warmup"),
        ({"rate": 0.1}, r"train\.steps is missing"),
        ({"steps": "abc"}, r"train\.steps = 'abc': allowed is an integer"),
        ({"steps": 2.5}, r"train\.steps = 2\.5: allowed is an integer"),
        ({"steps": True}, r"train\.steps = True: allowed is an integer"),
        ({"steps": 0}, r"train\.steps = 0: allowed is 1 to 2147483647"),
        ({"steps": 1, "warmup": -1}, r"train\.warmup = -1: allowed is 0 to 2147483647"),
        ({"steps": 1, "rate": "fast"}, r"train\.rate = 'fast': allowed is a number"),
        ({"steps": 1, "rate": float("nan")}, r"train\.rate = nan: allowed is 0 to 2147483647"),
        ({"steps": 1, "rate": float("inf")}, r"train\.rate = inf: allowed is 0 to 2147483647"),
        ({"steps": 2**31}, r"train\.steps = 2147483648: allowed is 1 to 2147483647"),
        ({"steps": 1, "tied": "yes"}, r"train\.tied = 'yes': allowed is true or false"),
        ({"steps": 1, "text": 3}, r"train\.text = 3: allowed is text"),
        ({"steps": 1, "groups": "all"}, r"train\.groups = 'all': allowed is an integer or null"),
    ):
        with pytest.raises(RecipeError, match=message):
            sections.fill(Section, "train", values)


@pytest.mark.parametrize(
    ("error", "told"),
    [(RecipeError("no such text"), "no such text"), (AssertionError("seven"), "AssertionError: seven")],
)
def test_errors_reach_torchruns_report(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", sections.ERROR_FILE: str(tmp_path / "error.json")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(typer.Exit) as raised, sections.plain_errors():
        raise error
    assert raised.value.exit_code == 1
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert written["message"] == f"error on rank 3: {told}"
    assert int(written["extraInfo"]["timestamp"]) > 0
    expected = isinstance(error, RecipeError)
    assert ("py_callstack" in written["extraInfo"]) != expected
    assert capsys.readouterr().err == ("" if expected else f"error on rank 3: {told}\n")


@pytest.mark.parametrize("source", ["python-docs", "python-source"])
def test_every_python_has_text(source: str) -> None:
    text = common.read_text(source)
    assert len(text) > 300_000
    assert text.count(b" the ") > 1000


def test_text_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_text("not text")
    assert common.read_text(str(tmp_path)) == b"first\n\nsecond"
    with pytest.raises(RecipeError, match="neither python-docs, python-source nor a file"):
        common.read_text(str(tmp_path / "missing"))


@pytest.mark.parametrize("length", [0, 1, 5000])
def test_too_little_text_is_named(length: int) -> None:
    with pytest.raises(RecipeError, match=f"{length} bytes of text are too few for sequences of 1000"):
        common.ByteText(b"x" * length, 1000, seed=1)


def test_held_out_text_is_never_trained_on() -> None:
    blocks = 40
    # block i holds only the byte i, so a byte says where it came from
    text = common.ByteText(bytes(i for i in range(blocks) for _ in range(common.ByteText.BLOCK)), 64, seed=1)
    held_out = {i for i in range(blocks) if i % common.ByteText.HELD_OUT_EVERY == 0}
    trained: set[int] = set()
    for step in range(200):
        inputs, labels = text.batch(step, 0, 8)
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        trained |= set(inputs.flatten().tolist()) | set(labels.flatten().tolist())
    assert trained == set(range(blocks)) - held_out

    tested: set[int] = set()
    shares = [list(text.held_out_batches(common.World(rank, 2, CPU), 64, 4)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 8
    for inputs, labels in shares[0] + shares[1]:
        tested |= set(inputs.flatten().tolist()) | set(labels.flatten().tolist())
    assert tested == held_out


def test_batches_depend_on_seed_step_and_rank_alone() -> None:
    text = common.read_text("python-docs")
    first = common.ByteText(text, 32, seed=1).batch(5, 0, 4)[0]
    assert torch.equal(first, common.ByteText(text, 32, seed=1).batch(5, 0, 4)[0])
    for seed, step, rank in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):
        assert not torch.equal(first, common.ByteText(text, 32, seed=seed).batch(step, rank, 4)[0])
    with pytest.raises(RecipeError, match="too few for sequences of 32"):
        common.ByteText(b"short", 32, seed=1)


def adam(parameters: list[torch.nn.Parameter], **options: float) -> optimizer.Adam:
    given = {"learning_rate": 1e-5, "weight_decay": 0.0, "clip": 1e9, "warmup": 1, "steps": 10**9, **options}
    return optimizer.Adam(parameters, lambda parameter: None, **given)


def test_adam_keeps_what_bf16_would_round_away() -> None:
    """2,000 steps too small for bf16 at 1.0: the copies in fp32 add up, as torch's AdamW in fp32 does."""
    start = torch.ones(4, 4)
    parameter = torch.nn.Parameter(start.to(torch.bfloat16))
    ours = adam([parameter])
    reference = torch.nn.Parameter(start.clone())
    truth = torch.optim.AdamW([reference], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(2000):
        parameter.grad = torch.ones(4, 4, dtype=torch.bfloat16)
        reference.grad = torch.ones(4, 4)
        ours.step(step)
        truth.step()
    torch.testing.assert_close(ours.shares[0].master, reference.detach().flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close(parameter.detach(), reference.detach().to(torch.bfloat16), rtol=0, atol=0)
    assert parameter[0, 0] < 1


def test_adam_is_adamw_with_clipping() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(3, 5), torch.randn(7)]
    parameters, references = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    ours = adam(parameters, learning_rate=0.1, weight_decay=0.3, clip=1.5)
    groups = [{"params": references[:1], "weight_decay": 0.3}, {"params": references[1:], "weight_decay": 0.0}]
    truth = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    state = None
    for step in range(8):
        for parameter, reference in zip(parameters, references):
            parameter.grad = torch.randn_like(parameter) * 0.2 * step
            reference.grad = parameter.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(references, 1.5)
        torch.testing.assert_close(ours.step(step), expected)
        truth.step()
        if step == 3:
            state = ours.state_dict()
            ours = adam(parameters, learning_rate=0.1, weight_decay=0.3, clip=1.5)
            ours.load_state_dict(state)
    for parameter, reference in zip(parameters, references):
        torch.testing.assert_close(parameter, reference)


def test_adam_without_clipping() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    ours = adam([parameter], learning_rate=0.1, clip=0)
    parameter.grad = torch.full((4,), 100.0)
    torch.testing.assert_close(ours.step(0), torch.tensor(200.0))
    torch.testing.assert_close(ours.shares[0].moment1, torch.full((4,), 10.0))  # a tenth of the whole gradient


def test_adam_refuses_the_state_of_parameters_in_another_dtype() -> None:
    """Masters that stay as they were would replace the weights that were loaded."""
    states = [adam([torch.nn.Parameter(torch.ones(4, dtype=dtype))]) for dtype in (torch.float32, torch.bfloat16)]
    for ours, other in (states, states[::-1]):
        with pytest.raises(ValueError, match="written for parameters in another dtype"):
            ours.load_state_dict(other.state_dict())


def test_learning_rate_rises_and_falls_to_a_tenth() -> None:
    ours = adam([torch.nn.Parameter(torch.ones(2, 2))], learning_rate=1.0, warmup=4, steps=100)
    rates = [ours.rate(step) for step in (0, 1, 3, 4, 100)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.1])


class Clock:
    """Stands in for the time module: time passes when told."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_timer_adds_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)

    class Move(torch.autograd.Function):
        """Takes 2 s forward and 3 s backward."""

        @staticmethod
        def forward(ctx, x):
            clock.now += 2
            return x * 2, torch.ones(3, dtype=torch.int64)

        @staticmethod
        def backward(ctx, grad, _):
            clock.now += 3
            return grad * 2

    timer = timing.PhaseTimer(CPU)
    x = torch.ones(3, requires_grad=True)
    y, counts = timer.timed("move", Move.apply)(x)
    assert counts.tolist() == [1, 1, 1]
    clock.now += 100  # what happens between the two is not the phase's
    y.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert timer.collect() == {"move": 5}
    assert timer.collect() == {}

    timer.active = False
    timer.timed("move", Move.apply)(x)
    assert timer.collect() == {}


def test_journal_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    journal = reports.Journal(tmp_path, ALONE, "test", steps=4, resumed_at=0)
    for step in range(1, 5):
        journal.add({"step": step, "train_loss": 1.0 / step}, "")
    journal.close()
    resumed = reports.Journal(tmp_path, ALONE, "test", steps=4, resumed_at=2)
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train_loss": 1.0}, {"step": 2, "train_loss": 0.5}]
    assert resumed.draw("title") == tmp_path / "curves.png"


def test_checkpoints_keep_two_and_refuse_another_layout(group: None, tmp_path: Path) -> None:
    checkpoints = common.Checkpoints(tmp_path, ALONE, {"expert_parallel": 1})
    with pytest.raises(RecipeError, match="no checkpoint in"):
        checkpoints.load()
    for step in (1, 2, 3):
        checkpoints.save(step, {"weights": torch.full((2,), float(step))})
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-0000002", "step-0000003"]
    step, state = checkpoints.load()
    assert step == 3
    assert state["weights"].tolist() == [3, 3]

    with pytest.raises(RecipeError, match="written with expert_parallel = 1, this run has expert_parallel = 2"):
        common.Checkpoints(tmp_path, ALONE, {"expert_parallel": 2}).load()
    checkpoints.clear()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "blank"])
def test_a_damaged_checkpoint_is_named(group: None, tmp_path: Path, damage: str) -> None:
    checkpoints = common.Checkpoints(tmp_path, ALONE, {})
    checkpoints.save(1, {"x": torch.ones(1000)})
    path = tmp_path / "checkpoints/step-0000001/rank-0.pt"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path = tmp_path / "checkpoints/latest.json"
        path.write_text("")
    with pytest.raises(RecipeError, match=f"--resume: cannot read {path}"):
        checkpoints.load()


def test_a_save_that_is_cut_off_leaves_the_last_checkpoint(group: None, tmp_path: Path) -> None:
    class Unsaveable:
        def __reduce__(self):
            raise RuntimeError("the disk is full")

    checkpoints = common.Checkpoints(tmp_path, ALONE, {})
    checkpoints.save(1, {"x": 1})
    with pytest.raises(RuntimeError, match="the disk is full"):
        checkpoints.save(2, {"x": Unsaveable()})
    assert checkpoints.load() == (1, {"x": 1})


def test_trackers_get_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            seen.append(("tensorboard", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None:
            pass

    def init(project: str, name: str, dir: str) -> SimpleNamespace:
        seen.append(("wandb", name, dir))
        return SimpleNamespace(log=lambda entry, step: seen.append((entry, step)))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    trackers = reports.find_trackers("tensorboard, wandb")
    journal = reports.Journal(tmp_path, ALONE, "test", steps=4, resumed_at=0, trackers=trackers)
    journal.add({"step": 2, "train_loss": 0.5, "mfu_percent": 30.0}, "")
    journal.close()
    assert seen == [
        ("tensorboard", str(tmp_path / "tensorboard")),
        ("wandb", "test", str(tmp_path)),
        ("train_loss", 0.5, 2),
        ("mfu_percent", 30.0, 2),
        ({"train_loss": 0.5, "mfu_percent": 30.0}, 2),
    ]

    assert reports.find_trackers("") == []
    with pytest.raises(RecipeError, match=r"train\.trackers = 'comet': allowed are tensorboard, wandb"):
        reports.find_trackers("comet")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"train\.trackers = 'wandb': `pip install wandb` first"):
        reports.find_trackers("wandb")


def test_a_vocabulary_holds_every_byte() -> None:
    sections.check_vocabulary("gpt.vocab_size", 256)
    with pytest.raises(sections.RecipeError, match=r"gpt\.vocab_size = 255: allowed is at least 256"):
        sections.check_vocabulary("gpt.vocab_size", 255)


def test_rank_variables_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(
        sections.RecipeError, match="RANK is set but not LOCAL_RANK, LOCAL_WORLD_SIZE: start with torchrun"
    ):
        common.start_processes()
