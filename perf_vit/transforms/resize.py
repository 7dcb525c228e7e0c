"""Resizing, flips and quarter turns of pixels together with masks, labels and objects."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from perf_vit.types import BoolArray, LabelArray, ObjectLabels

__all__ = [
    "divide_by_weight",
    "resize_masked",
    "resize_with_labels",
    "resize_with_objects",
    "turn",
    "turn_with_objects",
]

FloatArray = npt.NDArray[np.float32]

# Slightly below one half, for rounding of sums of weights in float32.
_LEAST_WEIGHT = 0.4999


def resize_masked(pixels: FloatArray, mask: BoolArray, height: int, width: int) -> tuple[FloatArray, BoolArray]:
    """Resize standardised pixels bilinearly with antialiasing.

    Args:
        pixels: Pixels, [C, H, W].
        mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands.
        height: Number of rows of the result.
        width: Number of columns of the result.

    Returns:
        Pixels and mask of the new size; invalid values are 0, the mean, and don't affect their neighbours.
    """
    if pixels.shape[1:] == (height, width):
        return pixels, mask
    if mask.all():
        return _resized(pixels, height, width), np.ones((1, height, width), bool)
    weight = _resized(mask.astype(np.float32), height, width)
    return divide_by_weight(_resized(np.where(mask, pixels, np.float32(0)), height, width), weight)


def divide_by_weight(sums: FloatArray, weight: FloatArray) -> tuple[FloatArray, BoolArray]:
    """Divide interpolated values by their weight; return 0 and False where less than half of the weight is valid.

    Args:
        sums: Interpolated values, with 0 for invalid ones, [C, H, W].
        weight: Interpolated mask, [C or 1, H, W].
    """
    held = weight >= _LEAST_WEIGHT
    return np.where(held, sums / np.maximum(weight, _LEAST_WEIGHT), np.float32(0)), held


def _resized(image: FloatArray, height: int, width: int) -> FloatArray:
    batch = torch.from_numpy(np.ascontiguousarray(image))[None]
    resized = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
    return np.asarray(resized.numpy(), np.float32)


_Layer = TypeVar("_Layer", np.bool_, np.uint8)

_Plane = TypeVar("_Plane", np.bool_, np.float32)


def turn(planes: npt.NDArray[_Plane], symmetry: int) -> npt.NDArray[_Plane]:
    """Apply one of the eight symmetries of the square to [..., H, W], as `turn_with_objects`."""
    mirrored = planes[..., ::-1] if symmetry >= 4 else planes
    return np.ascontiguousarray(np.rot90(mirrored, symmetry % 4, axes=(-2, -1)))


def turn_with_objects(image: FloatArray, objects: ObjectLabels, symmetry: int) -> tuple[FloatArray, ObjectLabels]:
    """Apply one of the eight symmetries of the square: from 4 on a horizontal flip, then quarter turns.

    Args:
        image: Image, [C, H, W].
        objects: Objects in its pixels.
        symmetry: Index of the symmetry, 0 (identity) to 7; quarter turns have the direction of `numpy.rot90`.

    Returns:
        Image, [C, H, W] or after an odd number of quarter turns [C, W, H], and its objects.
    """
    height, width = image.shape[1:]
    if symmetry >= 4:
        objects = _mirrored(objects, width)
    for _ in range(symmetry % 4):
        objects = _quarter_turned(objects, width)
        height, width = width, height
    return turn(image, symmetry), objects


def resize_with_objects(
    image: FloatArray, mask: BoolArray, objects: ObjectLabels, height: int, width: int
) -> tuple[FloatArray, BoolArray, ObjectLabels]:
    """Resize an image bilinearly with antialiasing from valid values only; masks of objects use the nearest pixel.

    Args:
        image: Standardised image, [C, H, W].
        mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands.
        objects: Objects in its pixels. Sides of oriented boxes are scaled by the geometric mean of both factors, which
            is exact if they are equal.
        height: Number of rows of the result.
        width: Number of columns of the result.
    """
    _, rows, cols = image.shape
    if (rows, cols) == (height, width):
        return image, mask, objects
    y, x = height / rows, width / cols
    oriented = objects.oriented_boxes
    if oriented is not None:
        both = math.sqrt(x * y)
        oriented = oriented * np.array([x, y, both, both, 1], np.float32)
    masks = None if objects.masks is None else _resized_layers(objects.masks, height, width)
    boxes = objects.boxes_xyxy * np.array([x, y, x, y], np.float32)
    return *resize_masked(image, mask, height, width), _replace_geometry(objects, boxes, oriented, masks)


def resize_with_labels(
    image: FloatArray, mask: BoolArray, labels: LabelArray, height: int, width: int
) -> tuple[FloatArray, BoolArray, LabelArray]:
    """Resize an image bilinearly with antialiasing from valid values only; labels use the nearest pixel.

    Args:
        image: Standardised image, [C, H, W].
        mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands.
        labels: Class indices, [H, W], or layers, [K, H, W].
        height: Number of rows of the result.
        width: Number of columns of the result.
    """
    if image.shape[1:] == (height, width):
        return image, mask, labels
    return *resize_masked(image, mask, height, width), _resized_layers(labels, height, width)


def _resized_layers(layers: npt.NDArray[_Layer], height: int, width: int) -> npt.NDArray[_Layer]:
    """Resize [..., H, W] by nearest neighbour."""
    rows, cols = layers.shape[-2:]
    return layers[..., _nearest(rows, height)[:, None], _nearest(cols, width)]


def _nearest(size: int, new_size: int) -> npt.NDArray[np.int64]:
    return ((np.arange(new_size) + 0.5) * size / new_size).astype(np.int64)


def _mirrored(objects: ObjectLabels, width: int) -> ObjectLabels:
    left, top, right, bottom = objects.boxes_xyxy.T
    oriented = objects.oriented_boxes
    if oriented is not None:
        x, y, w, h, angle = oriented.T
        oriented = np.stack([width - x, y, w, h, _le90(-angle)], axis=1)
    masks = None if objects.masks is None else objects.masks[:, :, ::-1]
    return _replace_geometry(objects, np.stack([width - right, top, width - left, bottom], axis=1), oriented, masks)


def _quarter_turned(objects: ObjectLabels, width: int) -> ObjectLabels:
    """Map (x, y) to (y, width - x)."""
    left, top, right, bottom = objects.boxes_xyxy.T
    oriented = objects.oriented_boxes
    if oriented is not None:
        x, y, w, h, angle = oriented.T
        oriented = np.stack([y, width - x, w, h, _le90(angle - np.float32(math.pi / 2))], axis=1)
    masks = None if objects.masks is None else np.rot90(objects.masks, axes=(1, 2))
    return _replace_geometry(objects, np.stack([top, width - right, bottom, width - left], axis=1), oriented, masks)


def _le90(angle: FloatArray) -> FloatArray:
    """Wrap angles of lines to [-pi/2, pi/2)."""
    half = np.float32(math.pi / 2)
    turned = np.where(angle >= half, angle - 2 * half, angle)
    return np.where(turned < -half, turned + 2 * half, turned).astype(np.float32)


def _replace_geometry(
    objects: ObjectLabels, boxes_xyxy: FloatArray, oriented_boxes: FloatArray | None, masks: BoolArray | None
) -> ObjectLabels:
    return ObjectLabels(
        labels=objects.labels,
        boxes_xyxy=np.ascontiguousarray(boxes_xyxy, dtype=np.float32),
        ignored=objects.ignored,
        oriented_boxes=None if oriented_boxes is None else np.ascontiguousarray(oriented_boxes, dtype=np.float32),
        masks=None if masks is None else np.ascontiguousarray(masks),
    )
