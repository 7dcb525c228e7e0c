"""Predicted objects of a scene, and operations on cropped masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
import torch

from perf_vit.geometry.boxes import intersecting_pairs, oriented_box_corners
from perf_vit.types import BoolArray, Detections, MaskCrops, ObjectLabels, Window

__all__ = [
    "ObjectKind",
    "Objects",
    "crop_to_window",
    "cropped_masks",
    "mask_intersections",
    "object_bounds",
    "object_polygons",
]

ObjectKind = Literal["boxes", "oriented_boxes", "polygons"]


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects of a scene, in descending order of score.

    Attributes:
        kind: Kind of `geometry`.
        geometry: Geometry in pixels of the scene: `boxes` [n, 4] left, top, right, bottom; `oriented_boxes` [n, 5]
            centre x, centre y, width, height, angle in radians; `polygons` [n] shapely polygons.
        scores: Confidence, [n] float32.
        labels: Class indices, [n] int32.
    """

    kind: ObjectKind
    geometry: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)

    def bounds(self) -> npt.NDArray[np.float64]:
        """Return the upright bounding boxes of the objects, [n, 4]."""
        return object_bounds(self.kind, self.geometry)

    def polygons(self) -> npt.NDArray[Any]:
        """Return the objects as shapely polygons, [n]."""
        return object_polygons(self.kind, self.geometry)


def object_bounds(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the upright bounding boxes of objects, [n, 4]."""
    if kind == "boxes":
        return geometry
    if kind == "oriented_boxes":
        corners = oriented_box_corners(geometry)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return np.asarray(shapely.bounds(geometry), np.float64).reshape(-1, 4)


def object_polygons(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return objects as shapely polygons, [n]."""
    if kind == "boxes":
        return np.asarray(shapely.box(*geometry.T), object)
    if kind == "oriented_boxes":
        return np.asarray(shapely.polygons(oriented_box_corners(geometry)), object)
    return geometry


IndexArray = npt.NDArray[np.int64]


def cropped_masks(objects: Detections | ObjectLabels) -> MaskCrops | None:
    """Return the masks of objects as crops, or None without masks."""
    if objects.mask_crops is not None or objects.masks is None:
        return objects.mask_crops
    return MaskCrops.from_masks(torch.as_tensor(objects.masks).cpu().numpy().astype(bool, copy=False))


def crop_to_window(masks: MaskCrops, index: int, window: Window) -> tuple[tuple[slice, slice], BoolArray] | None:
    """Crop a mask to a window.

    Returns:
        (rows, columns) in an array of the window's pixels, and the mask there; None if the mask's rectangle lies
        outside.
    """
    crop, (row, col) = masks.crops[index], masks.corners[index].tolist()
    rectangle = Window(row, col, *crop.shape)
    shared = rectangle.intersect(window)
    return None if shared is None else (shared.slices_in(window), crop[shared.slices_in(rectangle)])


def mask_intersections(masks: MaskCrops, others: MaskCrops) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Find all pairs of masks from two sets that intersect.

    Returns:
        Indices of the masks and of the others, in lexicographic order, and their shared pixels, [p] each.
    """
    first, second = intersecting_pairs(masks.rectangles(), others.rectangles())
    counts = np.array(
        [_shared(masks, i, others, j) for i, j in zip(first.tolist(), second.tolist(), strict=True)], np.int64
    )
    met = counts > 0
    return first[met], second[met], counts[met]


def _shared(masks: MaskCrops, index: int, others: MaskCrops, other: int) -> int:
    crop, (row, col) = masks.crops[index], masks.corners[index].tolist()
    found = crop_to_window(others, other, Window(row, col, *crop.shape))
    return 0 if found is None else int(np.count_nonzero(crop[found[0]] & found[1]))
