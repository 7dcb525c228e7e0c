"""Parts of an image that are evaluated by themselves, so that time and memory don't grow with its size squared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from perf_vit.ops.boxes import meeting_pairs, paired_intersections

__all__ = ["independent_parts"]

Shape = dict[str, Any]

# Images with fewer pairs of objects stay whole, so that detections of equal scores stay in their order, too.
_PAIRS = 1 << 16
# Objects of a part, found and labelled.
_OBJECTS = 32
# Just below the lowest threshold: bounds of overlaps are rounded.
_LEAST_IOU = 0.499


def independent_parts(truth: Sequence[Shape], found: Sequence[Shape]) -> list[tuple[list[Shape], list[Shape]]]:
    """Split an image so that no detection can belong to an object of another part, at IoUs from .5 up.

    Args:
        truth: labelled objects, each with its "bbox" (left, top, width, height), "area", "category_id" and "iscrowd".
        found: detections, likewise.

    Returns:
        Labelled objects and detections of each part, in their order.
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
    """Pairs of a labelled object and a detection of its class that may overlap enough, [p] each.

    Two objects share at most what their bounds share, and no more than the smaller of them.
    """
    bounds, found_bounds = _bounds(truth), _bounds(found)
    first, second = meeting_pairs(bounds, found_bounds)
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
    """The part of each object, labelled ones first; groups that may match share a part, small ones several."""
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
