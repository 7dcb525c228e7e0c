"""The cells of `gpu.py` as Markdown, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit.files import write_json, write_text
from perf_vit.plotting import save_figure

if TYPE_CHECKING:
    from gpu import Cell

__all__ = ["report_files", "table", "write_cells", "write_report"]

_TITLES = {
    "forward": "Forward pass",
    "training": "Training step: forward, backward and AdamW",
    "map": "Maps of a Cloud-Optimised GeoTIFF: images are windows, softmax / ours is that of whole maps",
}
_COLUMNS = ("model", "patches", "batch", "mixer", "ms an image", "images/s", "softmax / ours", "peak GiB", "result")


def report_files(folder: Path) -> tuple[Path, Path, Path]:
    """Return the paths of the JSON file, the table and the picture."""
    return folder / "gpu.json", folder / "gpu.md", folder / "gpu.png"


def write_cells(folder: Path, about: dict[str, Any], cells: Sequence[Cell]) -> None:
    """Write `gpu.json`."""
    write_json(report_files(folder)[0], {**about, "cells": [asdict(cell) for cell in cells]})


def write_report(folder: Path, about: dict[str, Any], cells: Sequence[Cell]) -> None:
    """Write the table and the picture.

    Args:
        folder: Folder to write into.
        about: Machine, versions, sizes and checks.
        cells: All cells.
    """
    _, text, picture = report_files(folder)
    write_text(text, table(about, cells))
    _plot(about, [cell for cell in cells if cell.kind != "map"], picture)


def table(about: dict[str, Any], cells: Sequence[Cell]) -> str:
    """Return the cells as Markdown, a table for each kind."""
    checks = about["checks"]
    errors = ", ".join(f"{value:.1e} ({name})" for name, value in checks.items() if isinstance(value, float))
    lines = [
        f"{about['machine']}, torch {about['torch']}, CUDA {about['cuda']}, {about['dtype']} autocast, random weights: "
        f"`{about['command']}`",
        "",
        f"Largest error against the N x N references: {errors}. Deterministic mode repeats gradients: "
        f"{_yes(checks['repeats_gradients'])}. Attention waits for the device: {_yes(checks['waits_for_device'])}.",
    ]
    for kind, title in _TITLES.items():
        rows = sorted((cell for cell in cells if cell.kind == kind), key=lambda cell: (cells.index(cell), cell.length))
        if rows:
            lines += ["", f"{title}:", "", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
            lines += [_row(_entries(cell, cells)) for cell in _by_size(rows)]
    return "\n".join(lines) + "\n"


def _by_size(cells: Sequence[Cell]) -> list[Cell]:
    models, mixers = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("model", "title"))
    return sorted(cells, key=lambda cell: (models.index(cell.model), cell.length, mixers.index(cell.title)))


def _entries(cell: Cell, cells: Sequence[Cell]) -> list[str]:
    result = cell.status if not cell.reason else f"{cell.status}: {cell.reason}"
    if cell.status == "measured":
        result = "checkpointed" if cell.checkpointed else ""
    ratio = _speed_over_softmax(cell, cells)
    numbers = (cell.images_per_s and 1e3 / cell.images_per_s, cell.images_per_s, ratio, cell.peak_gib)
    shown = ["-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in numbers]
    return [cell.model.split("_patch")[0], f"{cell.length:,}", str(cell.batch), cell.title, *shown, result]


def _speed_over_softmax(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """Return how many times the images a second of softmax a cell has; None without both."""
    place = (cell.kind, cell.model, cell.length)
    peers = [each for each in cells if each.mixer == "softmax" and (each.kind, each.model, each.length) == place]
    if not peers or not peers[0].images_per_s or not cell.images_per_s:
        return None
    return cell.images_per_s / peers[0].images_per_s


def _plot(about: dict[str, Any], cells: Sequence[Cell], path: Path) -> None:
    """Draw time and memory an image against patches, a column for each kind and model."""
    columns = list(dict.fromkeys((cell.kind, cell.model) for cell in cells))
    figure = Figure(figsize=(3.4 * len(columns), 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for column, (kind, model) in enumerate(columns):
        chosen = [cell for cell in cells if (cell.kind, cell.model) == (kind, model) and cell.images_per_s]
        _draw(axes[0, column], chosen, [1e3 / (cell.images_per_s or 1.0) for cell in chosen])
        _draw(axes[1, column], chosen, [cell.peak_gib or 0.0 for cell in chosen])
        axes[0, column].set_title(f"{model.split('_patch')[0]}, {kind}", fontsize=9)
        axes[1, column].set_xlabel("patches")
    axes[0, 0].set_ylabel("ms an image")
    axes[1, 0].set_ylabel("peak GiB")
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{about['machine']}, torch {about['torch']}, {about['dtype']}", fontsize=9)
    save_figure(path, figure)


def _draw(axes: Axes, cells: Sequence[Cell], values: Sequence[float]) -> None:
    for mixer in dict.fromkeys(cell.title for cell in cells):
        points = [(cell.length, value) for cell, value in zip(cells, values, strict=True) if cell.title == mixer]
        points = sorted(point for point in points if point[1] > 0)
        axes.plot(*zip(*points, strict=True), "o-", label=mixer, markersize=4)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)


def _row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _yes(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"
