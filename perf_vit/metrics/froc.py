"""Free-response ROC (FROC): sensitivity against false positives per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.geometry.boxes import intersecting_pairs, oriented_box_bounds, oriented_box_corners
from perf_vit.geometry.objects import cropped_masks
from perf_vit.types import BoolArray, Detections, MaskCrops, ObjectLabels

__all__ = ["FROC_RATES", "Froc"]

IndexArray = npt.NDArray[np.int64]

FROC_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per image at which CAMELYON16 reports the sensitivity."""


class Froc:
    """Free-response ROC as CAMELYON16 defines it (Ehteshami Bejnordi et al. 2017, JAMA 318(22)).

    A detection is reduced to the centre of its box, oriented box or mask. It hits every labelled object of its class
    that contains this point: within the object's mask if it has one, else its oriented box, else its box. The score of
    an object is the highest score among its hits. A detection without hits is a false positive; a detection that hits
    ignored objects only is not counted.

    Args:
        num_classes: Number of classes; labels are 0 to num_classes - 1.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.num_images = 0
        self._hits: list[list[float]] = [[] for _ in range(num_classes)]
        self._false_positives: list[list[float]] = [[] for _ in range(num_classes)]

    def update(self, detections: Sequence[Detections], labels: Sequence[ObjectLabels]) -> None:
        """Update with predictions and ground truth.

        Args:
            detections: Detections of each image.
            labels: Labelled objects of each image.
        """
        for found, truth in zip(detections, labels, strict=True):
            self.num_images += 1
            scores, classes = _array(found.scores), _array(found.labels)
            points, objects = _inside(_points(found), truth)
            same = classes[points] == truth.labels[objects]
            points, objects = points[same], objects[same]
            best, false_positives = np.full(len(truth), -math.inf), np.ones(len(scores), bool)
            np.maximum.at(best, objects, scores[points])
            false_positives[points] = False
            for index in range(self.num_classes):
                self._hits[index] += best[(truth.labels == index) & ~truth.ignored].tolist()
                self._false_positives[index] += scores[(classes == index) & false_positives].tolist()

    def compute(self) -> list[dict[str, Any]]:
        """Return per class the "sensitivity" at each of `FROC_RATES` and their "mean"; NaN if there are no objects."""
        return [
            self._score(np.array(hits), np.array(false_positives))
            for hits, false_positives in zip(self._hits, self._false_positives, strict=True)
        ]

    def _score(self, hits: npt.NDArray[np.float64], false_positives: npt.NDArray[np.float64]) -> dict[str, Any]:
        if not len(hits):
            return {"sensitivity": [math.nan] * len(FROC_RATES), "mean": math.nan}
        found = np.concatenate([hits[hits > -math.inf], false_positives])
        thresholds = np.unique(found)[::-1]
        sensitivity = [0.0, *((hits >= threshold).mean() for threshold in thresholds)]
        rates = [0.0, *((false_positives >= threshold).sum() / self.num_images for threshold in thresholds)]
        # The sensitivity stays constant beyond the last rate.
        at_rates = np.interp(FROC_RATES, rates, sensitivity)
        return {"sensitivity": at_rates.tolist(), "mean": float(at_rates.mean())}


def _points(found: Detections) -> npt.NDArray[np.float64]:
    """Return the centres of the detections (x, y), [n, 2]."""
    if found.oriented_boxes is not None:
        return _array(found.oriented_boxes)[:, :2]
    if found.boxes_xyxy is not None:
        boxes = _array(found.boxes_xyxy)
        return (boxes[:, :2] + boxes[:, 2:]) / 2
    masks = cropped_masks(found)
    assert masks is not None
    places = [
        np.argwhere(crop)[:, ::-1] + 0.5 + corner[::-1] for crop, corner in zip(masks.crops, masks.corners, strict=True)
    ]
    return np.array([xy.mean(axis=0) if len(xy) else (-1, -1) for xy in places], np.float64).reshape(-1, 2)


def _inside(points: npt.NDArray[np.float64], truth: ObjectLabels) -> tuple[IndexArray, IndexArray]:
    """Return pairs of a point and an object that contains it, [p] each."""
    masks = cropped_masks(truth)
    if masks is not None:
        bounds: npt.NDArray[Any] = masks.rectangles()
    else:
        bounds = truth.boxes_xyxy if truth.oriented_boxes is None else oriented_box_bounds(truth.oriented_boxes)
    first, second = intersecting_pairs(np.tile(points, 2), bounds)
    if masks is not None:
        holds = _in_masks(points[first], masks, second)
    elif truth.oriented_boxes is not None:
        holds = _in_oriented(points[first], truth.oriented_boxes[second])
    else:
        low, high = truth.boxes_xyxy[second, :2], truth.boxes_xyxy[second, 2:]
        holds = np.asarray(((points[first] >= low) & (points[first] < high)).all(axis=1))
    return first[holds], second[holds]


def _in_masks(points: npt.NDArray[np.float64], masks: MaskCrops, indices: IndexArray) -> BoolArray:
    """Return whether the i-th point lies in the i-th mask, [p]."""
    pixels = np.floor(points[:, ::-1]).astype(np.int64) - masks.corners[indices]
    crops = [masks.crops[index] for index in indices.tolist()]
    return np.array(
        [
            row < crop.shape[0] and col < crop.shape[1] and crop[row, col]
            for (row, col), crop in zip(pixels.tolist(), crops, strict=True)
        ],
        bool,
    )


def _in_oriented(points: npt.NDArray[np.float64], oriented_boxes: npt.NDArray[np.floating]) -> BoolArray:
    """Return whether the i-th point lies in the i-th oriented box, [p]."""
    corners = oriented_box_corners(oriented_boxes)
    sides = np.roll(corners, -1, axis=1) - corners
    ahead = points[:, None] - corners
    cross = sides[..., 0] * ahead[..., 1] - sides[..., 1] * ahead[..., 0]
    return np.asarray((cross >= 0).all(axis=1) | (cross <= 0).all(axis=1))


def _array(values: Any) -> npt.NDArray[Any]:
    return torch.as_tensor(values).cpu().numpy()
