"""The tables and the picture of the results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figure import Columns, by_variant, table
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TITLES = {"target_ap50": "AP50 of the target", "auc": "AUC of the class", "platelet_ap50": "AP50 of all platelets"}
_DRAWN = ("target_ap50", "auc")
_COSTS: Columns = (
    ("training, CPU s", lambda run: run["train_cpu_s"]),
    ("test, CPU s per tile of the largest size", lambda run: list(run["tests"].values())[-1]["cpu_s_per_tile"]),
    ("training, MiB", lambda run: run["train_peak_mib"]),
    ("parameters", lambda run: run["parameters"]),
)
# Okabe and Ito's colours, each once as a line and once dashed.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#777777")
_STYLES = list(itertools.product(("-", "--"), _COLORS))


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown tables: scores and costs of each variant, then its scores by distance, for each size of test tiles."""
    sides = list(results[0]["tests"])
    whole = [
        (f"{title}, {side} px", lambda run, side=side, name=name: run["tests"][side][name])
        for side in sides
        for name, title in _TITLES.items()
    ]
    by_distance = [
        f"{_TITLES[name]}, tiles of {side} px\n\n{table(results, _columns(results, side, name), ())}"
        for side in sides
        for name in _DRAWN
    ]
    return "\n\n".join([table(results, whole, _COSTS), *by_distance])


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw scores by distance, a line for each variant, a band from the lowest to the highest seed.

    A row of panels for each score, a column for each size of test tiles.
    """
    sides = list(results[0]["tests"])
    picture = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(len(_DRAWN), len(sides), sharey=True, squeeze=False)
    for name, row in zip(_DRAWN, panels, strict=True):
        for side, axes in zip(sides, row, strict=True):
            for runs, (line, color) in zip(by_variant(results), _STYLES, strict=False):
                _draw_runs(axes, runs, side, name, line, color)
            bins = _bins(results[0], side)
            _draw_chance(axes, name, bins)
            axes.set_xticks([bins[0]["low"], *(each["high"] for each in bins)])
            axes.set_title(f"{_TITLES[name]}, tiles of {int(side):,} px")
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 1)
    for axes in panels[-1]:
        axes.set_xlabel("distance from the control, px")
    picture.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)


def _bins(run: dict[str, Any], side: str) -> list[dict[str, Any]]:
    """The ranges of distances that tiles of this size have."""
    return [each for each in run["tests"][side]["by_distance"] if each["num_targets"]]


def _columns(results: Sequence[dict[str, Any]], side: str, name: str) -> Columns:
    return [
        (f"{each['low']} to {each['high']} px", lambda run, index=index: _bins(run, side)[index][name])
        for index, each in enumerate(_bins(results[0], side))
    ]


def _draw_runs(axes: Axes, runs: Sequence[dict[str, Any]], side: str, name: str, line: str, color: str) -> None:
    middles = [(each["low"] + each["high"]) / 2 for each in _bins(runs[0], side)]
    values = np.array([[each[name] for each in _bins(run, side)] for run in runs])
    title = runs[0]["title"].removeprefix("full resolution, ")
    axes.plot(middles, values.mean(0), f"o{line}", color=color, label=title)
    axes.fill_between(middles, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def _draw_chance(axes: Axes, name: str, bins: Sequence[dict[str, Any]]) -> None:
    """Draw the AP of a network that finds all platelets, and the AUC of one that knows how many targets a tile has."""
    edges = [each["low"] for each in bins] + [bins[-1]["high"]]
    if name == "auc":
        values, label = [each["auc_of_share"] for each in bins], "knows the tile's share of targets"
    else:
        values, label = [each["num_targets"] / each["num_platelets"] for each in bins], "knows nothing of controls"
    axes.stairs(values, edges, color="black", linestyle=":", baseline=None, label=label)
