"""Sensitivity against false positives an image: how detectors of lesions are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.ops.boxes import oriented_box_corners
from perf_vit.types import BoolArray, Detections, ObjectLabels

__all__ = ["FROC_RATES", "Froc"]

FROC_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives an image at which CAMELYON16 asks for the sensitivity."""


class Froc:
    """Free-response ROC as CAMELYON16 defines it (Ehteshami Bejnordi et al. 2017, JAMA 318(22)).

    A detection is a point, the centre of its box, oriented box or mask. It hits every labelled object of its class that
    holds the point: within its mask where there is one, else its oriented box, else its box. An object counts with its
    surest hit, a detection that hits nothing is a false positive, and one that hits ignored objects alone counts
    nowhere.

    Args:
        num_classes: classes are 0 to num_classes - 1.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.num_images = 0
        self._hits: list[list[float]] = [[] for _ in range(num_classes)]
        self._vain: list[list[float]] = [[] for _ in range(num_classes)]

    def update(self, detections: Sequence[Detections], labels: Sequence[ObjectLabels]) -> None:
        """Take up what was found in some images, and what is there."""
        for found, truth in zip(detections, labels, strict=True):
            self.num_images += 1
            points, scores, classes = _points(found), _array(found.scores), _array(found.labels)
            inside = _inside(points, truth) & (classes[:, None] == truth.labels)
            for index in range(self.num_classes):
                lesions = (truth.labels == index) & ~truth.ignored
                best = np.where(inside[:, lesions], scores[:, None], -math.inf).max(axis=0, initial=-math.inf)
                self._hits[index] += best.tolist()
                self._vain[index] += scores[(classes == index) & ~inside.any(axis=1)].tolist()

    def compute(self) -> list[dict[str, Any]]:
        """For each class, "sensitivity" at each of `FROC_RATES` and their "mean"; NaN without objects."""
        return [self._score(np.array(hits), np.array(vain)) for hits, vain in zip(self._hits, self._vain, strict=True)]

    def _score(self, hits: npt.NDArray[np.float64], vain: npt.NDArray[np.float64]) -> dict[str, Any]:
        if not len(hits):
            return {"sensitivity": [math.nan] * len(FROC_RATES), "mean": math.nan}
        found = np.concatenate([hits[hits > -math.inf], vain])
        thresholds = np.unique(found)[::-1]
        sensitivity = [0.0, *((hits >= threshold).mean() for threshold in thresholds)]
        rates = [0.0, *((vain >= threshold).sum() / self.num_images for threshold in thresholds)]
        # Beyond the last rate nothing more is found.
        at_rates = np.interp(FROC_RATES, rates, sensitivity)
        return {"sensitivity": at_rates.tolist(), "mean": float(at_rates.mean())}


def _points(found: Detections) -> npt.NDArray[np.float64]:
    """Centres, x and y, [n, 2]."""
    if found.oriented_boxes is not None:
        return _array(found.oriented_boxes)[:, :2]
    if found.boxes_xyxy is not None:
        boxes = _array(found.boxes_xyxy)
        return (boxes[:, :2] + boxes[:, 2:]) / 2
    places = [np.argwhere(mask)[:, ::-1] + 0.5 for mask in _array(found.masks)]
    return np.array([xy.mean(axis=0) if len(xy) else (-1, -1) for xy in places], np.float64).reshape(-1, 2)


def _inside(points: npt.NDArray[np.float64], truth: ObjectLabels) -> BoolArray:
    """Whether each point lies in each object, [n, objects]."""
    if truth.masks is not None:
        height, width = truth.masks.shape[1:]
        cols, rows = np.floor(points.T).astype(int)
        within = (cols >= 0) & (rows >= 0) & (cols < width) & (rows < height)
        hits = truth.masks[:, rows.clip(0, height - 1), cols.clip(0, width - 1)].T
        return np.asarray(hits & within[:, None])
    if truth.oriented_boxes is not None:
        corners = oriented_box_corners(truth.oriented_boxes)
        sides = np.roll(corners, -1, axis=1) - corners
        ahead = points[:, None, None] - corners
        cross = sides[..., 0] * ahead[..., 1] - sides[..., 1] * ahead[..., 0]
        return np.asarray((cross >= 0).all(axis=2) | (cross <= 0).all(axis=2))
    low, high = truth.boxes_xyxy[:, :2], truth.boxes_xyxy[:, 2:]
    return np.asarray(((points[:, None] >= low) & (points[:, None] < high)).all(axis=2))


def _array(values: Any) -> npt.NDArray[Any]:
    return torch.as_tensor(values).cpu().numpy()
