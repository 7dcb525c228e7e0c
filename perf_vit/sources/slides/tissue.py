"""Tissue masks of slides: outlines from files, and masks found at low resolution."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from perf_vit.errors import InputError
from perf_vit.sources.slides.otsu import find_tissue
from perf_vit.sources.slides.outlines import read_outlines
from perf_vit.sources.slides.pyramid import PyramidReader, grid_at, read_grid
from perf_vit.types import BoolArray, Window

__all__ = ["RasterMask", "TissueMask", "open_tissue"]

_MPP = 8.0

# Longest side of the image for tissue detection if the pixel size is unknown.
_MAX_SIDE_PX = 2048


class TissueMask(Protocol):
    """Tissue mask of a slide, read by window."""

    def read(
        self, window: Window, downsample_xy: tuple[float, float], start_xy: tuple[float, float] = (0.0, 0.0)
    ) -> BoolArray:
        """Return which pixel centres lie on tissue.

        Args:
            window: Rows and columns of a grid over the slide.
            downsample_xy: Width and height of the grid's pixels, in pixels of level 0.
            start_xy: Upper left corner of the grid, in pixels of level 0.

        Returns:
            Mask, [window.height, window.width].
        """


class RasterMask:
    """Mask of the whole slide at low resolution.

    Args:
        mask: Mask, [h, w].
        downsample_yx: Height and width of its pixels, in pixels of level 0.
    """

    def __init__(self, mask: BoolArray, downsample_yx: tuple[float, float]) -> None:
        self.mask = mask
        self._downsample_yx = downsample_yx

    def read(
        self, window: Window, downsample_xy: tuple[float, float], start_xy: tuple[float, float] = (0.0, 0.0)
    ) -> BoolArray:
        """Return which pixel centres lie on tissue, [height, width]; see `TissueMask`."""
        num_rows, num_cols = self.mask.shape
        y = start_xy[1] + (np.arange(window.row, window.row_stop) + 0.5) * downsample_xy[1]
        x = start_xy[0] + (np.arange(window.col, window.col_stop) + 0.5) * downsample_xy[0]
        rows = np.clip(np.floor(y / self._downsample_yx[0]).astype(np.int64), 0, num_rows - 1)
        cols = np.clip(np.floor(x / self._downsample_yx[1]).astype(np.int64), 0, num_cols - 1)
        return self.mask[np.ix_(rows, cols)]


def open_tissue(tissue: str, path: str, reader: PyramidReader, mpp_yx: tuple[float, float] | None) -> TissueMask:
    """Detect the tissue of a slide, or read its outlines.

    Args:
        tissue: "otsu", or a file of outlines, see `read_outlines`.
        path: Name of the slide, for errors.
        reader: Reader of the slide.
        mpp_yx: Micrometres per pixel of level 0; None if unknown.

    Raises:
        InputError: The slide isn't 8-bit RGB, or the file has no polygons.
    """
    if tissue != "otsu":
        return read_outlines(tissue, reader.bounds)
    if reader.dtype != np.uint8 or len(reader.band_names) - (reader.alpha is not None) != 3:
        raise InputError(
            f'tissue="otsu" needs red, green and blue of 8 bits, {path} has {len(reader.band_names)} channels of '
            f"{reader.dtype}; give a GeoJSON file of outlines"
        )
    full = reader.levels[0]
    by_side = max(1.0, max(full.height, full.width) / _MAX_SIDE_PX)
    factor_yx = (by_side, by_side) if mpp_yx is None else (max(1.0, _MPP / mpp_yx[0]), max(1.0, _MPP / mpp_yx[1]))
    grid = grid_at(reader.levels, factor_yx)
    pixels, mask = read_grid(reader, grid, Window(0, 0, grid.height, grid.width), (0, 1, 2))
    level_yx = reader.levels[grid.level].downsample_yx
    downsample_yx = (grid.step_yx[0] * level_yx[0], grid.step_yx[1] * level_yx[1])
    return RasterMask(find_tissue(pixels, np.asarray(mask.any(0))), downsample_yx)
