"""Whole slides at any magnification, and their tissue."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import shapely
import shapely.geometry
from affine import Affine
from rasterio.features import rasterize
from scipy import ndimage

from perf_vit.errors import InputError
from perf_vit.sources._bands import warn_of_alpha
from perf_vit.sources.base import BaseSource
from perf_vit.sources.slides.pyramid import LevelGrid, PyramidReader, finest_enough, grid_at, grid_of_level, read_grid
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["PolygonMask", "RasterMask", "SlideSource", "TissueMask", "find_tissue", "open_tissue", "otsu_threshold"]

_MPP = 8.0

# Longest side of the image for tissue detection if the pixel size is unknown.
_MAX_SIDE_PX = 2048

_STEPS_PER_PX = 256

_CLOSING_RADIUS_PX = 3

# 0.01 mm2 at 8 um/px: larger than dust and pen dots, smaller than the smallest biopsies.
_MIN_AREA_PX = 156

# Lower saturation is glass, whatever the histogram; darker pixels are pen marks, folds or the slide's rim, whose
# saturation is noise.
_MIN_SATURATION, _MIN_VALUE = 0.05, 0.1


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


def find_tissue(pixels: npt.NDArray[np.uint8], valid: BoolArray) -> BoolArray:
    """Detect tissue by HSV saturation above Otsu's threshold, with gaps closed and small spots and holes removed.

    Args:
        pixels: Red, green and blue, [3, H, W], at about 8 micrometres per pixel.
        valid: Scanned pixels, [H, W].

    Returns:
        Tissue mask, [H, W].
    """
    high, low = pixels.max(0).astype(np.float32), pixels.min(0)
    saturation = (high - low) / np.maximum(high, 1)
    lit = valid & (high >= _MIN_VALUE * 255)
    counts = np.bincount((saturation[lit] * 255).astype(np.int64), minlength=256)
    threshold = max(_MIN_SATURATION, (otsu_threshold(counts) + 1) / 255)
    mask = lit & (saturation >= threshold)
    y, x = np.ogrid[-_CLOSING_RADIUS_PX : _CLOSING_RADIUS_PX + 1, -_CLOSING_RADIUS_PX : _CLOSING_RADIUS_PX + 1]
    disk = x * x + y * y <= _CLOSING_RADIUS_PX**2
    # Padding keeps the closing from eroding tissue at the edge.
    padded = np.pad(mask, _CLOSING_RADIUS_PX, mode="edge")
    inner = slice(_CLOSING_RADIUS_PX, -_CLOSING_RADIUS_PX)
    closed = ndimage.binary_closing(padded, disk)[inner, inner]
    return ~_without_small(~_without_small(closed)) & valid


def otsu_threshold(counts: npt.NDArray[np.int64]) -> int:
    """Return the last bin of the lower class, which maximises the between-class variance (Otsu 1979, eq. 18).

    Args:
        counts: Histogram counts, [num_bins].
    """
    bins = np.arange(len(counts))
    weight = np.cumsum(counts)
    moment = np.cumsum(counts * bins, dtype=np.float64)
    rest = weight[-1] - weight
    between = (moment * weight[-1] - moment[-1] * weight) ** 2 / np.maximum(weight * rest.astype(np.float64), 1)
    return int(np.argmax(between))


def _without_small(mask: BoolArray) -> BoolArray:
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= _MIN_AREA_PX
    large[0] = False
    return np.asarray(large[labels])


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


class SlideSource(BaseSource):
    """Whole slide, opened by `open_source`.

    It can be pickled, forked and shared between threads; each opens its own file.

    Args:
        path: Path of the slide.
        reader: Reader of its levels.
        mpp: Micrometres per pixel to read at.
        level: Level to read, instead of `mpp`; None for 0.
        slide_mpp: Micrometres per pixel of level 0, or (x, y), which replaces that of the file.
        bands: Names or 1-based numbers of the channels to read, in this order; None for all but alpha.
        tissue: "otsu", or a GeoJSON file of polygons in pixels of level 0; other pixels are invalid.

    Attributes:
        path: Path as given.
        height: Number of rows at the resolution read.
        width: Number of columns at the resolution read.
        bands: 1-based numbers of the channels that `read` returns.
        dtype: Data type of the pixels.
        band_names: Names of the channels.
        mpp: Micrometres per pixel at the resolution read, the geometric mean for non-square pixels; None if unknown.
        slide_mpp: Micrometres per pixel of level 0 (x, y); None if unknown.
        downsample_xy: Width and height of a pixel of this source, in pixels of level 0.
        transform: The identity.
        format: Format of the file, such as "aperio".
        levels: Size (height, width) of each level in the file, finest first.
        mask_name: Mask in the file, such as "band 4 (alpha)", or None.
        options: Options of `open_source` that it was opened with.
        opened_from: Input given to `open_source`; None for sources opened otherwise.

    Raises:
        InputError: A level or channel doesn't exist, `mpp` is given without a known pixel size, or the tissue file is
            invalid.
    """

    crs = None
    nodata: float | None = None

    def __init__(
        self,
        path: str,
        reader: PyramidReader,
        *,
        mpp: float | None = None,
        level: int | None = None,
        slide_mpp: float | tuple[float, float] | None = None,
        bands: Sequence[int | str] | None = None,
        tissue: str | None = None,
    ) -> None:
        self.path = path
        self._reader = reader
        self.format = reader.format
        self.levels = tuple((level.height, level.width) for level in reader.levels)
        mpp_yx = _checked_mpp(path, slide_mpp) or reader.mpp_yx
        self.slide_mpp = None if mpp_yx is None else (mpp_yx[1], mpp_yx[0])
        self._grid = _choose_grid(path, reader, mpp, level, mpp_yx)
        down_y, down_x = reader.levels[self._grid.level].downsample_yx
        self.downsample_xy = (self._grid.step_yx[1] * down_x, self._grid.step_yx[0] * down_y)
        self.mpp = None if mpp_yx is None else math.sqrt(math.prod(mpp_yx) * math.prod(self.downsample_xy))
        self.height, self.width = self._grid.height, self._grid.width
        self.dtype = reader.dtype
        self._indices = _choose_bands(path, reader, bands)
        self.mask_name: str | None = None
        if reader.alpha is not None and reader.alpha not in self._indices:
            self.mask_name = f"band {reader.alpha + 1} (alpha)"
            warn_of_alpha(path, reader.alpha + 1, len(reader.band_names))
        self.bands = tuple(index + 1 for index in self._indices)
        self.band_names = tuple(reader.band_names[index] for index in self._indices)
        self.transform = Affine.identity()
        self._tissue: TissueMask | None = None if tissue is None else open_tissue(tissue, path, reader, mpp_yx)

    @property
    def num_bands(self) -> int:
        """Number of channels that `read` returns."""
        return len(self.bands)

    def _read(self, window: Window) -> GeoImage:
        # A level is read as it is; other sizes are resampled from the coarsest level that is fine enough, with a
        # triangle filter that is laid on the slide, not on the window: windows meet without a seam, bit for bit.
        # A channel is invalid past the edge, where the scanner saw nothing, where it is not finite and outside the
        # tissue; a pixel is valid where a channel is. Pixels past the edge and unseen ones are white in a slide of
        # three colours of 8 bits, else 0.
        pixels = np.full((self.num_bands, *window.shape), self._reader.fill, self.dtype)
        mask = np.zeros((1, *window.shape), bool)
        shared = window.intersect(self.extent)
        if shared is not None:
            rows, cols = shared.slices_in(window)
            pixels[:, rows, cols], inside = self._read_inside(self._grid, shared)
            if self._tissue is not None:
                inside = inside & self._tissue.read(shared, self.downsample_xy)
            mask = np.zeros((len(inside), *window.shape), bool)
            mask[:, rows, cols] = inside
        return GeoImage.from_mask(pixels, mask, None, Affine.translation(window.col, window.row), self.mpp)

    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window at lower resolution, from the best level, for statistics and pictures.

        Args:
            max_size_px: Maximum size of the longest side of the result in pixels; smaller windows are not enlarged.
            window: Window, clipped to the slide; None for the whole slide.

        Returns:
            Pixels [num_bands, h, w] with their `mpp`, and the transform to pixels of this source.

        Raises:
            InputError: The window is outside the slide, or the file is damaged there.
        """
        shared = (window or self.extent).intersect(self.extent)
        if shared is None:
            raise InputError(f"{window} must meet {self.path}, which is {self.height} rows x {self.width} columns")
        reduction = max(shared.shape) / max_size_px
        if reduction <= 1:
            return self.read(shared)
        height, width = (max(1, math.floor(side / reduction + 0.5)) for side in shared.shape)
        scale_yx = shared.height / height, shared.width / width
        pixels, mask = self._read_inside(self._coarser(shared, scale_yx), Window(0, 0, height, width))
        if self._tissue is not None:
            down_x, down_y = self.downsample_xy
            coarse_xy = (down_x * scale_yx[1], down_y * scale_yx[0])
            start_xy = (shared.col * down_x, shared.row * down_y)
            mask = mask & self._tissue.read(Window(0, 0, height, width), coarse_xy, start_xy)
        mpp = None if self.mpp is None else self.mpp * math.sqrt(math.prod(scale_yx))
        scale = Affine.scale(scale_yx[1], scale_yx[0])
        return GeoImage.from_mask(pixels, mask, None, Affine.translation(shared.col, shared.row) @ scale, mpp)

    def close(self) -> None:
        """Close this thread's file handle; the next read opens it again."""
        self._reader.close()

    def __repr__(self) -> str:
        mpp = "unknown mpp" if self.mpp is None else f"{self.mpp:.4g} mpp"
        return f"SlideSource({self.path!r}: {self.height} x {self.width} px, {self.num_bands} x {self.dtype}, {mpp})"

    def _read_inside(self, grid: LevelGrid, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        return read_grid(self._reader, grid, window, self._indices)

    def _coarser(self, window: Window, scale_yx: tuple[float, float]) -> LevelGrid:
        """Return a grid over `window` only, of pixels larger by `scale_yx`."""
        down_yx = self.downsample_xy[::-1]
        factor_yx = (down_yx[0] * scale_yx[0], down_yx[1] * scale_yx[1])
        index = finest_enough(self._reader.levels, factor_yx)
        level_yx = self._reader.levels[index].downsample_yx
        step_yx = (factor_yx[0] / level_yx[0], factor_yx[1] / level_yx[1])
        start_yx = (window.row * down_yx[0] / level_yx[0], window.col * down_yx[1] / level_yx[1])
        return LevelGrid(index, window.height, window.width, step_yx, start_yx)


def _checked_mpp(path: str, slide_mpp: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if slide_mpp is None:
        return None
    x, y = slide_mpp if isinstance(slide_mpp, tuple) else (slide_mpp, slide_mpp)
    if not (0 < x < math.inf and 0 < y < math.inf):
        raise InputError(f"slide_mpp of {path} must be above 0, in micrometres per pixel of level 0; got {slide_mpp}")
    return float(y), float(x)


def _choose_grid(
    path: str, reader: PyramidReader, mpp: float | None, level: int | None, mpp_yx: tuple[float, float] | None
) -> LevelGrid:
    if mpp is None:
        num_levels = len(reader.levels)
        if not 0 <= (level or 0) < num_levels:
            raise InputError(f"level of {path} must be 0 to {num_levels - 1}, which it has; got {level}")
        return grid_of_level(reader.levels, level or 0)
    if level is not None:
        raise InputError(f"give mpp or level of {path}, not both; got mpp={mpp:g} and level={level}")
    if not 0 < mpp < math.inf:
        raise InputError(f"mpp must be above 0, in micrometres per pixel; got {mpp:g}")
    if mpp_yx is None:
        raise InputError(
            f"{path} doesn't say how large its pixels are, so it can't be read at mpp={mpp:g}; give the micrometres "
            "per pixel of level 0, such as slide_mpp=0.25, or read a level"
        )
    return grid_at(reader.levels, (mpp / mpp_yx[0], mpp / mpp_yx[1]))


def _choose_bands(path: str, reader: PyramidReader, bands: Sequence[int | str] | None) -> tuple[int, ...]:
    names = reader.band_names
    if bands is None:
        return tuple(index for index in range(len(names)) if index != reader.alpha)
    known: dict[int | str, int] = {name: index for index, name in reversed(list(enumerate(names)))}
    known |= {index + 1: index for index in range(len(names))}
    wrong = [band for band in bands if band not in known]
    if wrong or not bands:
        got = f"got {wrong[0]!r}" if wrong else "got none"
        raise InputError(f"bands of {path} must be numbers from 1 to {len(names)} or of {', '.join(names)}; {got}")
    return tuple(known[band] for band in bands)
