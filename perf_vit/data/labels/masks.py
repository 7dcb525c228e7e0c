"""Masks of objects, burnt window by window from outlines, run lengths or instance rasters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import rasterize

from perf_vit.errors import InputError
from perf_vit.io import open_raster
from perf_vit.types import BoolArray, Window

__all__ = ["InstanceMasks", "OutlineMasks", "Rle"]


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask of a whole image as run lengths, column by column, the first run outside the object (COCO's way).

    Attributes:
        counts: lengths of the runs; their sum is height * width.
        height: rows.
        width: columns.
    """

    counts: npt.NDArray[np.int64]
    height: int
    width: int

    @classmethod
    def make(cls, value: dict[str, Any], path: str) -> Rle:
        """From an annotation's `segmentation`, with its counts as numbers or packed into a string.

        Raises:
            InputError: the runs don't cover the mask exactly.
        """
        height, width = (int(side) for side in value["size"])
        counts = value["counts"]
        runs = np.asarray(_unpacked(counts) if isinstance(counts, str) else counts, np.int64)
        if (runs < 0).any() or runs.sum() != height * width:
            raise InputError(
                f"{path} holds a mask of {height} x {width} pixels whose runs sum to {runs.sum()}; it is damaged"
            )
        return cls(runs, height, width)

    def decode(self) -> BoolArray:
        """The mask, [height, width]."""
        inside = np.arange(len(self.counts)) % 2 == 1
        mask: BoolArray = np.repeat(inside, self.counts).reshape(self.width, self.height).T
        return mask

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom; all 0 where the mask is empty."""
        rows, cols = np.nonzero(self.decode())
        if len(rows) == 0:
            return 0, 0, 0, 0
        return float(cols.min()), float(rows.min()), float(cols.max() + 1), float(rows.max() + 1)


def _unpacked(text: str) -> list[int]:
    """Run lengths from COCO's compressed string.

    Each number is written in groups of five bits, the lowest first, in characters from "0" on; bit 5 says that more
    follow, and the last group's bit 4 is the sign. From the fourth number on they are differences to the last but one.
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
    """Masks from polygons and run lengths; a pixel belongs to a polygon that holds its centre.

    A polygon too small or thin to hold any covers the pixels that it touches, so that no object is without mask.

    Args:
        outlines: shapely geometries in pixels of the image, or `Rle`.
    """

    def __init__(self, outlines: Sequence[Any]) -> None:
        self.outlines = list(outlines)

    def read(self, indices: npt.NDArray[np.int64], window: Window) -> BoolArray:
        """Masks of some objects inside a window of the image, [len(indices), height, width]."""
        masks = np.zeros((len(indices), *window.shape), bool)
        for mask, index in zip(masks, indices.tolist(), strict=True):
            outline = self.outlines[index]
            if isinstance(outline, Rle):
                _paste(mask, outline, window)
            else:
                _burn(mask, outline, window)
        return masks


def _paste(mask: BoolArray, rle: Rle, window: Window) -> None:
    shared = Window(0, 0, rle.height, rle.width).intersect(window)
    if shared is not None:
        mask[shared.slices_in(window)] = rle.decode()[shared.row : shared.row_stop, shared.col : shared.col_stop]


def _burn(mask: BoolArray, polygon: Any, window: Window) -> None:
    """Burn a polygon into its own rectangle only: objects are far smaller than windows."""
    left, top, right, bottom = shapely.bounds(polygon)
    row, col = int(np.floor(top)), int(np.floor(left))
    around = Window(row, col, max(1, int(np.ceil(bottom)) - row), max(1, int(np.ceil(right)) - col))
    shared = around.intersect(window)
    if shared is None:
        return
    options = {"out_shape": shared.shape, "transform": Affine.translation(shared.col, shared.row), "dtype": "uint8"}
    burnt = rasterize([polygon], **options) > 0
    if shared == around and not burnt.any():
        burnt = rasterize([polygon], all_touched=True, **options) > 0
    mask[shared.slices_in(window)] = burnt


class InstanceMasks:
    """Masks from a raster in which each object is a value of its own.

    Args:
        path: of the raster.
        values: one an object.
    """

    def __init__(self, path: str, values: npt.NDArray[np.int64]) -> None:
        self.path = path
        self.values = values

    def read(self, indices: npt.NDArray[np.int64], window: Window) -> BoolArray:
        """Masks of some objects inside a window of the image, [len(indices), height, width]."""
        with open_raster(self.path) as raster:
            pixels = raster.read(window).pixels[0]
        masks: BoolArray = pixels == self.values[indices][:, None, None]
        return masks
