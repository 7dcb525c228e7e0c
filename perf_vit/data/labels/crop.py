"""The objects of a window: what of each lies inside, in the window's pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.data.labels.records import ImageRecord
from perf_vit.ops.boxes import box_areas, oriented_box_corners
from perf_vit.types import BoolArray, MaskCrops, ObjectLabels, Window

__all__ = ["objects_in"]


def objects_in(
    record: ImageRecord,
    window: Window,
    *,
    min_visible: float,
    owned: Window | None = None,
    crop_masks: bool = False,
) -> ObjectLabels:
    """The objects that lie in a window, whole or in part.

    Boxes are clipped to the window; where there are masks, a box that was cut is drawn tight around what is left of
    its mask. Oriented boxes stay whole, since a part of one is no oriented box: their ends may lie outside.

    Args:
        record: an image and its objects.
        window: in the image's pixels.
        min_visible: of an object of which a smaller share lies inside, the label says `ignored`. The share is of the
            oriented box's area where there is one, and of the upright box's otherwise.
        owned: part of the image's pixels that decides instead of `min_visible`: objects whose centre lies elsewhere are
            ignored.
        crop_masks: give masks as `mask_crops`, for large windows.
    """
    corner = np.array([window.col, window.row] * 2, np.float64)
    limits = np.array([window.width, window.height] * 2, np.float64)
    inside = np.clip(record.boxes_xyxy - corner, 0, limits)
    shares = _visible_shares(record, inside, window)
    found = np.flatnonzero((shares > 0) & (box_areas(inside) > 0))
    counts = shares[found] >= min_visible if owned is None else _centered_in(record.boxes_xyxy[found], owned)
    objects = ObjectLabels(
        labels=record.labels[found],
        boxes_xyxy=inside[found].astype(np.float32),
        ignored=record.ignored[found] | ~counts,
        oriented_boxes=_moved(record, found, window),
    )
    return objects if record.masks is None else _with_masks(objects, record, found, window, crop_masks)


def _centered_in(boxes: npt.NDArray[np.float64], area: Window) -> BoolArray:
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T
    return np.asarray((x >= area.col) & (x < area.col_stop) & (y >= area.row) & (y < area.row_stop))


def _visible_shares(record: ImageRecord, inside: npt.NDArray[np.float64], window: Window) -> npt.NDArray[np.float64]:
    shares = np.asarray(box_areas(inside) / box_areas(record.boxes_xyxy), np.float64)
    if record.oriented_boxes is None:
        return shares
    # Only boxes that the window cuts need the slow way.
    cut = np.flatnonzero((shares > 0) & (shares < 1))
    polygons = shapely.polygons(oriented_box_corners(record.oriented_boxes[cut]))
    area = shapely.box(window.col, window.row, window.col_stop, window.row_stop)
    shares[cut] = shapely.area(shapely.intersection(polygons, area)) / shapely.area(polygons)
    return shares


def _moved(record: ImageRecord, found: npt.NDArray[np.int64], window: Window) -> npt.NDArray[np.float32] | None:
    if record.oriented_boxes is None:
        return None
    return (record.oriented_boxes[found] - [window.col, window.row, 0, 0, 0]).astype(np.float32)


def _with_masks(
    objects: ObjectLabels, record: ImageRecord, found: npt.NDArray[np.int64], window: Window, crop_masks: bool
) -> ObjectLabels:
    """Add masks; an object without a pixel in the window is not in it."""
    assert record.masks is not None
    if crop_masks:
        return _with_crops(objects, record.masks.read_crops(found, window), record.boxes_xyxy[found], window)
    masks = record.masks.read(found, window)
    boxes = objects.boxes_xyxy.copy()
    cut = _cut(record.boxes_xyxy[found], window)
    kept = np.asarray(masks.any(axis=(1, 2)))
    for index in np.flatnonzero(cut & kept):
        boxes[index] = _bounds(masks[index])
    objects = dataclasses.replace(objects, boxes_xyxy=boxes, masks=masks)
    return objects if kept.all() else _chosen(objects, kept)


def _with_crops(
    objects: ObjectLabels, masks: MaskCrops, whole_xyxy: npt.NDArray[np.float64], window: Window
) -> ObjectLabels:
    kept = masks.areas() > 0
    boxes = objects.boxes_xyxy.copy()
    for index in np.flatnonzero(_cut(whole_xyxy, window) & kept):
        boxes[index] = np.add(_bounds(masks.crops[index]), np.tile(masks.corners[index, ::-1], 2))
    objects = dataclasses.replace(objects, boxes_xyxy=boxes, mask_crops=masks)
    return objects if kept.all() else _chosen(objects, kept)


def _cut(boxes_xyxy: npt.NDArray[np.float64], window: Window) -> BoolArray:
    """Which boxes reach past the window, [n]."""
    low, high = [window.col, window.row], [window.col_stop, window.row_stop]
    return np.asarray((boxes_xyxy[:, :2] < low).any(1) | (boxes_xyxy[:, 2:] > high).any(1))


def _bounds(mask: BoolArray) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def _chosen(objects: ObjectLabels, kept: BoolArray) -> ObjectLabels:
    return ObjectLabels(
        labels=objects.labels[kept],
        boxes_xyxy=objects.boxes_xyxy[kept],
        ignored=objects.ignored[kept],
        oriented_boxes=None if objects.oriented_boxes is None else objects.oriented_boxes[kept],
        masks=None if objects.masks is None else objects.masks[kept],
        mask_crops=None if objects.mask_crops is None else objects.mask_crops.take(kept),
    )
