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
from perf_vit.types import BoolArray, Detections, ObjectLabels

__all__ = ["PanopticQuality", "PanopticScores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticScores:
    """Quality of one class, or the mean of several; 0 to 1, NaN where there is no such object, found or labelled.

    Attributes:
        pq: panoptic quality, sq * rq.
        sq: segmentation quality, the mean IoU of what is found.
        rq: recognition quality, F1 at an IoU of .5.
    """

    pq: float
    sq: float
    rq: float


class PanopticQuality:
    """Panoptic quality of instances (Kirillov et al. 2019, "Panoptic Segmentation", equations 1 and 2).

    A pixel belongs to one object: the surest of the found ones that cover it, the first of the labelled ones. Objects
    that others hide wholly count nowhere. A found and a labelled object of a class with an IoU above .5 are a pair.
    Pixels of ignored objects count in no IoU, and what is found mostly on them counts nowhere.

    Args:
        num_classes: classes are 0 to num_classes - 1.
        score_threshold: objects found with a lower score count nowhere.
    """

    def __init__(self, num_classes: int, score_threshold: float) -> None:
        self.score_threshold = score_threshold
        self._iou = np.zeros(num_classes)
        # True, found in vain and missed, a row a class.
        self._counts = np.zeros((num_classes, 3), np.int64)

    def update(self, detections: Sequence[Detections], labels: Sequence[ObjectLabels]) -> None:
        """Take up what was found in some images, and what is there.

        Raises:
            InputError: there are no masks in one of them.
        """
        for found, truth in zip(detections, labels, strict=True):
            if found.masks is None or truth.masks is None:
                raise InputError("panoptic quality needs masks, found and labelled, got another kind of geometry")
            self._update_image(found, truth)

    def compute(self) -> tuple[PanopticScores, list[PanopticScores]]:
        """The mean over the classes that occur, and the scores of each class."""
        each = [_scores(iou, *counts) for iou, counts in zip(self._iou.tolist(), self._counts.tolist(), strict=True)]
        known = [scores for scores in each if not math.isnan(scores.pq)]
        names = ("pq", "sq", "rq")
        mean = {name: float(np.mean([getattr(s, name) for s in known])) if known else math.nan for name in names}
        return PanopticScores(**mean), each

    def _update_image(self, found: Detections, truth: ObjectLabels) -> None:
        assert truth.masks is not None
        scores, found_labels, masks = (_array(values) for values in (found.scores, found.labels, found.masks))
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= self.score_threshold]
        counted = np.flatnonzero(~truth.ignored)
        found_map, truth_map = _painted(masks[order].astype(bool)), _painted(truth.masks[counted])
        void = truth.masks[truth.ignored].any(axis=0) & (truth_map == 0)
        self._pair(_overlaps(found_map, truth_map, void, len(order), len(counted)), found_labels[order],
                   truth.labels[counted])  # fmt: skip

    def _pair(self, overlaps: npt.NDArray[np.int64], found: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
        """Count the pairs of one image.

        Args:
            overlaps: pixels that found and labelled objects share, [found + 1, labelled + 2]; row 0 is nothing found,
                column 0 nothing labelled, the last column ignored.
            found: classes.
            truth: classes.
        """
        shared = overlaps[1:, 1:-1]
        found_px = overlaps[1:].sum(1)
        union = (found_px - overlaps[1:, -1])[:, None] + overlaps[:, 1:-1].sum(0) - shared
        iou = shared / np.maximum(union, 1)
        rows, cols = np.nonzero((iou > 0.5) & (found[:, None] == truth))
        np.add.at(self._iou, truth[cols], iou[rows, cols])
        np.add.at(self._counts[:, 0], truth[cols], 1)
        vain = (found_px > 0) & (2 * overlaps[1:, -1] <= found_px)
        vain[rows] = False
        missed = overlaps[:, 1:-1].sum(0) > 0
        missed[cols] = False
        np.add.at(self._counts[:, 1], found[vain], 1)
        np.add.at(self._counts[:, 2], truth[missed], 1)


def _painted(masks: BoolArray) -> npt.NDArray[np.int64]:
    """Number of the first mask that covers each pixel, counted from 1; 0 where there is none."""
    painted = np.zeros(masks.shape[1:], np.int64)
    for number in range(len(masks), 0, -1):
        painted[masks[number - 1]] = number
    return painted


def _overlaps(
    found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64], void: BoolArray, num_found: int, num_truth: int
) -> npt.NDArray[np.int64]:
    columns = np.where(void, num_truth + 1, truth)
    shape = num_found + 1, num_truth + 2
    return np.bincount((found * shape[1] + columns).ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def _scores(iou: float, true: int, vain: int, missed: int) -> PanopticScores:
    if not true + vain + missed:
        return PanopticScores(pq=math.nan, sq=math.nan, rq=math.nan)
    sq = iou / true if true else 0.0
    rq = true / (true + 0.5 * vain + 0.5 * missed)
    return PanopticScores(pq=sq * rq, sq=sq, rq=rq)


def _array(values: Any) -> npt.NDArray[Any]:
    return torch.as_tensor(values).cpu().numpy()
