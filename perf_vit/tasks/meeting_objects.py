"""Pairs of found and labelled objects that meet, and their IoU: all other pairs have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.errors import InputError
from perf_vit.ops.boxes import meeting_pairs, oriented_box_bounds, paired_iou
from perf_vit.ops.mask_crops import cropped_masks, shared_pixels
from perf_vit.ops.oriented_boxes import oriented_iou
from perf_vit.types import Detections, MaskCrops, ObjectLabels

__all__ = ["compared_geometry", "meeting_iou"]

IndexArray = npt.NDArray[np.int64]

_BOXES = {"boxes": "boxes_xyxy", "oriented_boxes": "oriented_boxes"}


def compared_geometry(objects: Detections | ObjectLabels, kind: str) -> Any:
    """Boxes [n, 4] or oriented boxes [n, 5], float64, or masks, whichever a metric compares.

    Raises:
        InputError: the objects have another kind of geometry.
    """
    values: Any = cropped_masks(objects) if kind == "masks" else getattr(objects, _BOXES[kind])
    if values is None:
        raise InputError(f"expected {kind} to compare, got another kind of geometry; check the label format")
    if isinstance(values, MaskCrops):
        return values
    return torch.as_tensor(values).cpu().double().reshape(-1, 4 if kind == "boxes" else 5).numpy()


def meeting_iou(
    found: Detections, truth: ObjectLabels, kind: str
) -> tuple[IndexArray, IndexArray, npt.NDArray[np.float64]]:
    """Indices of pairs of a found and a labelled object, in the order of both, and their IoU, [p] each.

    Args:
        found: in an image.
        truth: of the same image.
        kind: of geometry: boxes, oriented_boxes or masks.

    Raises:
        InputError: another kind of geometry.
    """
    ours, theirs = (compared_geometry(objects, kind) for objects in (found, truth))
    if kind == "masks":
        first, second, shared = shared_pixels(ours, theirs)
        return first, second, shared / (ours.areas()[first] + theirs.areas()[second] - shared)
    if kind == "boxes":
        first, second = meeting_pairs(ours, theirs)
        return first, second, np.asarray(paired_iou(ours[first], theirs[second]), np.float64)
    first, second = meeting_pairs(oriented_box_bounds(ours), oriented_box_bounds(theirs))
    iou = oriented_iou(torch.from_numpy(ours[first]), torch.from_numpy(theirs[second]))
    return first, second, iou.numpy()
