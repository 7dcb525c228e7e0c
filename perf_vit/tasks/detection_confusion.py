"""Which classes a detector takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.tasks.meeting_objects import meeting_iou
from perf_vit.types import Detections, ObjectLabels

__all__ = ["DetectionConfusion"]


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
        found_index, objects, iou = meeting_iou(found, truth, self.kind)
        hits = iou >= self.iou_threshold
        found_index, objects, iou = found_index[hits], objects[hits], iou[hits]
        starts = np.searchsorted(found_index, np.arange(len(scores) + 1))
        free = ~truth.ignored
        for index in scores.argsort(descending=True, stable=True).tolist():
            if scores[index] < self.score_threshold:
                break
            own = slice(starts[index], starts[index + 1])
            met = objects[own]
            if free[met].any():
                owner = int(met[np.where(free[met], iou[own], -1).argmax()])
                free[owner] = False
                self.matrix[truth.labels[owner], classes[index]] += 1
            elif not truth.ignored[met].any():
                self.matrix[background, classes[index]] += 1
        np.add.at(self.matrix[:, background], truth.labels[free], 1)
