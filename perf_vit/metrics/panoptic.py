"""Panoptic quality of instance masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.errors import InputError
from perf_vit.geometry.objects import crop_to_window, cropped_masks
from perf_vit.types import Detections, MaskCrops, ObjectLabels, Window

__all__ = ["PanopticQuality", "PanopticScores"]

# Pixels compared at once.
_PIXELS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticScores:
    """Quality of one class or mean over classes, from 0 to 1; NaN without predicted or labelled objects.

    Attributes:
        pq: Panoptic quality, sq * rq.
        sq: Segmentation quality, mean IoU of the matched pairs.
        rq: Recognition quality, F1 at an IoU of .5.
    """

    pq: float
    sq: float
    rq: float


class PanopticQuality:
    """Panoptic quality of instances (Kirillov et al. 2019, "Panoptic Segmentation", equations 1 and 2).

    Each pixel belongs to one object: the predicted one with the highest score, and the first labelled one. Objects that
    are covered completely are not counted. A predicted and a labelled object of a class match if their IoU is above .5.
    Pixels of ignored objects are left out of IoUs, and predicted objects that lie mostly on them are not counted.

    Args:
        num_classes: Number of classes; labels are 0 to num_classes - 1.
        score_threshold: Minimum score of a predicted object.
    """

    def __init__(self, num_classes: int, score_threshold: float) -> None:
        self.score_threshold = score_threshold
        self._iou = np.zeros(num_classes)
        # True positives, false positives and false negatives per class.
        self._counts = np.zeros((num_classes, 3), np.int64)

    def update(self, detections: Sequence[Detections], labels: Sequence[ObjectLabels]) -> None:
        """Update with predictions and ground truth.

        Args:
            detections: Detections of each image, with masks.
            labels: Labelled objects of each image, with masks.

        Raises:
            InputError: The detections or the labels have no masks.
        """
        for found, truth in zip(detections, labels, strict=True):
            ours, theirs = cropped_masks(found), cropped_masks(truth)
            if ours is None or theirs is None:
                raise InputError("panoptic quality needs masks in predictions and labels, got another kind of geometry")
            scores, classes = _array(found.scores), _array(found.labels)
            order = np.argsort(-scores, kind="stable")
            order = order[scores[order] >= self.score_threshold]
            counted = ~truth.ignored
            overlaps = _overlaps(ours.take(order), theirs.take(counted), theirs.take(truth.ignored))
            self._pair(overlaps, classes[order], truth.labels[counted])

    def compute(self) -> tuple[PanopticScores, list[PanopticScores]]:
        """Return the mean over the classes that occur, and the scores of each class."""
        each = [_scores(iou, *counts) for iou, counts in zip(self._iou.tolist(), self._counts.tolist(), strict=True)]
        known = [scores for scores in each if not math.isnan(scores.pq)]
        names = ("pq", "sq", "rq")
        mean = {name: float(np.mean([getattr(s, name) for s in known])) if known else math.nan for name in names}
        return PanopticScores(**mean), each

    def _pair(self, overlaps: _Overlaps, found: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
        """Match the objects of one image, given the classes of its predicted and labelled objects."""
        rows, cols, pixels = overlaps.found, overlaps.truth, overlaps.pixels
        void = cols == len(truth)
        found_px = _sums(rows, pixels, len(found))
        void_px = _sums(rows[void], pixels[void], len(found))
        truth_px = _sums(cols, pixels, len(truth))
        both = (rows >= 0) & (cols >= 0) & ~void
        rows, cols, shared = rows[both], cols[both], pixels[both]
        iou = shared / np.maximum(found_px[rows] - void_px[rows] + truth_px[cols] - shared, 1)
        paired = (iou > 0.5) & (found[rows] == truth[cols])
        rows, cols = rows[paired], cols[paired]
        np.add.at(self._iou, truth[cols], iou[paired])
        np.add.at(self._counts[:, 0], truth[cols], 1)
        false_positives = (found_px > 0) & (2 * void_px <= found_px)
        false_positives[rows] = False
        false_negatives = truth_px > 0
        false_negatives[cols] = False
        np.add.at(self._counts[:, 1], found[false_positives], 1)
        np.add.at(self._counts[:, 2], truth[false_negatives], 1)


@dataclass(frozen=True, slots=True)
class _Overlaps:
    """Shared pixels of predicted and labelled objects; index -1 is no object, index len(truth) an ignored one."""

    found: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]


def _overlaps(found: MaskCrops, truth: MaskCrops, ignored: MaskCrops) -> _Overlaps:
    """Count shared pixels in blocks of rows, so that memory doesn't grow with the image height."""
    height, width = truth.size
    num_rows = max(1, _PIXELS // max(width, 1))
    columns = len(truth) + 2
    codes, pixels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for row in range(0, height, num_rows):
        window = Window(row, 0, min(num_rows, height - row), width)
        found_map, truth_map = _painted(found, window), _painted(truth, window)
        void = (_painted(ignored, window) >= 0) & (truth_map < 0)
        truth_map[void] = len(truth)
        occupied = (found_map >= 0) | (truth_map >= 0)
        code, count = np.unique((found_map[occupied] + 1) * columns + truth_map[occupied] + 1, return_counts=True)
        codes.append(code)
        pixels.append(count)
    code, place = np.unique(np.concatenate(codes), return_inverse=True)
    return _Overlaps(code // columns - 1, code % columns - 1, _sums(place, np.concatenate(pixels), len(code)))


def _painted(masks: MaskCrops, window: Window) -> npt.NDArray[np.int64]:
    """Return the index of the first mask that covers each pixel of a window, -1 for none."""
    painted = np.full(window.shape, -1, np.int64)
    top, bottom = masks.rectangles()[:, [1, 3]].T
    for index in np.flatnonzero((top < window.row_stop) & (bottom > window.row))[::-1].tolist():
        part = crop_to_window(masks, index, window)
        if part is not None:
            painted[part[0]][part[1]] = index
    return painted


def _sums(index: npt.NDArray[np.int64], values: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Sum the values of each index from 0 to length - 1; other indices are left out."""
    known = (index >= 0) & (index < length)
    sums = np.zeros(length, np.int64)
    np.add.at(sums, index[known], values[known])
    return sums


def _scores(iou: float, true: int, false_positives: int, false_negatives: int) -> PanopticScores:
    if not true + false_positives + false_negatives:
        return PanopticScores(pq=math.nan, sq=math.nan, rq=math.nan)
    sq = iou / true if true else 0.0
    rq = true / (true + 0.5 * false_positives + 0.5 * false_negatives)
    return PanopticScores(pq=sq * rq, sq=sq, rq=rq)


def _array(values: Any) -> npt.NDArray[Any]:
    return torch.as_tensor(values).cpu().numpy()
