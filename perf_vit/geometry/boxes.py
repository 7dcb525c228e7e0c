"""Upright and oriented boxes as arrays: areas, intersections, corners."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

__all__ = [
    "box_areas",
    "intersecting_pairs",
    "oriented_box_bounds",
    "oriented_box_corners",
    "paired_intersections",
    "paired_iou",
]

FloatArray = npt.NDArray[np.floating]


def box_areas(boxes_xyxy: FloatArray) -> FloatArray:
    """Areas of upright boxes.

    Args:
        boxes_xyxy: Left, top, right, bottom, [..., 4].

    Returns:
        Areas, [...]; 0 for boxes with negative width or height.
    """
    sides = np.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0)
    return np.asarray(sides[..., 0] * sides[..., 1])


def paired_intersections(boxes_xyxy: FloatArray, others_xyxy: FloatArray) -> FloatArray:
    """Compute the intersection areas of pairs of boxes.

    Args:
        boxes_xyxy: Left, top, right, bottom, [..., 4].
        others_xyxy: Left, top, right, bottom, [..., 4]; both broadcast, so [N, 1, 4] and [M, 4] give all pairs.
    """
    shared = np.concatenate(
        [np.maximum(boxes_xyxy[..., :2], others_xyxy[..., :2]), np.minimum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])],
        axis=-1,
    )
    return box_areas(shared)


def paired_iou(boxes_xyxy: FloatArray, others_xyxy: FloatArray) -> FloatArray:
    """Compute the intersection over union of pairs of boxes, 0 where both are empty.

    Args:
        boxes_xyxy: Left, top, right, bottom, [..., 4].
        others_xyxy: Left, top, right, bottom, [..., 4]; both broadcast.
    """
    shared = paired_intersections(boxes_xyxy, others_xyxy)
    union = box_areas(boxes_xyxy) + box_areas(others_xyxy) - shared
    return np.asarray(shared / np.where(union > 0, union, 1))


def intersecting_pairs(
    boxes_xyxy: npt.NDArray[Any], others_xyxy: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find all pairs of boxes from two sets that intersect or touch.

    Time and memory grow with the number of boxes and pairs, not with the product of the numbers of boxes.

    Args:
        boxes_xyxy: Left, top, right, bottom, [n, 4].
        others_xyxy: Left, top, right, bottom, [m, 4].

    Returns:
        Indices of the boxes and of the others, [p] each, in lexicographic order.
    """
    tree = shapely.STRtree(shapely.box(*np.asarray(others_xyxy, np.float64).T))
    first, second = tree.query(shapely.box(*np.asarray(boxes_xyxy, np.float64).T))
    order = np.lexsort((second, first))
    return first[order], second[order]


def oriented_box_bounds(oriented_boxes: FloatArray) -> FloatArray:
    """Compute the upright bounding boxes of oriented boxes.

    Args:
        oriented_boxes: Oriented boxes as in `oriented_box_corners`, [..., 5].

    Returns:
        Left, top, right, bottom, [..., 4].
    """
    corners = oriented_box_corners(oriented_boxes)
    return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1)


def oriented_box_corners(oriented_boxes: FloatArray) -> FloatArray:
    """Compute the corners of oriented boxes.

    Args:
        oriented_boxes: Centre x, centre y, width, height, angle in radians, [..., 5]. The width lies along the angle,
            which is measured from the x axis towards the y axis: clockwise on the screen, where y points down.

    Returns:
        x and y of the corners in cyclic order, [..., 4, 2].
    """
    center, (width, height, angle) = oriented_boxes[..., :2], np.moveaxis(oriented_boxes[..., 2:], -1, 0)
    along = np.stack([np.cos(angle), np.sin(angle)], -1) * (width / 2)[..., None]
    across = np.stack([-np.sin(angle), np.cos(angle)], -1) * (height / 2)[..., None]
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return np.stack([center + a * along + b * across for a, b in signs], axis=-2)
