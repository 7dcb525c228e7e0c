"""Objects of a scene, and masks cropped to their rectangles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
import torch

from perf_vit.geometry.boxes import meeting_pairs, oriented_box_corners
from perf_vit.types import BoolArray, Detections, MaskCrops, ObjectLabels, Window

__all__ = ["ObjectKind", "Objects", "cropped_masks", "object_bounds", "object_polygons", "part_in", "shared_pixels"]

ObjectKind = Literal["boxes", "oriented_boxes", "polygons"]


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of a scene, by falling score.

    Attributes:
        kind: what `geometry` holds.
        geometry: in the scene's pixels: `boxes` [n, 4] left, top, right, bottom; `oriented_boxes` [n, 5] centre x,
            centre y, width, height, angle in radians; `polygons` [n] shapely polygons.
        scores: [n] float32.
        labels: [n] int32, class indices.
    """

    kind: ObjectKind
    geometry: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scores)

    def bounds(self) -> npt.NDArray[np.float64]:
        """Upright boxes around the objects, [n, 4]."""
        return object_bounds(self.kind, self.geometry)

    def polygons(self) -> npt.NDArray[Any]:
        """The objects as shapely polygons, [n]."""
        return object_polygons(self.kind, self.geometry)


def object_bounds(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Upright boxes around objects, [n, 4]."""
    if kind == "boxes":
        return geometry
    if kind == "oriented_boxes":
        corners = oriented_box_corners(geometry)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return np.asarray(shapely.bounds(geometry), np.float64).reshape(-1, 4)


def object_polygons(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Objects as shapely polygons, [n]."""
    if kind == "boxes":
        return np.asarray(shapely.box(*geometry.T), object)
    if kind == "oriented_boxes":
        return np.asarray(shapely.polygons(oriented_box_corners(geometry)), object)
    return geometry


IndexArray = npt.NDArray[np.int64]


def cropped_masks(objects: Detections | ObjectLabels) -> MaskCrops | None:
    """The objects' masks, whichever way they are held; None without masks."""
    if objects.mask_crops is not None or objects.masks is None:
        return objects.mask_crops
    return MaskCrops.of(torch.as_tensor(objects.masks).cpu().numpy().astype(bool, copy=False))


def part_in(masks: MaskCrops, index: int, window: Window) -> tuple[tuple[slice, slice], BoolArray] | None:
    """Where in an array of a window's pixels a mask's rectangle lies, and the mask there; None where it doesn't."""
    crop, (row, col) = masks.crops[index], masks.corners[index].tolist()
    rectangle = Window(row, col, *crop.shape)
    shared = rectangle.intersect(window)
    return None if shared is None else (shared.slices_in(window), crop[shared.slices_in(rectangle)])


def shared_pixels(masks: MaskCrops, others: MaskCrops) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Pairs of a mask and another that share pixels, in the order of both, and how many, [p] each."""
    first, second = meeting_pairs(masks.rectangles(), others.rectangles())
    counts = np.array(
        [_shared(masks, i, others, j) for i, j in zip(first.tolist(), second.tolist(), strict=True)], np.int64
    )
    met = counts > 0
    return first[met], second[met], counts[met]


def _shared(masks: MaskCrops, index: int, others: MaskCrops, other: int) -> int:
    crop, (row, col) = masks.crops[index], masks.corners[index].tolist()
    found = part_in(others, other, Window(row, col, *crop.shape))
    return 0 if found is None else int(np.count_nonzero(crop[found[0]] & found[1]))
