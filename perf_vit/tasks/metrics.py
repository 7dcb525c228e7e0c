"""Segmentation metrics per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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

from perf_vit.types import IGNORE_INDEX

__all__ = ["ClassScores", "class_scores", "segmentation_metrics"]


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of one class over all labelled pixels; 0 to 1, NaN where the class is in neither labels nor map."""

    name: str
    iou: float
    f1: float
    precision: float
    recall: float
    num_pixels: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as None, for JSON."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


_BINARY: dict[str, Any] = {
    "iou": BinaryJaccardIndex,
    "f1": BinaryF1Score,
    "precision": BinaryPrecision,
    "recall": BinaryRecall,
    "counts": BinaryStatScores,
}


def segmentation_metrics(num_classes: int, *, multilabel: bool = False) -> MetricCollection:
    """IoU, F1, precision, recall and counts per class; ignored pixels count nowhere.

    Args:
        num_classes: K.
        multilabel: predictions and labels are 0 and 1 for each class, [B, K, H, W], instead of class indices [B, H, W].
    """
    if multilabel:
        # torchmetrics' own metrics for several labels refuse a single one.
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
    """Compute the collection of `segmentation_metrics` into one record a class."""
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
