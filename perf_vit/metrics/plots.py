"""Plots of confusion matrices and precision-recall curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit.metrics.detection import DetectionScores
from perf_vit.plotting import save_figure
from perf_vit.plotting.pictures import add_legend, figure_height, figure_name

__all__ = ["PrecisionRecall", "plot_precision_recall", "save_confusion_matrix", "save_precision_recall"]

# Counts would overlap in matrices with more classes.
_MAX_NUMBERED = 20


def save_confusion_matrix(matrix: npt.ArrayLike, class_names: Sequence[str], path: str | Path) -> None:
    """Plot a confusion matrix: cells are coloured by the share of the true class and labelled with counts.

    Args:
        matrix: Counts, rows true and columns predicted classes, [K, K].
        class_names: Names of the K classes.
        path: Output image, .png.
    """
    counts = np.asarray(matrix)
    num_classes = len(class_names)
    assert counts.shape == (num_classes, num_classes), (counts.shape, num_classes)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape, np.float64), where=totals > 0)
    names = [figure_name(name) for name in class_names]
    # Inches for the names to the left of and below the cells.
    margin = 0.08 * max(map(len, names), default=0)
    side = min(16.0, 2.2 + 0.5 * num_classes) + margin
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    ticks = np.arange(num_classes)
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true")
    if num_classes <= _MAX_NUMBERED:
        _number_cells(axes, counts, shares)
    save_figure(path, figure)


def _number_cells(axes: Any, counts: npt.NDArray[Any], shares: npt.NDArray[np.float64]) -> None:
    for (row, col), count in np.ndenumerate(counts):
        color = "white" if shares[row, col] > 0.5 else "black"
        axes.text(col, row, _short(float(count)), ha="center", va="center", color=color, fontsize=8)


def _short(count: float) -> str:
    """Format a count with at most five characters: 812, 45.2k, 7.3M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= size:
            scaled = count / (1e3 if unit == "k" else size)
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{count:.0f}"


PrecisionRecall: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike]
"""Precision and recall over the score thresholds, [n] each."""


def save_precision_recall(
    class_names: Sequence[str], curves: Sequence[PrecisionRecall], areas: Sequence[float], path: str | Path, title: str
) -> None:
    """Plot precision-recall curves, one per class that has one.

    Args:
        class_names: Names of the K classes.
        curves: Precision-recall curve per class.
        areas: Average precision per class; NaN for classes without a curve.
        path: Output image, .png.
        title: Title of the plot.
    """
    figure = Figure(figsize=(6, figure_height(len(class_names))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = []
    for name, (precision, recall), area in zip(class_names, curves, areas, strict=True):
        if not math.isnan(area):
            axes.plot(recall, precision)
            labels.append(f"{figure_name(name)}, AP {area:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        add_legend(axes, axes.lines, labels)
    save_figure(path, figure)


def plot_precision_recall(scores: DetectionScores, path: Path) -> None:
    """Plot a precision-recall curve per class at an IoU of .5, with a dot at the highest F1.

    Args:
        scores: Scores of a detector.
        path: Output image, .png.
    """
    figure = Figure(figsize=(6, figure_height(len(scores.classes))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines, labels = [], []
    for each in scores.classes:
        curve = np.asarray(each.precision_curve)
        if not np.isnan(curve).all():
            (line,) = axes.plot(np.linspace(0, 1, len(curve)), curve)
            lines.append(line)
            labels.append(f"{figure_name(each.name)}, AP50 {each.ap50:.3f}")
            if not math.isnan(each.threshold):
                axes.plot(each.recall, each.precision, "o", color=line.get_color())
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="at an IoU of .5")
    axes.grid(alpha=0.3)
    if lines:
        add_legend(axes, lines, labels)
    save_figure(path, figure)
