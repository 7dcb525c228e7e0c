"""Tissue masks of slides: outlines drawn in QuPath or ASAP, and masks found at low resolution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import rasterize

from perf_vit.errors import InputError
from perf_vit.sources._qupath import is_ignored_class
from perf_vit.sources.slides.brightfield import find_stained, find_tissue
from perf_vit.sources.slides.fluorescence import find_fluorescent, is_dark
from perf_vit.sources.slides.glass import find_padding
from perf_vit.sources.slides.pyramid import LevelGrid, PyramidReader, grid_at, read_grid
from perf_vit.sources.vector_file import read_features, slide_frame
from perf_vit.types import TISSUE_METHODS, BoolArray, Window

__all__ = ["TISSUE_VERSION", "PolygonMask", "RasterMask", "TissueMask", "open_tissue", "read_outlines"]

TISSUE_VERSION = 1
"""Version of the methods that find tissue, in the names of stored features; increase it when masks change."""

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
        tissue: "auto" or "otsu", or a file of outlines, see `read_outlines`.
        path: Name of the slide, for errors.
        reader: Reader of the slide.
        mpp_yx: Micrometres per pixel of level 0; None if unknown.

    Raises:
        InputError: The method is "otsu" and the slide isn't 8-bit RGB, or the file has no polygons.
    """
    if tissue not in TISSUE_METHODS:
        return read_outlines(tissue, reader.bounds)
    full = reader.levels[0]
    by_side = max(1.0, max(full.height, full.width) / _MAX_SIDE_PX)
    factor_yx = (by_side, by_side) if mpp_yx is None else (max(1.0, _MPP / mpp_yx[0]), max(1.0, _MPP / mpp_yx[1]))
    grid = grid_at(reader.levels, factor_yx)
    level_yx = reader.levels[grid.level].downsample_yx
    mask = _find_otsu(path, reader, grid) if tissue == "otsu" else _find_auto(reader, grid)
    return RasterMask(mask, (grid.step_yx[0] * level_yx[0], grid.step_yx[1] * level_yx[1]))


def _bands_of(reader: PyramidReader) -> list[int]:
    return [index for index in range(len(reader.band_names)) if index != reader.alpha]


def _read(reader: PyramidReader, grid: LevelGrid, bands: Sequence[int]) -> tuple[npt.NDArray[Any], BoolArray]:
    pixels, mask = read_grid(reader, grid, Window(0, 0, grid.height, grid.width), bands)
    return pixels, np.asarray(mask.any(0))


def _find_otsu(path: str, reader: PyramidReader, grid: LevelGrid) -> BoolArray:
    bands = _bands_of(reader)
    if reader.dtype != np.uint8 or len(bands) != 3:
        raise InputError(
            f'tissue="otsu" needs red, green and blue of 8 bits, {path} has {len(reader.band_names)} channels of '
            f'{reader.dtype}; use tissue="auto", or give a GeoJSON file of outlines'
        )
    return find_tissue(*_read(reader, grid, bands))


def _find_auto(reader: PyramidReader, grid: LevelGrid) -> BoolArray:
    bands = _bands_of(reader)
    has_colors = [reader.band_names[index].lower() for index in bands] == ["red", "green", "blue"]
    if len(bands) == 3 and (has_colors or reader.dtype == np.uint8):
        pixels, seen = _read(reader, grid, bands)
        colors = _to_bytes(pixels, seen)
        if not is_dark(colors, seen & ~find_padding(colors, seen)):
            return find_stained(colors, seen)
        return find_fluorescent((band, seen) for band in pixels)
    return find_fluorescent(_channels(reader, grid, bands))


def _channels(
    reader: PyramidReader, grid: LevelGrid, bands: Sequence[int]
) -> Iterator[tuple[npt.NDArray[Any], BoolArray]]:
    """Yield channels with their masks, read by chunk: there may be dozens."""
    step = reader.bands_per_chunk(grid.level)
    for _, chunk in itertools.groupby(bands, lambda band: band // step):
        pixels, mask = read_grid(reader, grid, Window(0, 0, grid.height, grid.width), list(chunk))
        yield from zip(pixels, np.broadcast_to(mask, pixels.shape), strict=True)


def _to_bytes(pixels: npt.NDArray[Any], seen: BoolArray) -> npt.NDArray[np.uint8]:
    """Return colours of 8 bits; of other types, the brightest light becomes nearly white."""
    if pixels.dtype == np.uint8:
        return pixels
    white = max(1e-9, float(np.percentile(pixels[:, seen], 99.9))) if seen.any() else 1.0
    return np.clip(np.nan_to_num(pixels.astype(np.float32)) * (250 / white), 0, 255).astype(np.uint8)


_STEPS_PER_PX = 256


class PolygonMask:
    """Polygons in pixels of level 0, burnt by window.

    Args:
        polygons: Shapely polygons, [n].
        excluded: Whether a polygon is cut out of the others, [n]; None for none.
    """

    def __init__(self, polygons: npt.NDArray[Any], excluded: BoolArray | None = None) -> None:
        # Later polygons are burnt over earlier ones.
        order = slice(None) if excluded is None else np.argsort(excluded, kind="stable")
        self._polygons = polygons[order]
        self._values = np.ones(len(polygons), np.uint8) if excluded is None else (~excluded[order]).astype(np.uint8)
        self._tree = shapely.STRtree(self._polygons)

    def read(
        self, window: Window, downsample_xy: tuple[float, float], start_xy: tuple[float, float] = (0.0, 0.0)
    ) -> BoolArray:
        """Return which pixel centres lie in a polygon, [height, width]; see `TissueMask`."""
        scale, start = np.array(downsample_xy), np.array(start_xy)
        low = start + scale * (window.col, window.row)
        high = start + scale * (window.col_stop, window.row_stop)
        hits = np.sort(self._tree.query(shapely.box(*low, *high)))
        if len(hits) == 0:
            return np.zeros(window.shape, bool)

        # Shifts by whole pixels are exact for coordinates in 1/256 pixel, so the result doesn't depend on the window.
        def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.asarray(np.round((xy - start) / scale * _STEPS_PER_PX) / _STEPS_PER_PX)

        shapes = zip(shapely.transform(self._polygons[hits], place), self._values[hits].tolist(), strict=True)
        shift = Affine.translation(window.col, window.row)
        return np.asarray(rasterize(shapes, out_shape=window.shape, transform=shift, fill=0, dtype="uint8"), bool)


def read_outlines(path: str, bounds: Window | None) -> PolygonMask:
    """Read outlines from GeoJSON of QuPath, XML of ASAP or any file of polygons; areas of `Ignore*` are cut out.

    Args:
        path: File; in QuPath's coordinates, unless it names another frame.
        bounds: Scanned area in pixels of level 0, from whose corner QuPath counts; None for all of level 0.

    Raises:
        InputError: The file can't be read, or has no polygons.
    """
    if not Path(path).exists():
        raise InputError(f"can't open {path}: no such file or directory; tissue must be auto, otsu or a file")
    frame = read_features(path, "classification", required=False)
    parts, owners = shapely.get_parts(shapely.force_2d(frame.geometry.to_numpy()), return_index=True)
    areas = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    excluded = frame["classification"].map(is_ignored_class).to_numpy(bool)[owners[areas]]
    if excluded.all():
        raise InputError(f"{path} holds no polygons; draw the tissue's outlines, in pixels of level 0")
    polygons = parts[areas]
    if bounds is not None and slide_frame(frame) == "QuPath":
        polygons = shapely.transform(polygons, lambda xy: np.add(xy, (bounds.col, bounds.row)))
    return PolygonMask(np.asarray(polygons), excluded)
