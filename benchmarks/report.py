"""What the benchmark says: tables for the terminal, Markdown for documents, JSON for programs, a plot.

A :class:`Report` knows the command, the devices and the versions, and every form of it shows them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from deepep_moe import __version__
from deepep_moe.config import DispatcherConfig
from deepep_moe.errors import UnsupportedError
from deepep_moe.tools.world import World

MANY_BARS = 12  # of one table in a picture: beyond it rows with these words are left to the tables, one after the other
_LEFT_OUT = ("call:", "grouped", "own rows included")
_OUTPUT_OPTIONS = ("--json", "--markdown", "--plot", "--timeline", "--trace", "--commit")


@dataclass(frozen=True)
class Measurement:
    """One row of a table."""

    name: str
    samples_us: list[float]  # of the slowest rank each
    setting: str = ""  # SM budget, or whose dispatcher
    link_bytes: int = 0  # what the busiest rank sends to or receives from others, whichever is more
    logical_bytes: int = 0  # what the busiest rank receives, own rows included
    memory: tuple[int, int] | None = None  # peak in PyTorch's allocator, growth outside of it
    details: dict[str, float] = field(default_factory=dict)  # further columns: heading and number
    busy_us: list[float] = field(default_factory=list)  # samples of the same on GPUs that were busy before

    @property
    def median(self) -> float:
        return statistics.median(self.samples_us)

    def gigabytes_per_second(self, num_bytes: int) -> float:
        return num_bytes / self.median / 1e3


@dataclass
class Table:
    """Measurements of one case."""

    title: str
    case: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    rows: list[Measurement] = field(default_factory=list)
    ceiling: float = 0.0  # GB/s of the link, 0: not measured
    reference: str = ""  # the setting whose time is 1 in a column of ratios

    def columns(self) -> list[tuple[str, list[str]]]:
        """(heading, cells) of the columns that have something to say."""
        rows = self.rows
        columns = [
            ("", [row.name for row in rows]),
            ("setting", [row.setting for row in rows]),
            ("median us", [_number(row.median) for row in rows]),
            ("min", [_number(min(row.samples_us)) for row in rows]),
            ("max", [_number(max(row.samples_us)) for row in rows]),
            (f"/ {self.reference}", [self._ratio(row, lambda row: row.samples_us) for row in rows]),
            ("GPU busy before us", [_number(statistics.median(row.busy_us)) if row.busy_us else "" for row in rows]),
            (f"/ {self.reference}", [self._ratio(row, lambda row: row.busy_us) for row in rows]),
            ("link GB/s", [_number(r.gigabytes_per_second(r.link_bytes)) if r.link_bytes else "" for r in rows]),
            ("of ceiling", [self._share(row) for row in rows]),
            (
                "logical GB/s",
                [_number(r.gigabytes_per_second(r.logical_bytes)) if r.logical_bytes else "" for r in rows],
            ),
            ("peak MiB", [_number(row.memory[0] / 2**20) if row.memory else "" for row in rows]),
            ("outside MiB", [_number(row.memory[1] / 2**20) if row.memory else "" for row in rows]),
        ]
        for heading in dict.fromkeys(heading for row in rows for heading in row.details):
            cells = [_number(row.details[heading]) if heading in row.details else "" for row in rows]
            columns.append((heading, cells))
        return [column for column in columns if any(column[1])]

    def _ratio(self, row: Measurement, samples: Callable[[Measurement], list[float]]) -> str:
        """Median of these samples over that of the reference."""
        same = [other for other in self.rows if (other.name, other.setting) == (row.name, self.reference)]
        if not (self.reference and same and samples(row)):
            return ""
        return f"{statistics.median(samples(row)) / statistics.median(samples(same[0])):.2f}"

    def _share(self, row: Measurement) -> str:
        if not (self.ceiling and row.link_bytes):
            return ""
        return f"{100 * row.gigabytes_per_second(row.link_bytes) / self.ceiling:.0f} %"

    def as_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {
                "name": row.name,
                "setting": row.setting,
                "median_us": row.median,
                "min_us": min(row.samples_us),
                "max_us": max(row.samples_us),
                "samples_us": row.samples_us,
            }
            if row.link_bytes:
                entry.update(link_bytes=row.link_bytes, link_gb_per_s=row.gigabytes_per_second(row.link_bytes))
            if row.logical_bytes:
                entry.update(
                    logical_bytes=row.logical_bytes, logical_gb_per_s=row.gigabytes_per_second(row.logical_bytes)
                )
            if row.memory:
                entry.update(peak_bytes=row.memory[0], outside_allocator_bytes=row.memory[1])
            if row.details:
                entry["details"] = row.details
            if row.busy_us:
                entry.update(busy_median_us=statistics.median(row.busy_us), busy_samples_us=row.busy_us)
            rows.append(entry)
        return {
            "title": self.title,
            "case": self.case,
            "ceiling_gb_per_s": self.ceiling or None,
            "reference": self.reference or None,
            "notes": self.notes,
            "measurements": rows,
        }


@dataclass
class Report:
    """All tables of one run. Every rank has one, rank 0 shows and saves it."""

    world: World
    command: str
    environment: dict[str, Any]
    files: dict[str, Path | None]  # "json", "markdown", "plot"
    console: Console
    tables: list[Table] = field(default_factory=list)

    @classmethod
    def start(cls, world: World, files: dict[str, Path | None], commit: str | None, console: Console) -> Report:
        """Collective: asks every rank for its device."""
        if files["plot"]:
            need_matplotlib("--plot")
        names = world.gather(_device_name(world))
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return cls(world, command_line(), {"devices": counted, **_versions(world, commit)}, files, console)

    def add(self, table: Table) -> None:
        """Show a table that is complete, and save all there are: an interrupted run keeps what it has measured."""
        self.tables.append(table)
        if self.world.rank == 0:
            self._show(table)
            self._save()

    def heading(self) -> str:
        known = {
            "cuda": "CUDA",
            "nccl": "NCCL",
            "megatron_core": "megatron-core",
            "deepspeed": "deepspeed",
            "commit": "commit",
        }
        parts = [self.environment["devices"], f"deepep_moe {__version__}", f"torch {torch.__version__}"]
        parts += [f"{label} {self.environment[key]}" for key, label in known.items() if self.environment[key]]
        settings = self.environment["settings"]
        parts += ["settings " + ", ".join(f"{key} = {value}" for key, value in settings.items())] if settings else []
        return "; ".join(parts)

    def caption(self) -> str:
        """Command, devices and versions, for a picture."""
        return f"{self.command}\n{self.heading()}"

    def markdown(self) -> str:
        """All tables, each with what it takes to repeat and to judge it."""
        return "\n".join(self._markdown_of(table) for table in self.tables)

    def _markdown_of(self, table: Table) -> str:
        columns = table.columns()
        lines = [f"### {table.title}", "", f"    {self.command}", "", f"{self.heading()}.", ""]
        lines += [f"{note}\n" for note in table.notes]
        lines.append("| " + " | ".join(heading for heading, _ in columns) + " |")
        lines.append("|" + "|".join(" --- " if _is_text(cells) else " ---: " for _, cells in columns) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in zip(*(cells for _, cells in columns))]
        return "\n".join(lines) + "\n"

    def _show(self, table: Table) -> None:
        shown = RichTable(title=escape(table.title), title_justify="left", title_style="bold")
        columns = table.columns()
        for heading, cells in columns:
            shown.add_column(heading, justify="left" if _is_text(cells) else "right", no_wrap=True)
        for row in zip(*(cells for _, cells in columns)):
            shown.add_row(*(escape(cell) for cell in row))
        self.console.print(f"\n{escape(self.command)}\n{escape(self.heading())}", soft_wrap=True, highlight=False)
        self.console.print(shown, highlight=False, soft_wrap=True)
        for note in table.notes:
            self.console.print(escape(note), style="dim", highlight=False, soft_wrap=True)

    def _save(self) -> None:
        if self.files["json"]:
            content = {
                "command": self.command,
                "environment": self.environment,
                "tables": [table.as_json() for table in self.tables],
            }
            _write(self.files["json"], json.dumps(content, indent=1) + "\n")
        if self.files["markdown"]:
            _write(self.files["markdown"], self.markdown())
        if self.files["plot"]:
            plot(self.tables, self.caption(), self.files["plot"])


def need_matplotlib(option: str) -> None:
    """Raise UnsupportedError now instead of after the measurement."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(f"{option} needs matplotlib: pip install matplotlib")


def bars(table: Table) -> list[tuple[str, float, str]]:
    """(label, value, setting) of the rows to draw, the best first; see :data:`MANY_BARS`.

    GB/s over the link where bytes are known, else milliseconds; of steps that are cut into phases, the totals.
    """
    rows = [row for row in table.rows if row.link_bytes]
    totals = [row for row in table.rows if row.name == "total"]
    candidates, shown = rows or totals or table.rows, []
    for words in _LEFT_OUT:
        if len(candidates) > MANY_BARS:
            candidates = [row for row in candidates if words not in row.name]
    for row in candidates:
        value = row.gigabytes_per_second(row.link_bytes) if rows else row.median / 1e3
        label = row.setting if totals and not rows else ", ".join(filter(None, (row.name, row.setting)))
        shown.append((label, value, row.setting))
    return sorted(shown, key=lambda bar: -bar[1] if rows else bar[1])


def plot(tables: list[Table], title: str, path: Path) -> None:
    """One picture per table, of :func:`bars`; the ceiling of the link beside GB/s."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = [bars(table) for table in tables]
    heights = [1.2 + 0.28 * len(shown) for shown in drawn]
    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=(10, sum(heights) + 0.6), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, table, shown in zip(axes[:, 0], tables, drawn):
        over_link = any(row.link_bytes for row in table.rows)
        settings = list(dict.fromkeys(row.setting for row in table.rows))
        colours = [f"C{settings.index(setting) % 10}" for _, _, setting in shown]
        container = axis.barh(range(len(shown)), [value for _, value, _ in shown], color=colours)
        axis.bar_label(container, fmt="{:,.3g}", padding=3, fontsize=8)
        axis.set_yticks(range(len(shown)), [label for label, _, _ in shown], fontsize=8)
        axis.set_ylim(len(shown) - 0.4, -0.6)  # the first row on top
        axis.margins(x=0.1)
        axis.set_xlabel("GB/s over the link, bytes of other ranks only" if over_link else "ms, median")
        axis.set_title(table.title, fontsize=9, loc="right")
        if table.ceiling and over_link:
            axis.axvline(table.ceiling, color="black", linestyle="--", linewidth=1)
            axis.annotate(
                f"ceiling {table.ceiling:.0f}",
                (table.ceiling, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 6),
                textcoords="offset points",
                ha="right",
                va="bottom",
                rotation=90,
                fontsize=8,
            )
    figure.suptitle(title, fontsize=7, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def command_line(arguments: Iterable[str] | None = None) -> str:
    """The command of this run as a user would type it, without where its results go."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    kept: list[str] = []
    while given:
        argument = given.pop(0)
        if argument in _OUTPUT_OPTIONS:
            del given[:1]
        elif argument.partition("=")[0] not in _OUTPUT_OPTIONS:
            kept.append(argument)
    run = "python -m benchmarks"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        nodes = f"--nnodes {size // local} " if size > local else ""
        run = f"torchrun {nodes}--nproc-per-node {local} -m benchmarks"
    return f"{run} {shlex.join(kept)}"


def _versions(world: World, commit: str | None) -> dict[str, Any]:
    config, default = DispatcherConfig.load(), DispatcherConfig()
    changed = {name: value for name, value in vars(config).items() if value != getattr(default, name)}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if world.collectives == "nccl" else None
    return {
        "ranks": world.size,
        "deepep_moe": __version__,
        "commit": commit or _git_commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if world.on_gpu else None,
        "nccl": nccl,
        "megatron_core": _version_of("megatron-core"),
        "deepspeed": _version_of("deepspeed"),
        "settings": changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.on_gpu else "CPU rank"


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Of the checkout this package lies in, with "+" if its files were changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return None
    return told.stdout.strip() or None


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _is_text(cells: Iterable[str]) -> bool:
    return not all(cell == "" or cell[0].isdigit() for cell in cells)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
