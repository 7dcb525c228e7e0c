"""Segmentation metrics per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryJaccardIndex,
    BinaryPrecision,
    BinaryRecall,
    BinaryStatScores,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
    MulticlassStatScores,
)
from torchmetrics.wrappers import MultioutputWrapper

from perf_vit.metrics.plots import save_precision_recall
from perf_vit.types import IGNORE_INDEX, LabelArray

__all__ = ["ClassScores", "SegmentationCurves", "class_scores", "segmentation_metrics"]


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of one class over all labelled pixels, from 0 to 1; NaN if the class is in neither labels nor map."""

    name: str
    iou: float
    f1: float
    precision: float
    recall: float
    num_pixels: int

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values for JSON, NaN as None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


_BINARY: dict[str, Any] = {
    "iou": BinaryJaccardIndex,
    "f1": BinaryF1Score,
    "precision": BinaryPrecision,
    "recall": BinaryRecall,
    "counts": BinaryStatScores,
}


def segmentation_metrics(num_classes: int, *, multilabel: bool = False) -> MetricCollection:
    """Build the metrics IoU, F1, precision, recall and counts per class; ignored pixels are left out.

    Args:
        num_classes: Number of classes K.
        multilabel: Whether predictions and labels are 0 and 1 per class, [B, K, H, W], instead of class indices,
            [B, H, W].
    """
    if multilabel:
        # torchmetrics' multilabel metrics don't accept a single class.
        return MetricCollection(
            {
                key: MultioutputWrapper(metric(ignore_index=IGNORE_INDEX), num_classes, output_dim=1, remove_nans=False)
                for key, metric in _BINARY.items()
            },
            compute_groups=False,
        )
    shared: dict[str, Any] = {"num_classes": num_classes, "average": None, "ignore_index": IGNORE_INDEX}
    return MetricCollection(
        {
            "iou": MulticlassJaccardIndex(**shared),
            "f1": MulticlassF1Score(**shared),
            "precision": MulticlassPrecision(**shared),
            "recall": MulticlassRecall(**shared),
            "counts": MulticlassStatScores(**shared),
        }
    )


def class_scores(metrics: MetricCollection, classes: Sequence[str]) -> list[ClassScores]:
    """Compute the metrics of `segmentation_metrics`, one record per class."""
    values: dict[str, Tensor] = metrics.compute()
    scores = []
    for index, name in enumerate(classes):
        true_positives, false_positives, _, _, support = values["counts"][index].tolist()
        occurs = true_positives + false_positives + support > 0
        iou, f1, precision, recall = (
            values[key][index].item() if occurs else math.nan for key in ("iou", "f1", "precision", "recall")
        )
        scores.append(ClassScores(name, iou, f1, precision, recall, support))
    return scores


_BINS = 1000


class SegmentationCurves:
    """Confusion matrix, precision-recall and ROC curves of class probabilities, updated strip by strip.

    Probabilities are counted in 1,000 bins per class, so memory doesn't grow with the number of pixels.

    Args:
        classes: Class names, in the order of the class indices.
        multilabel: Whether a pixel may have several classes; there is no confusion matrix then.

    Attributes:
        confusion: Pixel counts, rows true and columns predicted classes, [K, K]; None if `multilabel`.
    """

    def __init__(self, classes: Sequence[str], *, multilabel: bool = False) -> None:
        self.classes = tuple(classes)
        num_classes = len(self.classes)
        self.confusion: npt.NDArray[np.int64] | None = None
        if not multilabel:
            self.confusion = np.zeros((num_classes, num_classes), np.int64)
        # Pixel counts by class, whether the pixel has this class, and bin of the class probability.
        self._counts: npt.NDArray[np.int64] = np.zeros((num_classes, 2, _BINS), np.int64)

    def update(self, probabilities: npt.NDArray[np.float32] | Tensor, labels: LabelArray) -> None:
        """Update with predictions and ground truth.

        Args:
            probabilities: Class probabilities, [K, H, W].
            labels: Class indices, [H, W]; if `multilabel`, 0 and 1 per class, [K, H, W]. `IGNORE_INDEX` marks pixels to
                leave out.
        """
        scores = torch.as_tensor(probabilities).float().cpu().numpy()
        if self.confusion is None:
            for index, (values, layer) in enumerate(zip(scores, labels, strict=True)):
                counted = layer != IGNORE_INDEX
                self._count(index, values[counted], layer[counted] == 1)
            return
        counted = labels != IGNORE_INDEX
        truth, scores = labels[counted].astype(np.int64), scores[:, counted]
        num_classes = len(self.classes)
        pairs = truth * num_classes + scores.argmax(0)
        self.confusion += np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        for index, values in enumerate(scores):
            self._count(index, values, truth == index)

    def _count(self, index: int, values: npt.NDArray[np.float32], is_true: npt.NDArray[np.bool_]) -> None:
        """Add pixels to the bins of a class."""
        bins = (values * _BINS).astype(np.int64).clip(0, _BINS - 1) + _BINS * is_true
        self._counts[index] += np.bincount(bins, minlength=2 * _BINS).reshape(2, _BINS)

    def auroc(self) -> list[float]:
        """Return the area under the ROC curve of each class against all others; NaN without positives or negatives."""
        with np.errstate(invalid="ignore"):
            rates = [np.cumsum(counts[:, ::-1], axis=1) / counts.sum(1, keepdims=True) for counts in self._counts]
        return [float(np.trapezoid(np.append(0, true), np.append(0, false))) for false, true in rates]

    def average_precision(self) -> list[float]:
        """Return the average precision of each class as a sum over thresholds; NaN without positives."""
        return [float((np.diff(recall, prepend=0) * precision).sum()) for precision, recall in self._precision_recall()]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values for JSON, NaN as None."""
        areas = {"auroc": self._named(self.auroc()), "average_precision": self._named(self.average_precision())}
        return areas if self.confusion is None else {**areas, "confusion": self.confusion.tolist()}

    def plot(self, path: Path) -> None:
        """Plot a precision-recall curve per class."""
        title = "pixels, one class against the others"
        save_precision_recall(self.classes, self._precision_recall(), self.average_precision(), path, title)

    def _named(self, values: Sequence[float]) -> dict[str, float | None]:
        known = (None if value != value else value for value in values)
        return dict(zip(self.classes, known, strict=True))

    def _precision_recall(self) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Return precision and recall of each class, from the highest threshold down."""
        curves = []
        for counts in self._counts:
            false, true = np.cumsum(counts[:, ::-1], axis=1)
            with np.errstate(invalid="ignore"):
                curves.append((np.where(true + false > 0, true / np.maximum(true + false, 1), 1.0), true / true[-1]))
        return curves
