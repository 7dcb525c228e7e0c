"""Scores of a trained network on validation tiles, one class a task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from perf_vit.inference.dense_output import sigmoid, softmax
from perf_vit.metrics import ClassificationMetrics, RegisteredMetrics, RegressionScores
from perf_vit.metrics.matching import NOT_COUNTED, match_objects
from perf_vit.plotting import default_colormap
from perf_vit.plotting.panels import ERROR_COLOR
from perf_vit.reporting import hex_color
from perf_vit.reporting.samples import class_legend, mean_iou
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.reports import (
    ClassificationEvaluation,
    DetectionEvaluation,
    RegressionEvaluation,
    SegmentationEvaluation,
)
from perf_vit.workflows.task import Evaluation

__all__ = ["ClassificationTiles", "DetectionTiles", "SegmentationTiles"]


class SegmentationTiles:
    """Scores of the pixels of validation tiles.

    Args:
        network: Trained network.
    """

    def __init__(self, network: Any) -> None:
        spec = self._spec = network.spec
        self._network = network
        registered = RegisteredMetrics("segmentation", spec)
        self.evaluation = SegmentationEvaluation(spec.classes, multilabel=spec.multilabel, registered=registered)
        names = ["none", *spec.classes] if spec.multilabel else spec.classes
        colors = default_colormap(len(names), 0 if spec.multilabel else spec.background_index)
        self.legend = [*class_legend(names, colors), ("error", hex_color(ERROR_COLOR))]

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, str]:
        """Add a tile; return its score and the score in words."""
        decided = self._network.to_labels(logits[None])[0].cpu()
        to_probabilities = sigmoid if self._spec.multilabel else softmax
        truth = labels.numpy().astype(np.uint8)
        self.evaluation.update(decided, to_probabilities(logits.float().cpu().numpy(), 1.0), truth)
        score = mean_iou(decided.numpy(), truth, len(self._spec.classes), multilabel=self._spec.multilabel)
        return score, f"mean IoU {score:.3f}"

    def finish(self) -> Evaluation:
        """The scores of all tiles."""
        return self.evaluation


class DetectionTiles:
    """Scores of the objects of validation tiles.

    Args:
        network: Trained network.
    """

    def __init__(self, network: Any) -> None:
        spec = self._spec = network.spec
        registered = RegisteredMetrics("detection", spec)
        self.evaluation = DetectionEvaluation(
            spec.classes, spec.kind, score_threshold=spec.score_threshold, registered=registered
        )
        colors = default_colormap(len(spec.classes))
        self.legend = class_legend(spec.classes, colors)

    def update(self, found: Detections, labels: ObjectLabels) -> tuple[float, str]:
        """Add a tile; return its score and the score in words."""
        self.evaluation.update(found, labels)
        owners = match_objects(found, labels, self._spec.kind, score_threshold=self._spec.score_threshold)
        classes = torch.as_tensor(found.labels).cpu().numpy()
        hits = owners >= 0
        num_right = int((labels.labels[owners[hits]] == classes[hits]).sum())
        num = int((owners != NOT_COUNTED).sum() + (~labels.ignored).sum())
        score = 2 * num_right / num if num else math.nan
        return score, f"F1 {score:.3f}"

    def finish(self) -> Evaluation:
        """The scores of all tiles."""
        return self.evaluation


class ClassificationTiles:
    """Scores of validation images of a classifier or regression network.

    Args:
        network: Trained network.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        spec = network.spec
        self._metrics = ClassificationMetrics(spec.classes, spec.kind)
        self._registered = RegisteredMetrics(network.task, spec)
        self.legend: list[tuple[str, str]] = []

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[float, str]:
        """Add an image; return its score and the score in words."""
        scores = self._network.scores(logits[None]).float().cpu()
        for each in (self._metrics, self._registered):
            each.update(scores, target[None])
        if self._network.spec.kind == "single_label":
            score = float(scores[0, int(target)])
            return score, f"probability of the true class {score:.3f}"
        error = float((scores[0] - target).abs().mean())
        return -error, f"mean absolute error {error:.4g}"

    def finish(self) -> Evaluation:
        """The scores of all images."""
        scores = self._metrics.summary(with_curves=True)
        if isinstance(scores, RegressionScores):
            return RegressionEvaluation(scores, registered=self._registered)
        return ClassificationEvaluation(scores, registered=self._registered)
