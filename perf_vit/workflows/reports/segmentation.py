"""Evaluation of segmentation: scores of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from perf_vit.metrics import (
    ClassScores,
    RegisteredMetrics,
    SegmentationCurves,
    class_scores,
    save_confusion_matrix,
    segmentation_metrics,
)
from perf_vit.types import LabelArray
from perf_vit.workflows.progress import digits, mean_over_present, score_table
from perf_vit.workflows.task import Evaluation

__all__ = ["SegmentationEvaluation"]


class SegmentationEvaluation(Evaluation):
    """Scores of the pixels of maps that are given part by part.

    Args:
        classes: Names, in the order of the class indices.
        multilabel: Whether a pixel may have several classes.
        title: What was scored against what.
        registered: Registered metrics.
    """

    pictures = ("", "_confusion")
    captions = MappingProxyType({"": "precision and recall", "_confusion": "confusion matrix"})

    def __init__(
        self,
        classes: Sequence[str],
        *,
        multilabel: bool = False,
        title: str = "scores",
        registered: RegisteredMetrics | None = None,
    ) -> None:
        super().__init__(title, registered)
        self.classes = tuple(classes)
        self.curves = SegmentationCurves(classes, multilabel=multilabel)
        self._metrics = segmentation_metrics(len(self.classes), multilabel=multilabel)

    def update(self, predicted: Tensor, probabilities: Any, labels: LabelArray) -> None:
        """Update with predictions and ground truth of a part.

        Args:
            predicted: Class indices, [H, W]; with `multilabel`, 0 and 1 per class, [K, H, W].
            probabilities: Class probabilities, [K, H, W].
            labels: Labels in the form of `predicted`; `IGNORE_INDEX` marks pixels to leave out.
        """
        truth = torch.from_numpy(labels).long()[None]
        self._metrics.update(predicted[None], truth)
        if self.registered is not None:
            self.registered.update(predicted[None], truth)
        self.curves.update(probabilities, labels)

    @cached_property
    def scores(self) -> list[ClassScores]:
        """Scores of each class; no further part can be added."""
        return class_scores(self._metrics, self.classes)

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row a class; see `Evaluation.table`."""
        return [asdict(each) for each in self.scores]

    @property
    def headline(self) -> dict[str, str]:
        """Means over the classes that occur."""
        means = {"mean IoU": "iou", "mean F1": "f1"}
        return {name: digits(mean_over_present(self.scores, key)) for name, key in means.items()}

    def builtin_tables(self) -> list[Table]:
        """All built-in scores for people."""
        return [score_table(self.scores, self.title)]

    def builtin_scores(self) -> dict[str, Any]:
        """All built-in scores as plain values of JSON, NaN as None."""
        means = {key: mean_over_present(self.scores, key) for key in ("iou", "f1", "precision", "recall")}
        return {"classes": [each.to_dict() for each in self.scores], "mean": means, **self.curves.to_dict()}

    def draw(self, path: str | Path) -> list[Path]:
        """Write precision-recall curves and, of classes that exclude each other, the confusion matrix."""
        curve, matrix = paths = self.picture_paths(path)
        self.curves.plot(curve)
        if self.curves.confusion is None:
            return paths[:1]
        save_confusion_matrix(self.curves.confusion, self.classes, matrix)
        return paths
