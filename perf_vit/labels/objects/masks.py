"""Masks of objects from outlines, run lengths or instance rasters, read by window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import rasterize, shapes
from scipy import ndimage

from perf_vit.errors import InputError
from perf_vit.geometry.boxes import box_areas, oriented_box_corners
from perf_vit.labels.objects.records import ImageRecord
from perf_vit.sources import open_raster
from perf_vit.types import BoolArray, MaskCrops, ObjectLabels, Window

__all__ = ["InstanceMasks", "OutlineMasks", "Rle", "objects_in", "outlines_of"]

# Masks are unpacked to one byte per pixel, and a short RLE can declare any size.
_LARGEST_MASK = 2**30


@dataclass(frozen=True, slots=True)
class Rle:
    """Run-length encoded mask of a whole image in COCO's column order; the first run is outside of the object.

    Attributes:
        counts: Run lengths, which sum to height * width.
        height: Number of rows.
        width: Number of columns.
    """

    counts: npt.NDArray[np.int64]
    height: int
    width: int

    @classmethod
    def make(cls, value: dict[str, Any], path: str) -> Rle:
        """Parse an annotation's `segmentation`, with counts as numbers or as COCO's compressed string.

        Raises:
            InputError: The runs don't cover the mask exactly, or it has more than 2^30 pixels.
        """
        height, width = (int(side) for side in value["size"])
        if height * width > _LARGEST_MASK:
            raise InputError(
                f"{path} holds a mask of {height} x {width} pixels; expected at most {_LARGEST_MASK}; cut the image"
            )
        counts = value["counts"]
        runs = np.asarray(_unpacked(counts) if isinstance(counts, str) else counts, np.int64)
        if (runs < 0).any() or runs.sum() != height * width:
            raise InputError(
                f"{path} holds a mask of {height} x {width} pixels whose runs sum to {runs.sum()}; it is damaged"
            )
        return cls(runs, height, width)

    def crop(self) -> tuple[BoolArray, int, int]:
        """Return the mask within the bounding rectangle of the object, and its first row and column.

        An empty mask has the size [0, 0].
        """
        edges = np.concatenate([[0], np.cumsum(self.counts)])
        runs = np.flatnonzero(self.counts[1::2]) * 2 + 1
        if not len(runs):
            return np.zeros((0, 0), bool), 0, 0
        first, last = int(edges[runs[0]] // self.height), int((edges[runs[-1] + 1] - 1) // self.height)
        counts = np.diff(np.clip(edges, first * self.height, (last + 1) * self.height))
        inside = np.arange(len(counts)) % 2 == 1
        columns = np.repeat(inside, counts).reshape(-1, self.height).T
        rows = np.flatnonzero(columns.any(axis=1))
        return columns[rows[0] : rows[-1] + 1], int(rows[0]), first

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom; all 0 if the mask is empty."""
        mask, row, col = self.crop()
        height, width = mask.shape
        return float(col), float(row), float(col + width), float(row + height)


def _unpacked(text: str) -> list[int]:
    """Decode run lengths from COCO's compressed string.

    Each number is written in groups of five bits, lowest first, as characters from "0"; bit 5 marks that more groups
    follow, and bit 4 of the last group is the sign. From the fourth number on, they are differences to the number two
    before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


class OutlineMasks:
    """Masks from polygons and run lengths; a pixel belongs to a polygon that contains its centre.

    A polygon too small or thin to contain any centre covers the pixels that it touches, so that each object has a mask.

    Args:
        outlines: Shapely geometries in pixels of the image, or `Rle`.
    """

    def __init__(self, outlines: Sequence[Any]) -> None:
        self.outlines = list(outlines)

    def read(self, indices: npt.NDArray[np.int64], window: Window) -> BoolArray:
        """Read masks of objects within a window of the image, [len(indices), height, width]."""
        masks = np.zeros((len(indices), *window.shape), bool)
        for mask, index in zip(masks, indices.tolist(), strict=True):
            found = _burnt(self.outlines[index], window)
            if found is not None:
                mask[found[0].slices_in(window)] = found[1]
        return masks

    def read_crops(self, indices: npt.NDArray[np.int64], window: Window) -> MaskCrops:
        """Read masks of objects within a window of the image, each cropped to its rectangle."""
        corners, crops = np.zeros((len(indices), 2), np.int64), []
        for corner, index in zip(corners, indices.tolist(), strict=True):
            found = _burnt(self.outlines[index], window)
            if found is not None:
                corner[:] = found[0].row - window.row, found[0].col - window.col
            crops.append(np.zeros((1, 1), bool) if found is None else found[1])
        return MaskCrops(crops, corners, window.shape)


def _burnt(outline: Any, window: Window) -> tuple[Window, BoolArray] | None:
    """Burn a mask in the part of its rectangle within the window; return this part and the mask, None if empty.

    Objects are usually far smaller than windows.
    """
    if isinstance(outline, Rle):
        mask, row, col = outline.crop()
        around = Window(row, col, *mask.shape)
        shared = around.intersect(window)
        return None if shared is None else (shared, mask[shared.slices_in(around)])
    left, top, right, bottom = shapely.bounds(outline)
    row, col = int(np.floor(top)), int(np.floor(left))
    around = Window(row, col, max(1, int(np.ceil(bottom)) - row), max(1, int(np.ceil(right)) - col))
    shared = around.intersect(window)
    if shared is None:
        return None
    options = {"out_shape": shared.shape, "transform": Affine.translation(shared.col, shared.row), "dtype": "uint8"}
    burnt = rasterize([outline], **options) > 0
    if shared == around and not burnt.any():
        burnt = rasterize([outline], all_touched=True, **options) > 0
    return shared, burnt


class InstanceMasks:
    """Masks from a raster with a distinct value per object.

    Args:
        path: Path of the raster.
        values: Value of each object.
    """

    def __init__(self, path: str, values: npt.NDArray[np.int64]) -> None:
        self.path = path
        self.values = values

    def read(self, indices: npt.NDArray[np.int64], window: Window) -> BoolArray:
        """Read masks of objects within a window of the image, [len(indices), height, width]."""
        with open_raster(self.path) as raster:
            pixels = raster.read(window).pixels[0]
        masks: BoolArray = pixels == self.values[indices][:, None, None]
        return masks

    def read_crops(self, indices: npt.NDArray[np.int64], window: Window) -> MaskCrops:
        """Read masks of objects within a window of the image, each cropped to its rectangle."""
        if not len(indices):
            return MaskCrops([], np.zeros((0, 2), np.int64), window.shape)
        with open_raster(self.path) as raster:
            pixels = raster.read(window).pixels[0]
        values = self.values[indices]
        order = np.argsort(values)
        # Object numbers from 1, 0 for none of these objects; row by row, as ranks take 8 bytes each.
        numbers = np.zeros(pixels.shape, np.int32)
        for row, line in zip(numbers, pixels, strict=True):
            ranks = np.searchsorted(values[order], line)
            row[:] = np.where(np.append(values[order], 0)[ranks] == line, ranks + 1, 0)
        corners, crops = np.zeros((len(values), 2), np.int64), [np.zeros((1, 1), bool)] * len(values)
        places = ndimage.find_objects(numbers, max_label=len(values))
        for number, (index, place) in enumerate(zip(order.tolist(), places, strict=True), 1):
            if place is not None:
                corners[index] = place[0].start, place[1].start
                crops[index] = numbers[place] == number
        return MaskCrops(crops, corners, window.shape)


def objects_in(
    record: ImageRecord,
    window: Window,
    *,
    min_visible: float,
    owned: Window | None = None,
    crop_masks: bool = False,
) -> ObjectLabels:
    """Return the objects that lie in a window, fully or partly.

    Boxes are clipped to the window; clipped boxes of objects with masks fit the remaining mask tightly. Oriented boxes
    aren't clipped, as the result wouldn't be an oriented box.

    Args:
        record: Image record.
        window: Window in image pixels.
        min_visible: Objects with a smaller visible fraction are marked as ignored; it is the fraction of the oriented
            box's area if there is one, else of the upright box's.
        owned: Part of the image that replaces `min_visible`: objects with their centre outside of it are ignored.
        crop_masks: Whether to return masks as `mask_crops`, for large windows.
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
    # Only boxes cut by the window need the slow computation.
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
    """Add masks; remove objects without a pixel in the window."""
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
    """Return which boxes exceed the window, [n]."""
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


def outlines_of(objects: ObjectLabels) -> npt.NDArray[Any]:
    """Return objects with cropped masks, oriented boxes or boxes as shapely geometries in their pixels, [n]."""
    if (masks := objects.mask_crops) is not None:
        pairs = zip(masks.crops, masks.corners.tolist(), strict=True)
        # The last element makes an array of objects whatever they are.
        return np.array([*(_traced(crop, row, col) for crop, (row, col) in pairs), None], object)[:-1]
    if objects.oriented_boxes is not None:
        return np.asarray(shapely.polygons(oriented_box_corners(objects.oriented_boxes)), object)
    return np.asarray(shapely.box(*objects.boxes_xyxy.T), object)


def _traced(crop: BoolArray, row: int, col: int) -> Any:
    """A mask as polygons along its pixels."""
    found = shapes(crop.astype(np.uint8), mask=crop, transform=Affine.translation(col, row))
    return shapely.unary_union([shapely.geometry.shape(each) for each, _ in found])
