"""The table and the picture of the results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from variants import VARIANTS

Columns = Sequence[tuple[str, Callable[[dict[str, Any]], float]]]

_COLUMNS: Columns = (
    ("AP50, all sizes", lambda run: run["ap50"]),
    ("AP50, 4 to 8 px", lambda run: _of_size(run, 4, 8)["ap"]),
    ("AP50, 8 to 16 px", lambda run: _of_size(run, 8, 16)["ap"]),
    ("AP50, 16 to 32 px", lambda run: _of_size(run, 16, 32)["ap"]),
    ("recall, 4 to 8 px", lambda run: _of_size(run, 4, 8)["recall"]),
    ("recall, 8 to 16 px", lambda run: _of_size(run, 8, 16)["recall"]),
    ("AP50, platelets", lambda run: run["ap50_by_class"]["Platelets"]),
)
_COSTS: Columns = (
    ("training, CPU s", lambda run: run["train_cpu_s"]),
    ("test, CPU s a tile", lambda run: run["test_cpu_s_per_tile"]),
    ("training, MiB", lambda run: run["train_peak_mib"]),
)
_COLORS = ("#777777", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


def table(results: Sequence[dict[str, Any]], columns: Columns = _COLUMNS, costs: Columns = _COSTS) -> str:
    """A Markdown table: means over seeds, with the lowest and the highest.

    Args:
        results: Those of all runs.
        columns: Titles of scores, and functions that read them.
        costs: The same for costs, which are given as means alone.
    """
    head = ["network", "seeds", *(name for name, _ in columns), *(name for name, _ in costs)]
    lines = [head, ["---"] * len(head)]
    for runs in by_variant(results):
        cells = [runs[0]["title"], str(len(runs))]
        cells += [_spread([float(get(run)) for run in runs]) for _, get in columns]
        cells += [_cost(float(np.mean([get(run) for run in runs]))) for _, get in costs]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall by size, a line a network, a band from the lowest to the highest seed; one part for each IoU."""
    picture = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(picture)
    ious = list(results[0]["by_size"])
    for axes, iou in zip(picture.subplots(1, len(ious), sharey=True), ious, strict=True):
        for runs, color in zip(by_variant(results), _COLORS, strict=False):
            rows = _bins(runs[0]["by_size"][iou])
            x = [(row["low"] * row["high"]) ** 0.5 for row in rows]
            recall = np.array([[row["recall"] for row in _bins(run["by_size"][iou])] for run in runs])
            axes.plot(x, recall.mean(0), "o-", color=color, label=runs[0]["title"])
            axes.fill_between(x, recall.min(0), recall.max(0), color=color, alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        bounds = [row["low"] for row in rows] + [rows[-1]["high"]]
        axes.set_xticks(bounds, [f"{bound:g}" for bound in bounds])
        axes.minorticks_off()
        axes.set_xlabel("square root of the object's area, px")
        axes.set_title(f"found with an IoU of {iou} or more")
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1)
    picture.axes[0].set_ylabel("recall at the best F1")
    picture.axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)


def _of_size(run: dict[str, Any], low: float, high: float) -> dict[str, float]:
    rows = run["by_size"]["0.5"]
    return next(row for row in rows if (row["low"], row["high"]) == (low, high))


def _bins(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The rows whose sizes follow one another; those after them sum several up."""
    last = next(index for index, row in enumerate(rows) if index and row["low"] < rows[index - 1]["low"])
    return list(rows[:last])


def by_variant(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The runs of each variant, in the order of `VARIANTS`."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in results:
        groups[run["variant"]].append(run)
    names = [name for name in VARIANTS if name in groups] + [name for name in groups if name not in VARIANTS]
    return [groups[name] for name in names]


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{np.mean(values):.3f}".removeprefix("0")
    return (
        mean if len(values) == 1 else f"{mean} ({low:.3f} to {high:.3f})".replace("(0.", "(.").replace("to 0.", "to .")
    )


def _cost(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
