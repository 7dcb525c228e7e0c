"""Precision against recall, a curve a class, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit.io import save_figure
from perf_vit.tasks.figure_text import add_legend, figure_height, figure_name

__all__ = ["PrecisionRecall", "save_precision_recall"]

PrecisionRecall: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike]
"""Precision and recall over the thresholds, [n] each."""


def save_precision_recall(
    class_names: Sequence[str], curves: Sequence[PrecisionRecall], areas: Sequence[float], path: str | Path, title: str
) -> None:
    """Draw the curves of the classes that have one.

    Args:
        class_names: K names.
        curves: one a class.
        areas: average precision of each class; NaN where there is no curve.
        path: the picture to write, .png.
        title: what is counted.
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
