"""Matching of predicted objects to ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from perf_vit.errors import InputError
from perf_vit.geometry.boxes import (
    box_areas,
    intersecting_pairs,
    oriented_box_bounds,
    paired_intersections,
    paired_iou,
)
from perf_vit.geometry.objects import cropped_masks, mask_intersections
from perf_vit.geometry.oriented_boxes import oriented_iou
from perf_vit.types import Detections, MaskCrops, ObjectLabels

__all__ = ["DetectionConfusion", "compared_geometry", "overlaps", "split_independent"]

IndexArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_BOXES = {"boxes": "boxes_xyxy", "oriented_boxes": "oriented_boxes"}


def compared_geometry(objects: Detections | ObjectLabels, kind: str) -> Any:
    """Return the geometry to compare: boxes [n, 4] or oriented boxes [n, 5] in float64, or mask crops.

    Raises:
        InputError: The objects have no geometry of this kind.
    """
    values: Any = cropped_masks(objects) if kind == "masks" else getattr(objects, _BOXES[kind])
    if values is None:
        raise InputError(f"expected {kind} to compare, got another kind of geometry; check the label format")
    if isinstance(values, MaskCrops):
        return values
    return torch.as_tensor(values).cpu().double().reshape(-1, 4 if kind == "boxes" else 5).numpy()


def overlaps(found: Detections, truth: ObjectLabels, kind: str) -> tuple[IndexArray, IndexArray, FloatArray]:
    """Compute the overlap of all pairs of detections and labelled objects that touch.

    Args:
        found: Detections of an image.
        truth: Labelled objects of the image.
        kind: Geometry to compare: boxes, oriented_boxes or masks.

    Returns:
        Indices of detections, indices of labelled objects (in this sort order) and their IoU, of ignored objects the
        share of the detection that lies on them, as COCO has it for crowds, [p] each.

    Raises:
        InputError: The objects have no geometry of this kind.
    """
    ours, theirs = (compared_geometry(objects, kind) for objects in (found, truth))
    shared: npt.NDArray[Any]
    if kind == "masks":
        first, second, shared = mask_intersections(ours, theirs)
        areas, other_areas = ours.areas()[first], theirs.areas()[second]
        iou = shared / (areas + other_areas - shared)
    elif kind == "boxes":
        first, second = intersecting_pairs(ours, theirs)
        shared, areas = paired_intersections(ours[first], theirs[second]), box_areas(ours)[first]
        iou = paired_iou(ours[first], theirs[second])
    else:
        first, second = intersecting_pairs(oriented_box_bounds(ours), oriented_box_bounds(theirs))
        iou = oriented_iou(torch.from_numpy(ours[first]), torch.from_numpy(theirs[second])).numpy()
        areas, other_areas = (boxes[:, 2:4].prod(axis=1) for boxes in (ours[first], theirs[second]))
        shared = iou * (areas + other_areas) / (1 + iou)
    share = shared / np.where(areas > 0, areas, 1)
    return first, second, np.where(truth.ignored[second], share, iou)


Shape = dict[str, Any]

# Images with at most this many pairs aren't split, which keeps the order of detections with equal scores.
_PAIRS = 1 << 16

# Target number of detections and labelled objects per part.
_OBJECTS = 32

# Slightly below the lowest IoU threshold, as the upper bounds of the IoU are rounded.
_LEAST_IOU = 0.499


def split_independent(truth: Sequence[Shape], found: Sequence[Shape]) -> list[tuple[list[Shape], list[Shape]]]:
    """Split the objects of an image into parts that can't match each other at IoUs of .5 and above.

    Args:
        truth: Labelled objects as dicts with "bbox" (left, top, width, height), "area", "category_id" and "iscrowd".
        found: Detections with the same keys.

    Returns:
        Labelled objects and detections of each part, in their original order.
    """
    if len(truth) * len(found) <= _PAIRS:
        return [(list(truth), list(found))]
    part = _part_numbers(*_possible_matches(truth, found), len(truth), len(found))
    split: list[tuple[list[Shape], list[Shape]]] = [([], []) for _ in range(int(part.max()) + 1)]
    for side, shapes, numbers in ((0, truth, part[: len(truth)]), (1, found, part[len(truth) :])):
        for shape, number in zip(shapes, numbers.tolist(), strict=True):
            split[number][side].append(shape)
    return split


def _possible_matches(
    truth: Sequence[Shape], found: Sequence[Shape]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return pairs of a labelled object and a detection of its class whose IoU may reach the threshold, [p] each.

    The intersection is bounded by that of the bounding boxes and by the smaller area.
    """
    bounds, found_bounds = _bounds(truth), _bounds(found)
    first, second = intersecting_pairs(bounds, found_bounds)
    same = _values(truth, "category_id")[first] == _values(found, "category_id")[second]
    first, second = first[same], second[same]
    area, found_area = _values(truth, "area")[first], _values(found, "area")[second]
    shared = np.minimum(paired_intersections(bounds[first], found_bounds[second]), np.minimum(area, found_area))
    union = np.where(_values(truth, "iscrowd")[first] > 0, found_area, area + found_area - shared)
    near = shared >= _LEAST_IOU * union
    return first[near], second[near]


def _part_numbers(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], num_truth: int, num_found: int
) -> npt.NDArray[np.int64]:
    """Return the part of each object, labelled ones first; connected components stay whole, small ones share a part."""
    number = num_truth + num_found
    graph = coo_array((np.ones(len(first), bool), (first, second + num_truth)), (number, number))
    num_groups, group = connected_components(graph, directed=False)
    ends = np.cumsum(np.bincount(group, minlength=num_groups))
    return np.asarray(np.unique((ends - 1) // _OBJECTS, return_inverse=True)[1][group], np.int64)


def _bounds(shapes: Sequence[Shape]) -> npt.NDArray[np.float64]:
    boxes = np.array([shape["bbox"] for shape in shapes], np.float64).reshape(-1, 4)
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def _values(shapes: Sequence[Shape], key: str) -> npt.NDArray[np.float64]:
    return np.array([shape[key] for shape in shapes], np.float64)


FALSE_ALARM = -1
"""In place of a labelled object: there is none under the detection."""

NOT_COUNTED = -2
"""In place of a labelled object: the detection has a low score, or lies on an ignored object."""


def match_objects(
    found: Detections,
    truth: ObjectLabels,
    kind: Literal["boxes", "oriented_boxes", "masks"],
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
) -> IndexArray:
    """Match detections, in descending score, each to the free labelled object with the largest IoU of any class.

    Detections without a match that lie on an ignored object, with a share of their area from `iou_threshold` on, aren't
    counted.

    Args:
        found: Detections of an image.
        truth: Labelled objects of the image.
        kind: Geometry to compare.
        score_threshold: Minimum score of a detection.
        iou_threshold: Minimum IoU of a match.

    Returns:
        Labelled object of each detection, `FALSE_ALARM` or `NOT_COUNTED`, [n].

    Raises:
        InputError: The objects have no geometry of this kind.
    """
    scores = torch.as_tensor(found.scores).cpu()
    found_index, objects, iou = overlaps(found, truth, kind)
    hits = iou >= iou_threshold
    found_index, objects, iou = found_index[hits], objects[hits], iou[hits]
    starts = np.searchsorted(found_index, np.arange(len(scores) + 1))
    free, owners = ~truth.ignored, np.full(len(scores), NOT_COUNTED)
    for index in scores.argsort(descending=True, stable=True).tolist():
        if scores[index] < score_threshold:
            break
        own = slice(starts[index], starts[index + 1])
        met = objects[own]
        if free[met].any():
            owners[index] = met[np.where(free[met], iou[own], -1).argmax()]
            free[owners[index]] = False
        elif not truth.ignored[met].any():
            owners[index] = FALSE_ALARM
    return owners


class DetectionConfusion:
    """Confusion matrix of object classes, with background as an additional class.

    Detections are matched in descending score to the unmatched object with the largest IoU, whatever its class, if that
    IoU reaches the threshold. Unmatched detections count as background in the truth, unmatched objects as background in
    the prediction. Unmatched detections that lie on an ignored object are not counted.

    Args:
        num_classes: Number of classes; labels are 0 to num_classes - 1, background is num_classes.
        kind: Geometry to compare.
        score_threshold: Minimum score of a detection.
        iou_threshold: Minimum IoU of a match.

    Attributes:
        matrix: Counts, rows true and columns predicted classes, [num_classes + 1, num_classes + 1].
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
        """Update with predictions and ground truth.

        Args:
            detections: Detections of each image.
            labels: Labelled objects of each image.

        Raises:
            InputError: The objects have no geometry of this kind.
        """
        for found, truth in zip(detections, labels, strict=True):
            self._update_image(found, truth)

    def _update_image(self, found: Detections, truth: ObjectLabels) -> None:
        background = len(self.matrix) - 1
        owners = match_objects(
            found, truth, self.kind, score_threshold=self.score_threshold, iou_threshold=self.iou_threshold
        )
        classes = torch.as_tensor(found.labels).cpu().numpy()
        hits, free = owners >= 0, ~truth.ignored
        free[owners[hits]] = False
        np.add.at(self.matrix, (truth.labels[owners[hits]], classes[hits]), 1)
        np.add.at(self.matrix[background], classes[owners == FALSE_ALARM], 1)
        np.add.at(self.matrix[:, background], truth.labels[free], 1)
