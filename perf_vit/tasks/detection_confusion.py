"""Which classes a detector takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import box_iou

from perf_vit.errors import InputError
from perf_vit.ops.oriented_boxes import oriented_iou_matrix
from perf_vit.types import Detections, ObjectLabels

__all__ = ["DetectionConfusion"]

_GEOMETRY = {"boxes": "boxes_xyxy", "oriented_boxes": "oriented_boxes", "masks": "masks"}


class DetectionConfusion:
    """Counts of true and predicted classes of objects, with one more class for background.

    From the surest on, a detection belongs to the free object with which its IoU is largest, whatever its class, if
    that is at least the threshold. What belongs to none was background, and an object without detection is taken for
    it. What belongs to no counted object but to an ignored one counts nowhere.

    Args:
        num_classes: classes are 0 to num_classes - 1; background is num_classes.
        kind: of geometry that is compared.
        score_threshold: objects found with a lower score count nowhere.
        iou_threshold: least IoU of a detection and its object.

    Attributes:
        matrix: a row a true class and a column a predicted one, [num_classes + 1, num_classes + 1].
    """

    def __init__(
        self,
        num_classes: int,
        kind: Literal["boxes", "oriented_boxes", "masks"] = "boxes",
        *,
        score_threshold: float,
        iou_threshold: float = 0.5,
    ) -> None:
        self.kind = kind
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.matrix: npt.NDArray[np.int64] = np.zeros((num_classes + 1, num_classes + 1), np.int64)

    def update(self, detections: Sequence[Detections], labels: Sequence[ObjectLabels]) -> None:
        """Take up what was found in some images, and what is there.

        Raises:
            InputError: another kind of geometry.
        """
        for found, truth in zip(detections, labels, strict=True):
            self._update_image(found, truth)

    def _update_image(self, found: Detections, truth: ObjectLabels) -> None:
        background = len(self.matrix) - 1
        scores, classes = torch.as_tensor(found.scores).cpu(), torch.as_tensor(found.labels).cpu().tolist()
        iou = _iou(found, truth, self.kind)
        free = ~truth.ignored
        for index in scores.argsort(descending=True, stable=True).tolist():
            if scores[index] < self.score_threshold:
                break
            hits = iou[index] >= self.iou_threshold
            if (hits & free).any():
                owner = int(np.where(hits & free, iou[index], -1).argmax())
                free[owner] = False
                self.matrix[truth.labels[owner], classes[index]] += 1
            elif not (hits & truth.ignored).any():
                self.matrix[background, classes[index]] += 1
        np.add.at(self.matrix[:, background], truth.labels[free], 1)


def _iou(found: Detections, truth: ObjectLabels, kind: str) -> npt.NDArray[np.float64]:
    given = getattr(found, _GEOMETRY[kind]), getattr(truth, _GEOMETRY[kind])
    if given[0] is None or given[1] is None:
        raise InputError(f"expected {kind} to compare, got another kind of geometry; check the label format")
    ours, theirs = (torch.as_tensor(values).cpu() for values in given)
    if kind == "masks":
        return _mask_iou(ours, theirs).numpy()
    measure = box_iou if kind == "boxes" else oriented_iou_matrix
    sides = 4 if kind == "boxes" else 5
    return np.asarray(measure(ours.double().reshape(-1, sides), theirs.double().reshape(-1, sides)).numpy())


def _mask_iou(ours: Tensor, theirs: Tensor) -> Tensor:
    ours, theirs = (masks.flatten(1).double() for masks in (ours, theirs))
    shared = ours @ theirs.T
    return shared / (ours.sum(1)[:, None] + theirs.sum(1) - shared).clamp(min=1)
