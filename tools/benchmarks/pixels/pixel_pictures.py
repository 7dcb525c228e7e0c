"""Pictures of a run: grids of tiles, and curves of bits per dimension."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

__all__ = ["save_curves", "save_grid"]


def save_grid(tiles: np.ndarray, picture: Path, scale: int = 3, gap: int = 4) -> None:
    """Save tiles, [rows, columns, side, side, 3], enlarged and side by side."""
    tiles = np.pad(
        tiles.repeat(scale, axis=2).repeat(scale, axis=3),
        [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)],
        constant_values=255,
    )
    rows, columns, height, width, _ = tiles.shape
    Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)).save(picture)


def save_curves(groups: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw bits per dimension of test tiles against steps and CPU seconds, a row of panels for each group of runs."""
    figure = Figure(figsize=(10, 3.6 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, sharey="row", squeeze=False)
    for row, (title, results) in zip(panels, groups.items(), strict=True):
        for axes, key, label in zip(row, ("step", "cpu_s"), ("step", "CPU s of training"), strict=True):
            for result in results:
                curve = result["curve"]
                axes.plot([each[key] for each in curve], [each["test"] for each in curve], ".-", label=result["name"])
            axes.set(xlabel=label, title=title, xscale="log" if key == "step" else "linear")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test, bits per dimension")
        row[1].legend(fontsize=7)
    figure.savefig(picture, dpi=110)
