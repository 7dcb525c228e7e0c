"""Pictures of a detector's scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from perf_vit.io import save_figure
from perf_vit.tasks.detection_metrics import DetectionScores
from perf_vit.tasks.figure_text import add_legend, figure_height, figure_name

__all__ = ["plot_precision_recall"]


def plot_precision_recall(scores: DetectionScores, path: Path) -> None:
    """Draw precision against recall at an IoU of .5, a curve a class, with a dot where F1 is highest."""
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
