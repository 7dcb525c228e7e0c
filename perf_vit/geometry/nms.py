"""Greedy non-maximum suppression in memory linear in the number of objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.geometry.boxes import box_areas, paired_intersections
from perf_vit.geometry.objects import ObjectKind, object_bounds, object_polygons
from perf_vit.types import BoolArray

__all__ = ["Overlaps", "greedy_nms"]

IndexArray = npt.NDArray[np.int64]
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
