"""Average precision of the test tiles, and recall by the objects' size."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mosaic import CLASSES
from torchvision.ops import box_iou

from perf_vit.types import Detections, ObjectLabels

SIZE_BOUNDS = (3.0, 4.0, 6.0, 8.0, 11.0, 16.0, 23.0, 32.0)
"""Of the square root of an object's area, in pixels of the full tile."""

# For the table; after those of the picture.
_WIDE = ((4.0, 8.0), (8.0, 16.0), (16.0, 32.0))

IOUS = (0.5, 0.25)
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, eq=False)
class _Matches:
    """The detections of a class in one tile, surest first, and what each found.

    Attributes:
        scores: [D].
        sizes: square roots of the detections' areas, [D].
        matched: index of the object, -1 for none, [D].
        object_sizes: square roots of the objects' areas, [G].
        ignored: objects that count neither way, [G].
    """

    scores: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.float32]
    matched: npt.NDArray[np.int64]
    object_sizes: npt.NDArray[np.float32]
    ignored: npt.NDArray[np.bool_]


class SizeScores:
    """Average precision by class and size, and how many objects of each size are found at the score of the best F1.

    As COCO has it: the surest detection takes, of the objects of its class that are left, the one of the highest IoU,
    an ignored one only if no other is near enough; precision is read off at 101 recalls. pycocotools takes minutes for
    tiles of thousands of objects. Unlike it, an object is matched once for all sizes, and a detection that finds none
    counts for the size it has itself.
    """

    def __init__(self) -> None:
        self._matches: dict[float, list[list[_Matches]]] = {iou: [[] for _ in CLASSES] for iou in IOUS}

    def update(self, found: Detections, truth: ObjectLabels) -> None:
        """Take up one tile."""
        boxes, scores, labels = found.boxes_xyxy.float(), found.scores.float(), found.labels
        objects = torch.from_numpy(truth.boxes_xyxy).float()
        for index in range(len(CLASSES)):
            chosen = (labels == index).nonzero()[:, 0]
            chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
            places = np.nonzero(truth.labels == index)[0]
            near = overlap(boxes[chosen], objects[places], truth.ignored[places])
            for least, by_class in self._matches.items():
                by_class[index].append(
                    _Matches(
                        scores[chosen].numpy(),
                        _size(boxes[chosen]),
                        greedy(near, truth.ignored[places], least),
                        _size(objects[places]),
                        truth.ignored[places],
                    )
                )

    def to_dict(self) -> dict[str, Any]:
        """All scores as plain values; those of a size are means over the classes that have objects of it."""
        threshold = self._best_threshold()
        ranges = list(itertools.pairwise(SIZE_BOUNDS))
        return {
            "ap50": self._mean_ap(IOUS[0]),
            "ap25": self._mean_ap(IOUS[1]),
            "ap50_by_class": {name: self._ap(IOUS[0], index) for index, name in enumerate(CLASSES)},
            "threshold": threshold,
            "by_size": {
                str(iou): [
                    {
                        "low": low,
                        "high": high,
                        "num": self._num(iou, low, high),
                        "ap": self._mean_ap(iou, low, high),
                        "recall": self._recall(iou, threshold, low, high),
                    }
                    for low, high in [*ranges, *_WIDE]
                ]
                for iou in IOUS
            },
        }

    def _mean_ap(self, iou: float, low: float = 0, high: float = np.inf) -> float:
        values = [self._ap(iou, index, low, high) for index in range(len(CLASSES))]
        known = [value for value in values if not np.isnan(value)]
        return float(np.mean(known)) if known else float("nan")

    def _ap(self, iou: float, index: int, low: float = 0, high: float = np.inf) -> float:
        scores, right, num = self._outcomes(iou, index, low, high)
        return average_precision(scores, right, num)

    def _outcomes(
        self, iou: float, index: int, low: float, high: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], int]:
        """Scores of the detections that count, whether they are right, and how many objects there are."""
        scores, right, num = [], [], 0
        for each in self._matches[iou][index]:
            counted = ~each.ignored & (each.object_sizes >= low) & (each.object_sizes < high)
            hit = each.matched >= 0
            is_right = np.zeros(len(hit), bool)
            is_right[hit] = counted[each.matched[hit]]
            is_wrong = ~hit & (each.sizes >= low) & (each.sizes < high)
            scores.append(each.scores[is_right | is_wrong])
            right.append(is_right[is_right | is_wrong])
            num += int(counted.sum())
        return np.concatenate(scores), np.concatenate(right), num

    def _best_threshold(self) -> float:
        """The score at which F1 of all classes together is highest, at the first IoU."""
        parts = [self._outcomes(IOUS[0], index, 0, np.inf) for index in range(len(CLASSES))]
        scores, right = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        if not len(scores):
            return 1.0
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum(right[order])
        f1 = 2 * hits / (np.arange(1, len(hits) + 1) + sum(part[2] for part in parts))
        return float(scores[order][f1.argmax()])

    def _num(self, iou: float, low: float, high: float) -> int:
        return sum(self._outcomes(iou, index, low, high)[2] for index in range(len(CLASSES)))

    def _recall(self, iou: float, threshold: float, low: float, high: float) -> float:
        parts = [self._outcomes(iou, index, low, high) for index in range(len(CLASSES))]
        hits = sum(int((right & (scores >= threshold)).sum()) for scores, right, _ in parts)
        return hits / max(1, sum(num for _, _, num in parts))


def overlap(boxes: torch.Tensor, objects: torch.Tensor, ignored: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """IoU of detections and objects, [D, G]; of ignored objects, the share of the detection that lies in them."""
    low, high = torch.maximum(boxes[:, None, :2], objects[:, :2]), torch.minimum(boxes[:, None, 2:], objects[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]
    shares = torch.where(torch.from_numpy(ignored), shared / areas.clamp(min=1e-6), box_iou(boxes, objects))
    values: npt.NDArray[np.float32] = shares.numpy()
    return values


def greedy(overlaps: npt.NDArray[np.float32], ignored: npt.NDArray[np.bool_], least: float) -> npt.NDArray[np.int64]:
    """Index of the object that each detection takes, -1 for none, [D]; ignored objects may be taken again."""
    matched = np.full(len(overlaps), -1)
    if not overlaps.size:
        return matched
    near = np.where(overlaps >= least, overlaps, 0.0)
    free, hidden = near * ~ignored, near * ignored
    for index in range(len(overlaps)):
        best, covering = int(free[index].argmax()), int(hidden[index].argmax())
        if free[index, best] > 0:
            matched[index] = best
            free[:, best] = 0
        elif hidden[index, covering] > 0:
            matched[index] = covering
    return matched


def average_precision(scores: npt.NDArray[np.float32], right: npt.NDArray[np.bool_], num: int) -> float:
    """The mean of the highest precision at 101 recalls or more; NaN without objects."""
    if num == 0:
        return float("nan")
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / num, _RECALLS, side="left")
    return float(np.append(highest, 0.0)[places].mean())


def _size(boxes: torch.Tensor) -> npt.NDArray[np.float32]:
    size: npt.NDArray[np.float32] = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().numpy()
    return size
