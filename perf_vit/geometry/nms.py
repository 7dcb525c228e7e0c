"""Greedy suppression of objects that stand for the same thing, in memory linear in objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.geometry.boxes import box_areas, paired_intersections
from perf_vit.geometry.objects import ObjectKind, object_bounds, object_polygons
from perf_vit.types import BoolArray

__all__ = ["Overlaps", "suppress"]

IndexArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating]

Rule = Callable[[FloatArray, IndexArray, IndexArray], BoolArray]
"""(shared area, first, second), each [p], to whether the first suppresses the second; more area, more suppression."""

# Objects taken at a time: all pairs among them are looked at before their neighbours are looked up.
_BLOCK = 128
# In the densest crowd a look-up gives every object of the scene for each that is asked for.
_LOOKUP = 8
# Pairs whose shared outlines are held at a time.
_PAIRS = 1 << 12


class Overlaps:
    """Areas that objects of one kind share, exact for boxes, oriented boxes and polygons.

    Args:
        kind: what `geometry` holds.
        geometry: [n, ...], as in `Objects`.
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
        """Where the rule holds for pairs of objects, [p]."""
        parts = [
            self._hits(rule, first[start : start + _PAIRS], second[start : start + _PAIRS])
            for start in range(0, len(first), _PAIRS)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _hits(self, rule: Rule, first: IndexArray, second: IndexArray) -> BoolArray:
        shared = paired_intersections(self.bounds[first], self.bounds[second])
        if self._outlines is None:
            return rule(shared, first, second)
        # Outlines share no more than their bounds or the smaller of them: most pairs need no exact answer.
        hits = rule(np.minimum(shared, np.minimum(self.areas[first], self.areas[second])), first, second)
        first, second = first[hits], second[hits]
        exact = shapely.area(shapely.intersection(self._outlines[first], self._outlines[second]))
        hits[hits] = rule(exact, first, second)
        return hits

    def neighbours(self, indices: IndexArray) -> Iterator[tuple[IndexArray, IndexArray]]:
        """Pairs (index, object whose bounds meet its bounds), some indices at a time."""
        for start in range(0, len(indices), _LOOKUP):
            asked = indices[start : start + _LOOKUP]
            boxes = shapely.box(*self.bounds[asked].T)
            first, second = self._tree.query(boxes)
            yield asked[first], second

    def pairs_among(self, indices: IndexArray) -> tuple[IndexArray, IndexArray]:
        """Pairs (earlier, later) of these objects whose bounds meet."""
        bounds = self.bounds[indices]
        low, high = bounds[:, :2], bounds[:, 2:]
        meet = ((low[:, None] <= high[None]) & (low[None] <= high[:, None])).all(axis=-1)
        first, second = np.nonzero(np.triu(meet, 1))
        return indices[first], indices[second]


def suppress(overlaps: Overlaps, rule: Rule) -> IndexArray:
    """Go through objects by rank and let each that still stands suppress later ones.

    Only objects that stand are compared with their neighbours, so a crowd of duplicates costs no more than its size.

    Args:
        overlaps: of objects in the order of their rank, best first.
        rule: when one suppresses another.

    Returns:
        [n], the object that suppressed each, -1 for those that stand.
    """
    by = np.full(len(overlaps), -1, np.int64)
    for start in range(0, len(overlaps), _BLOCK):
        stop = min(start + _BLOCK, len(overlaps))
        block = start + np.flatnonzero(by[start:stop] < 0)
        _suppress_within(overlaps, rule, block, by)
        for first, second in overlaps.neighbours(block[by[block] < 0]):
            open_pairs = (second >= stop) & (by[second] < 0)
            first, second = first[open_pairs], second[open_pairs]
            hits = overlaps.hits(rule, first, second)
            # Backwards, so that of several the best is written last.
            by[second[hits][::-1]] = first[hits][::-1]
    return by


def _suppress_within(overlaps: Overlaps, rule: Rule, block: IndexArray, by: IndexArray) -> None:
    first, second = overlaps.pairs_among(block)
    hits = overlaps.hits(rule, first, second)
    for better, worse in zip(first[hits].tolist(), second[hits].tolist(), strict=True):
        if by[better] < 0 and by[worse] < 0:
            by[worse] = better
