"""How segmentation depends on the threshold, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from perf_vit.types import IGNORE_INDEX, LabelArray

__all__ = ["SegmentationCurves"]

_BINS = 1000


class SegmentationCurves:
    """Confusion of classes, precision-recall and ROC curves of class probabilities, strip by strip.

    Probabilities are counted in 1,000 bins a class, so memory doesn't grow with pixels.

    Args:
        classes: names, in the order of the class indices.

    Attributes:
        confusion: pixels, a row a true class and a column a predicted one, [K, K].
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        num_classes = len(self.classes)
        self.confusion: npt.NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)
        # Pixels by class, whether they are of it, and bin of the class's probability.
        self._counts: npt.NDArray[np.int64] = np.zeros((num_classes, 2, _BINS), np.int64)

    def update(self, probabilities: npt.NDArray[np.float32] | Tensor, labels: LabelArray) -> None:
        """Take up pixels.

        Args:
            probabilities: one a class, [K, H, W].
            labels: class indices, `IGNORE_INDEX` where a pixel counts nowhere, [H, W].
        """
        counted = labels != IGNORE_INDEX
        truth = labels[counted].astype(np.int64)
        scores = torch.as_tensor(probabilities).float().cpu().numpy()[:, counted]
        num_classes = len(self.classes)
        pairs = truth * num_classes + scores.argmax(0)
        self.confusion += np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        for index, values in enumerate(scores):
            bins = (values * _BINS).astype(np.int64).clip(0, _BINS - 1) + _BINS * (truth == index)
            self._counts[index] += np.bincount(bins, minlength=2 * _BINS).reshape(2, _BINS)

    def auroc(self) -> list[float]:
        """Area under each class's ROC curve, against all other classes; NaN without pixels of it or of others."""
        with np.errstate(invalid="ignore"):
            rates = [np.cumsum(counts[:, ::-1], axis=1) / counts.sum(1, keepdims=True) for counts in self._counts]
        return [float(np.trapezoid(np.append(0, true), np.append(0, false))) for false, true in rates]

    def average_precision(self) -> list[float]:
        """Area under each class's precision-recall curve, as a sum over thresholds; NaN without pixels of it."""
        return [float((np.diff(recall, prepend=0) * precision).sum()) for precision, recall in self._precision_recall()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as None, for JSON."""
        return {
            "auroc": self._named(self.auroc()),
            "average_precision": self._named(self.average_precision()),
            "confusion": self.confusion.tolist(),
        }

    def plot(self, path: Path) -> None:
        """Draw precision against recall, a curve a class."""
        figure = Figure(figsize=(6, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, area, (precision, recall) in zip(
            self.classes, self.average_precision(), self._precision_recall(), strict=True
        ):
            if area == area:
                axes.plot(recall, precision, label=f"{name}, AP {area:.3f}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="pixels, class against others")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.savefig(path, dpi=110)

    def _named(self, values: Sequence[float]) -> dict[str, float | None]:
        known = (None if value != value else value for value in values)
        return dict(zip(self.classes, known, strict=True))

    def _precision_recall(self) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Precision and recall of each class from the highest threshold down."""
        curves = []
        for counts in self._counts:
            false, true = np.cumsum(counts[:, ::-1], axis=1)
            with np.errstate(invalid="ignore"):
                curves.append((np.where(true + false > 0, true / np.maximum(true + false, 1), 1.0), true / true[-1]))
        return curves
