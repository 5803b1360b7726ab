"""What a training run reports: progress, log lines, curves, experiment trackers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sections import RecipeError

from deepep_moe.tools.world import World

Tracker = Callable[[Path, str], Callable[[dict[str, float]], None]]
"""Given the run's folder and title, starts an experiment tracker; returns what gives it an entry."""


def find_trackers(names: str) -> list[Tracker]:
    """Of ``train.trackers``: ``tensorboard``, ``wandb``, both with a comma between them, or nothing."""
    known: dict[str, Tracker] = {"tensorboard": _tensorboard, "wandb": _wandb}
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise RecipeError(f"train.trackers = {names!r}: allowed are {', '.join(known)}, with commas between them")
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise RecipeError(f"train.trackers = {names!r}: `pip install {name}` first ({error})") from None
        found.append(known[name])
    return found


def _tensorboard(folder: Path, title: str) -> Callable[[dict[str, float]], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def add(entry: dict[str, float]) -> None:
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, int(entry["step"]))
        writer.flush()

    return add


def _wandb(folder: Path, title: str) -> Callable[[dict[str, float]], None]:
    import wandb

    run = wandb.init(project="deepep_moe", name=title, dir=str(folder))
    return lambda entry: run.log({name: value for name, value in entry.items() if name != "step"}, int(entry["step"]))


class Journal:
    """Progress bar, log lines, ``metrics.jsonl`` and the curves of one run. Only rank 0 writes.

    Entries are dictionaries with a ``step``; a resumed run drops the entries after its checkpoint. ``trackers`` from
    :func:`find_trackers` get every entry too.
    """

    def __init__(
        self, folder: Path, world: World, title: str, steps: int, resumed_at: int, trackers: Iterable[Tracker] = ()
    ) -> None:
        self.folder, self.active, self.steps = folder, world.rank == 0, steps
        self.entries: list[dict[str, float]] = []
        self.path = folder / "metrics.jsonl"
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if resumed_at and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.entries = [entry for entry in map(json.loads, lines) if entry["step"] <= resumed_at]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        # a bar is for a terminal; a log file gets the lines of `add` and `say`
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task(title, total=steps, completed=resumed_at)
        self.progress.start()
        self.trackers = [tracker(folder, title) for tracker in trackers]

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text)

    def add(self, entry: dict[str, float], text: str) -> None:
        """Keep ``entry``, and show ``text`` (if any)."""
        if self.active:
            self.entries.append(entry)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            self.console.print(text)
            for track in self.trackers:
                track(entry)

    def advance(self) -> None:
        if self.active:
            self.progress.advance(self.task)

    def close(self) -> None:
        if self.active:
            self.progress.stop()

    def draw(self, title: str) -> Path | None:
        """Loss, throughput and balance against steps, as ``curves.png``. None where matplotlib is missing."""
        if not self.active:
            return None
        try:
            import matplotlib
        except ImportError:
            self.say("no curves.png: matplotlib is not installed")
            return None
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (loss, speed, share) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
        figure.suptitle(title)
        panels = [
            (loss, "loss (nats per token)", {"train_loss": "training", "held_out_loss": "held out"}),
            (speed, "tokens/s", {"tokens_per_second": "all ranks"}),
            (share, "share of step time (%)", {"dispatch_percent": "dispatch", "combine_percent": "combine"}),
        ]
        for axes, label, curves in panels:
            for key, name in curves.items():
                points = [(entry["step"], entry[key]) for entry in self.entries if key in entry]
                if points:
                    axes.plot(*zip(*points), marker="." if len(points) < 40 else "", label=name)
                    axes.legend()
            axes.set(xlabel="step", ylabel=label)
            axes.grid(alpha=0.3)
        for axes in (speed, share):
            axes.set_ylim(bottom=0)
        path = self.folder / "curves.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        return path
