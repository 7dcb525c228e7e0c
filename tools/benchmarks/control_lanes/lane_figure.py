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

_TITLES = {"target_ap50": "AP50 of the target", "auc": "AUC of the class"}
_WHOLE: Columns = (
    ("AP50 of the target", lambda run: run["target_ap50"]),
    ("AUC of the class", lambda run: run["auc"]),
    ("AP50 of all platelets", lambda run: run["platelet_ap50"]),
)
_COSTS: Columns = (
    ("training, CPU s", lambda run: run["train_cpu_s"]),
    ("test, CPU s per tile", lambda run: run["test_cpu_s_per_tile"]),
    ("training, MiB", lambda run: run["train_peak_mib"]),
    ("parameters", lambda run: run["parameters"]),
)
# Okabe and Ito's colours, each once as a line and once dashed.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#777777")
_STYLES = list(itertools.product(("-", "--"), _COLORS))


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown tables: scores and costs of each variant, then its scores by distance."""
    by_distance = [table(results, _columns(results, name), ()) for name in _TITLES]
    parts = [f"{title}\n\n{text}" for title, text in zip(_TITLES.values(), by_distance, strict=True)]
    return "\n\n".join([table(results, _WHOLE, _COSTS), *parts])


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw both scores by distance, a line for each variant, a band from the lowest to the highest seed."""
    picture = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, _TITLES.items(), strict=True):
        for runs, (line, color) in zip(by_variant(results), _STYLES, strict=False):
            _draw_runs(axes, runs, name, line, color)
        bins = results[0]["by_distance"]
        axes.set_xticks([bins[0]["low"], *(row["high"] for row in bins)])
        axes.set_xlabel("distance from the control, px")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 1)
    _draw_chance(panels, results)
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)


def _columns(results: Sequence[dict[str, Any]], name: str) -> Columns:
    return [
        (f"{row['low']} to {row['high']} px", lambda run, index=index: run["by_distance"][index][name])
        for index, row in enumerate(results[0]["by_distance"])
    ]


def _draw_runs(axes: Axes, runs: Sequence[dict[str, Any]], name: str, line: str, color: str) -> None:
    bins = runs[0]["by_distance"]
    middles = [(row["low"] + row["high"]) / 2 for row in bins]
    values = np.array([[row[name] for row in run["by_distance"]] for run in runs])
    axes.plot(
        middles, values.mean(0), f"o{line}", color=color, label=runs[0]["title"].removeprefix("full resolution, ")
    )
    axes.fill_between(middles, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def _draw_chance(panels: Sequence[Axes], results: Sequence[dict[str, Any]]) -> None:
    """Draw the scores of a network that finds every platelet and knows nothing of the controls."""
    bins = results[0]["by_distance"]
    edges = [row["low"] for row in bins] + [bins[-1]["high"]]
    shares = [row["num_targets"] / row["num_platelets"] for row in bins]
    panels[0].stairs(shares, edges, color="black", linestyle=":", baseline=None, label="share of targets; chance")
    panels[1].axhline(0.5, color="black", linestyle=":")
