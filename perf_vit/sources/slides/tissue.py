"""Tissue masks of slides: outlines from files, and masks found at low resolution."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import shapely
import shapely.geometry
from affine import Affine
from rasterio.features import rasterize

from perf_vit.errors import InputError
from perf_vit.sources.slides.otsu import find_tissue
from perf_vit.sources.slides.pyramid import PyramidReader, grid_at, read_grid
from perf_vit.types import BoolArray, Window

__all__ = ["PolygonMask", "RasterMask", "TissueMask", "open_tissue"]

_MPP = 8.0

# Longest side of the image for tissue detection if the pixel size is unknown.
_MAX_SIDE_PX = 2048

_STEPS_PER_PX = 256


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


class PolygonMask:
    """Polygons in pixels of level 0, burnt by window.

    Args:
        polygons: Shapely polygons.
    """

    def __init__(self, polygons: npt.NDArray[Any]) -> None:
        self._polygons = polygons
        self._tree = shapely.STRtree(polygons)

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

        shapes = shapely.transform(self._polygons[hits], place)
        shift = Affine.translation(window.col, window.row)
        burnt = rasterize(shapes, out_shape=window.shape, transform=shift, fill=0, default_value=1, dtype="uint8")
        return np.asarray(burnt, bool)


def open_tissue(tissue: str, path: str, reader: PyramidReader, mpp_yx: tuple[float, float] | None) -> TissueMask:
    """Detect the tissue of a slide, or read its outlines.

    Args:
        tissue: "otsu", or a GeoJSON file of polygons in pixels of level 0, as QuPath exports them.
        path: Name of the slide, for errors.
        reader: Reader of the slide.
        mpp_yx: Micrometres per pixel of level 0; None if unknown.

    Raises:
        InputError: The slide isn't 8-bit RGB, or the file has no polygons.
    """
    if tissue != "otsu":
        return PolygonMask(_read_polygons(tissue))
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


def _read_polygons(path: str) -> npt.NDArray[Any]:
    try:
        content = json.loads(Path(path).read_bytes())
        geometries = [shapely.geometry.shape(entry) for entry in _geometries(content)]
    except OSError as error:
        raise InputError(
            f"can't open {path}: {str(error.strerror).lower()}; tissue must be otsu or a GeoJSON file"
        ) from error
    # Shapely raises many kinds of errors for invalid coordinates.
    except Exception as error:
        raise InputError(f"{path} is not GeoJSON: {error}") from error
    parts = shapely.get_parts(np.array(geometries, dtype=object))
    polygons = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON] if len(parts) else parts
    if len(polygons) == 0:
        raise InputError(f"{path} holds no polygons; draw the tissue's outlines, in pixels of level 0")
    low_x, low_y, high_x, high_y = shapely.total_bounds(polygons)
    if not math.isfinite(low_x + low_y + high_x + high_y):
        raise InputError(f"{path} holds coordinates that are not numbers")
    return np.asarray(polygons)


def _geometries(content: Any) -> list[Any]:
    """Return the GeoJSON geometries of a collection, a feature, a list of features (older QuPath) or a geometry."""
    if isinstance(content, list):
        return [geometry for entry in content for geometry in _geometries(entry)]
    if content["type"] == "FeatureCollection":
        return _geometries(content["features"])
    if content["type"] == "Feature":
        return [] if content["geometry"] is None else [content["geometry"]]
    return [content]
