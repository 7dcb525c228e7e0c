"""Objects of a scene: outlines, cropped masks and greedy non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
import torch

from perf_vit.geometry.boxes import box_areas, intersecting_pairs, oriented_box_corners, paired_intersections
from perf_vit.types import BoolArray, Detections, MaskCrops, ObjectLabels, Window

__all__ = [
    "ObjectKind",
    "Objects",
    "Overlaps",
    "crop_to_window",
    "cropped_masks",
    "greedy_nms",
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


FloatArray = npt.NDArray[np.floating]


Rule = Callable[[FloatArray, IndexArray, IndexArray], BoolArray]
"""(intersection areas, first, second), [p] each -> whether first suppresses second; monotonic in the area."""


# Objects per block: pairs within a block are tested directly, pairs with later objects by the spatial index.
_BLOCK = 128


# Objects per query of the spatial index; in a dense crowd each may return every object of the scene.
_LOOKUP = 8


# Pairs of outlines intersected at once.
_PAIRS = 1 << 12


class Overlaps:
    """Exact intersection areas of objects of one kind: boxes, oriented boxes or polygons.

    Args:
        kind: Kind of geometry.
        geometry: Geometry as in `Objects`, [n, ...].
    """

    def __init__(self, kind: ObjectKind, geometry: npt.NDArray[Any]) -> None:
        self.bounds = object_bounds(kind, geometry)
        self._outlines = None if kind == "boxes" else object_polygons(kind, geometry)
        self.areas: FloatArray = (
            box_areas(self.bounds) if self._outlines is None else np.asarray(shapely.area(self._outlines))
        )
        self._tree = shapely.STRtree(shapely.box(*self.bounds.T) if self._outlines is None else self._outlines)

    def __len__(self) -> int:
        return len(self.areas)

    def hits(self, rule: Rule, first: IndexArray, second: IndexArray) -> BoolArray:
        """Evaluate the rule for pairs of objects, bool [p]."""
        parts = [
            self._hits(rule, first[start : start + _PAIRS], second[start : start + _PAIRS])
            for start in range(0, len(first), _PAIRS)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _hits(self, rule: Rule, first: IndexArray, second: IndexArray) -> BoolArray:
        shared = paired_intersections(self.bounds[first], self.bounds[second])
        if self._outlines is None:
            return rule(shared, first, second)
        # The intersection is at most that of the bounds and the smaller area: most pairs need no exact test.
        hits = rule(np.minimum(shared, np.minimum(self.areas[first], self.areas[second])), first, second)
        first, second = first[hits], second[hits]
        exact = shapely.area(shapely.intersection(self._outlines[first], self._outlines[second]))
        hits[hits] = rule(exact, first, second)
        return hits

    def neighbours(self, indices: IndexArray) -> Iterator[tuple[IndexArray, IndexArray]]:
        """Yield pairs (index, object whose bounds intersect its bounds), a few indices at a time."""
        for start in range(0, len(indices), _LOOKUP):
            asked = indices[start : start + _LOOKUP]
            boxes = shapely.box(*self.bounds[asked].T)
            first, second = self._tree.query(boxes)
            yield asked[first], second

    def pairs_among(self, indices: IndexArray) -> tuple[IndexArray, IndexArray]:
        """Return the pairs (earlier, later) of these objects whose bounds intersect."""
        bounds = self.bounds[indices]
        low, high = bounds[:, :2], bounds[:, 2:]
        meet = ((low[:, None] <= high[None]) & (low[None] <= high[:, None])).all(axis=-1)
        first, second = np.nonzero(np.triu(meet, 1))
        return indices[first], indices[second]


def greedy_nms(overlaps: Overlaps, rule: Rule) -> IndexArray:
    """Suppress objects greedily: each object that isn't suppressed suppresses later ones by the rule.

    Only objects that aren't suppressed are compared with their neighbours, so the cost of duplicates is linear.

    Args:
        overlaps: Objects, best first.
        rule: Condition under which one object suppresses another.

    Returns:
        Index of the object that suppressed each object, -1 for those that remain, [n].
    """
    by = np.full(len(overlaps), -1, np.int64)
    for start in range(0, len(overlaps), _BLOCK):
        stop = min(start + _BLOCK, len(overlaps))
        block = start + np.flatnonzero(by[start:stop] < 0)
        _suppress_within_block(overlaps, rule, block, by)
        for first, second in overlaps.neighbours(block[by[block] < 0]):
            open_pairs = (second >= stop) & (by[second] < 0)
            first, second = first[open_pairs], second[open_pairs]
            hits = overlaps.hits(rule, first, second)
            # Written in reverse, so that the best of several suppressors is kept.
            by[second[hits][::-1]] = first[hits][::-1]
    return by


def _suppress_within_block(overlaps: Overlaps, rule: Rule, block: IndexArray, by: IndexArray) -> None:
    first, second = overlaps.pairs_among(block)
    hits = overlaps.hits(rule, first, second)
    for better, worse in zip(first[hits].tolist(), second[hits].tolist(), strict=True):
        if by[better] < 0 and by[worse] < 0:
            by[worse] = better
