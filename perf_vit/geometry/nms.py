"""Greedy non-maximum suppression in memory linear in the number of objects."""

from __future__ import annotations

from collections.abc import Callable
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

# Pairs of one query of the spatial index: at most this many or four times the number of objects, whichever is more.
_QUERY_PAIRS = 1 << 18
# Pairs of outlines intersected at once.
_PAIRS = 1 << 14
# Bins of an axis in which neighbours are counted.
_BINS = 1 << 12


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
        self._most_neighbours = np.minimum(*(_most_meetings(self.bounds[:, axis::2]) for axis in (0, 1)))

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

    def neighbours(self, indices: IndexArray) -> tuple[IndexArray, IndexArray]:
        """Return pairs (index, later object whose bounds intersect its bounds), in the order of the indices."""
        asked, found = self._tree.query(self._tree.geometries[indices])
        first = indices[asked]
        later = found > first
        return first[later], found[later]

    def num_askable(self, indices: IndexArray) -> int:
        """Return how many of these objects, from the first, `neighbours` can take in memory linear in all objects."""
        num_pairs = np.cumsum(self._most_neighbours[indices])
        return max(1, int(np.searchsorted(num_pairs, max(_QUERY_PAIRS, 4 * len(self)), side="right")))


def _most_meetings(spans: FloatArray) -> IndexArray:
    """Return an upper bound of the number of spans that each span [n, 2] meets, [n].

    Spans of NaN, as of empty polygons, meet none; they are counted at 0.
    """
    if not len(spans):
        return np.zeros(0, np.int64)
    spans = np.nan_to_num(spans)
    origin, extent = spans.min(), np.ptp(spans) or 1.0
    low, high = ((spans - origin) / extent * (_BINS - 1)).astype(np.int64).T
    begun = np.cumsum(np.bincount(low, minlength=_BINS))
    ended = np.cumsum(np.bincount(high + 1, minlength=_BINS + 1))
    return np.asarray(begun[high] - ended[low])


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
    start, num = 0, 1
    while start < len(overlaps):
        block = start + np.flatnonzero(by[start : start + num] < 0)
        asked = block[: overlaps.num_askable(block)]
        stop = start + num if len(asked) == len(block) else int(block[len(asked)])
        _suppress_by_block(overlaps, rule, asked, stop, by)
        # Blocks grow from a single object: in a crowd, the first few suppress most others, which aren't asked then.
        start, num = stop, 2 * (stop - start)
    return by


def _suppress_by_block(overlaps: Overlaps, rule: Rule, block: IndexArray, stop: int, by: IndexArray) -> None:
    """Suppress the objects of a block, which ends before `stop`, by one another, then all later ones."""
    first, second = overlaps.neighbours(block)
    open_pairs = by[second] < 0
    first, second = first[open_pairs], second[open_pairs]
    within = second < stop
    hits = overlaps.hits(rule, first[within], second[within])
    for better, worse in zip(first[within][hits].tolist(), second[within][hits].tolist(), strict=True):
        if by[better] < 0 and by[worse] < 0:
            by[worse] = better
    beyond = ~within & (by[first] < 0)
    first, second = first[beyond], second[beyond]
    hits = overlaps.hits(rule, first, second)
    # Written in reverse, so that the best of several suppressors is kept.
    by[second[hits][::-1]] = first[hits][::-1]
