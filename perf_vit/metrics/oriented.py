"""Average precision of oriented boxes with the DOTA protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from perf_vit.errors import InputError
from perf_vit.geometry.oriented_boxes import oriented_iou_matrix
from perf_vit.types import Detections, ObjectLabels

__all__ = ["OrientedAveragePrecision"]

_COCO_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_FALSE, _TRUE, _IGNORED = 0, 1, 2
_BOXES_AT_ONCE = 1024


class OrientedAveragePrecision(Metric):
    """Average precision of oriented boxes, per class and as mean over classes.

    A detection is assigned to the object of its class and image with the largest exact IoU, if that is above the
    threshold. The detection with the highest score is a true positive, further ones of the same object are false
    positives. Ignored objects and the detections assigned to them are not counted (Everingham et al. 2010 for Pascal
    VOC, Xia et al. 2018 for DOTA).

    Args:
        num_classes: Number of classes; labels are 0 to num_classes - 1.
        iou_thresholds: IoU thresholds that `map` averages over; must include 0.5.

    Raises:
        ValueError: 0.5 is not among the thresholds.
    """

    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    outcomes: list[Tensor]
    num_objects: Tensor

    def __init__(
        self,
        num_classes: int,
        iou_thresholds: Sequence[float] = _COCO_THRESHOLDS,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.iou_thresholds = tuple(iou_thresholds)
        self._index_50 = _index_of_half(self.iou_thresholds)
        for name in ("scores", "labels", "outcomes"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("num_objects", default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, detections: Sequence[Detections], targets: Sequence[ObjectLabels]) -> None:
        """Update with predictions and ground truth.

        Args:
            detections: Detections of each image, with oriented boxes.
            targets: Labelled objects of each image, with oriented boxes.

        Raises:
            InputError: The detections or the labels have no oriented boxes.
        """
        for found, target in zip(detections, targets, strict=True):
            if found.oriented_boxes is None or target.oriented_boxes is None:
                raise InputError(
                    "expected oriented boxes in detections and labels, got none; use DetectionMetrics for upright boxes"
                )
            self._update_image(found, target)

    def _update_image(self, found: Detections, target: ObjectLabels) -> None:
        boxes, scores, labels = (
            torch.as_tensor(values, device=self.device).detach()
            for values in (found.oriented_boxes, found.scores, found.labels)
        )
        objects, object_labels, ignored = (
            torch.as_tensor(values, device=self.device)
            for values in (target.oriented_boxes, target.labels, target.ignored)
        )
        best, owner = _nearest(boxes.double().reshape(-1, 5), labels, objects.double().reshape(-1, 5), object_labels)
        self.scores.append(scores.float())
        self.labels.append(labels.long())
        self.outcomes.append(_outcomes(best, owner, scores, ignored, self.iou_thresholds))
        self.num_objects += torch.bincount(object_labels[~ignored], minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Compute the scores, from 0 to 1; NaN for classes without labelled objects, which means leave out.

        Returns:
            map: Area under the precision envelope, mean over classes and thresholds.
            map_50: Area under the precision envelope at an IoU of 0.5, mean over classes.
            map_50_voc07: Mean precision at 11 recalls at an IoU of 0.5, mean over classes.
            map_per_class, map_50_per_class, map_50_voc07_per_class: Scores per class, [num_classes].
        """
        scores, labels, outcomes = (
            dim_zero_cat(state) if len(state) else default
            for state, default in (
                (self.scores, self.num_objects.new_zeros(0)),
                (self.labels, self.num_objects.new_zeros(0)),
                (self.outcomes, self.num_objects.new_zeros(0, len(self.iou_thresholds))),
            )
        )
        order = scores.argsort(descending=True, stable=True)
        areas = torch.full((self.num_classes, len(self.iou_thresholds)), math.nan, dtype=torch.float64)
        points = torch.full((self.num_classes,), math.nan, dtype=torch.float64)
        for index, num_objects in enumerate(self.num_objects.tolist()):
            ranked = outcomes[order[labels[order] == index]].cpu()
            if num_objects:
                areas[index] = torch.stack([_area(column, num_objects) for column in ranked.T])
                points[index] = _eleven_points(ranked[:, self._index_50], num_objects)
        return _summary(areas, areas[:, self._index_50], points, self.device)


def _index_of_half(iou_thresholds: Sequence[float]) -> int:
    for index, threshold in enumerate(iou_thresholds):
        if math.isclose(threshold, 0.5):
            return index
    raise ValueError(f"expected 0.5 among the IoU thresholds, got {list(iou_thresholds)}")


def _nearest(boxes: Tensor, labels: Tensor, objects: Tensor, object_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each box's largest IoU with an object of its class and the object's index, [n] each; 0 without objects."""
    if not len(objects):
        return boxes.new_zeros(len(boxes)), labels.new_zeros(len(boxes), dtype=torch.long)
    parts = []
    # In blocks, as all pairs of thousands of boxes (e.g. a harbour) would take gigabytes.
    for some, classes in zip(torch.split(boxes, _BOXES_AT_ONCE), torch.split(labels, _BOXES_AT_ONCE), strict=True):
        iou = oriented_iou_matrix(some, objects)
        parts.append(torch.where(classes[:, None] == object_labels, iou, 0).max(1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _outcomes(best: Tensor, owner: Tensor, scores: Tensor, ignored: Tensor, iou_thresholds: Sequence[float]) -> Tensor:
    """Return the outcome of each detection at each threshold (false, true, ignored), [n, thresholds] int8.

    Args:
        best: Largest IoU of each detection with an object of its class, [n].
        owner: Index of that object, [n].
        scores: Scores, [n].
        ignored: Whether each object is ignored, [m].
        iou_thresholds: IoU thresholds; a higher IoU is a match.
    """
    outcomes = torch.full((len(scores), len(iou_thresholds)), _FALSE, dtype=torch.int8, device=best.device)
    if not len(ignored) or not len(scores):
        return outcomes
    rank = torch.empty_like(owner)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores), device=best.device)
    for column, threshold in enumerate(iou_thresholds):
        hits = best > threshold
        first = torch.full_like(ignored, len(scores), dtype=torch.long)
        first.scatter_reduce_(0, owner[hits], rank[hits], "amin")
        outcomes[hits & (rank == first[owner]), column] = _TRUE
        outcomes[hits & ignored[owner], column] = _IGNORED
    return outcomes


def _precision_and_hits(outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Return precision and number of true positives after each counted detection, in descending score."""
    true = (outcomes[outcomes != _IGNORED] == _TRUE).cumsum(0)
    return true.double() / torch.arange(1, len(true) + 1), true


def _area(outcomes: Tensor, num_objects: int) -> Tensor:
    precision, true = _precision_and_hits(outcomes)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    gained = true.diff(prepend=true.new_zeros(1))
    return (envelope * gained).sum() / num_objects


def _eleven_points(outcomes: Tensor, num_objects: int) -> Tensor:
    precision, true = _precision_and_hits(outcomes)
    # In integers, so that a recall of exactly 0.3 reaches the threshold of 0.3.
    reached = 10 * true[:, None] >= num_objects * torch.arange(11)
    best = torch.where(reached, precision[:, None], 0)
    return best.amax(0).mean() if len(best) else torch.zeros((), dtype=torch.float64)


def _summary(areas: Tensor, areas_50: Tensor, points_50: Tensor, device: torch.device) -> dict[str, Tensor]:
    per_class = {"map": areas.mean(1), "map_50": areas_50, "map_50_voc07": points_50}
    means = {name: values.nanmean() for name, values in per_class.items()}
    named = means | {f"{name}_per_class": values for name, values in per_class.items()}
    return {name: values.float().to(device) for name, values in named.items()}
