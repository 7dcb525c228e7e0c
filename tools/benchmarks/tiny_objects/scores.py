"""Average precision of the test tiles, and recall by the objects' size."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from mosaic import CLASSES
from torchvision.ops import box_iou

from perf_vit.tasks.detection_metrics import DetectionMetrics
from perf_vit.types import Detections, ObjectLabels

SIZE_BOUNDS = (3.0, 4.0, 6.0, 8.0, 11.0, 16.0, 32.0)
"""Of the square root of an object's area, in pixels of the full tile."""

IOUS = (0.5, 0.25)


class SizeScores:
    """AP as COCO defines it; and how many objects of each size are found at the score of the highest F1.

    For the recall, detections of at least that score take, the surest first, the nearest object of their class that is
    left, by IoU.
    """

    def __init__(self) -> None:
        self.metrics = DetectionMetrics(CLASSES, max_detections=6000)
        self.images: list[tuple[Detections, ObjectLabels]] = []

    def update(self, found: Detections, truth: ObjectLabels) -> None:
        """Take up one tile."""
        self.metrics.update([found], [truth])
        self.images.append((found, truth))

    def to_dict(self) -> dict[str, Any]:
        """All scores as plain values."""
        scores = self.metrics.compute()
        return {
            "ap": scores.ap,
            "ap50": scores.ap50,
            "ap_by_size": {name: value for name, value in scores.ap_by_size.items() if value == value},
            "ap50_by_class": {each.name: each.ap50 for each in scores.classes},
            "f1_by_class": {each.name: each.f1 for each in scores.classes},
            "threshold": scores.threshold,
            "recall_by_size": {str(iou): self._recall(scores.threshold, iou) for iou in IOUS},
        }

    def _recall(self, threshold: float, least_iou: float) -> list[dict[str, float]]:
        sizes, hits = [], []
        for found, truth in self.images:
            counted = ~truth.ignored
            boxes = truth.boxes_xyxy[counted]
            sizes.append(np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)))
            hits.append(_hit(found, threshold, torch.from_numpy(boxes), truth.labels[counted], least_iou))
        size, hit = np.concatenate(sizes), np.concatenate(hits)
        rows = []
        for low, high in itertools.pairwise(SIZE_BOUNDS):
            chosen = hit[(size >= low) & (size < high)]
            rows.append(
                {"low": low, "high": high, "num": len(chosen), "recall": float(chosen.mean()) if len(chosen) else 0.0}
            )
        return rows


def _hit(found: Detections, threshold: float, boxes: torch.Tensor, labels: np.ndarray, least_iou: float) -> np.ndarray:
    """Which objects are found, [n] bool."""
    hit = np.zeros(len(boxes), bool)
    for index in range(len(CLASSES)):
        chosen = (found.labels == index) & (found.scores >= threshold)
        order = found.scores[chosen].argsort(descending=True)
        places = np.nonzero(labels == index)[0]
        iou = box_iou(found.boxes_xyxy[chosen][order].float(), boxes[places].float()).numpy()
        for row in iou:
            if not len(row):
                break
            best = int(np.where(hit[places], 0.0, row).argmax())
            if row[best] >= least_iou and not hit[places[best]]:
                hit[places[best]] = True
    return hit
