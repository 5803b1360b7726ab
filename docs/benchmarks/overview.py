"""Draw overview.png, the figure of the README, from the JSON files beside it: python docs/benchmarks/overview.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
# DeepEP 1.2.1's own test on the same kind of GPUs: 128 tokens, hidden 7168, top-8 of 288 experts, four ranks.
DEEPEP_LATENCY = {"dispatch FP8": 36.0, "combine BF16": 57.0}
OURS, OTHER = "#2a6fbb", "#b0b0b0"


def measurements(file: str, title: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By name and setting, those of the first table of ``file`` whose title begins with ``title``."""
    tables = json.loads((HERE / file).read_text(encoding="utf-8"))["tables"]
    table = next(table for table in tables if table["title"].startswith(title))
    return {(row["name"], row["setting"]): row for row in table["measurements"]}


def bars(axes: Any, title: str, unit: str, rows: list[tuple[str, float, bool]]) -> None:
    """Horizontal bars, the first row on top."""
    names, values, ours = zip(*reversed(rows))
    drawn = axes.barh(names, values, color=[OURS if own else OTHER for own in ours])
    axes.bar_label(drawn, [f"{value:.3g} {unit}" for value in values], padding=3)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(0, 1.2 * max(values))
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    """Write overview.png."""
    title = "Dispatchers: 4096 tokens per rank, hidden 7168, top-8 of 256 experts"
    training = measurements("h100x4-dispatcher.json", title)
    training |= measurements("h100x4-dispatcher-collective.json", title) | training
    latency = measurements("h100x4-latency.json", "Low latency: 128 tokens")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 2.6))
    step = [
        (label, training["total", setting]["median_us"] / 1e3, own)
        for label, setting, own in (
            ("Megatron-Core alltoall", "Megatron alltoall", False),
            ("deepep_moe, NCCL only\n(backend collective)", "Megatron deepep, collective", True),
            ("deepep_moe\n(backend nvlink)", "Megatron deepep, all SMs", True),
        )
    ]
    bars(
        left,
        "Training: dispatch and combine, forward and backward\n4 H100, 4096 tokens per GPU, top-8 of 256",
        "ms",
        step,
    )
    rows = []
    for name, other in DEEPEP_LATENCY.items():
        rows += [
            (f"{name}: DeepEP 1.2.1", other, False),
            (f"{name}: deepep_moe", latency[name, "graph"]["median_us"], True),
        ]
    bars(right, "Decoding, low-latency calls\n4 H100, 128 tokens per GPU, top-8 of 288", "us", rows)
    figure.tight_layout()
    figure.savefig(HERE / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
