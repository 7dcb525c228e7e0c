"""Rasters of any size, read window by window, with a mask of the pixels that hold data."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags

from perf_vit.errors import InputError
from perf_vit.io._gdal import crs_name, open_dataset, read_window
from perf_vit.io._handles import PerThread
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["Bounds", "RasterSource"]

PixelArray = npt.NDArray[Any]

Bounds = tuple[float, float, float, float]
"""(left, bottom, right, top) in CRS units."""


class RasterSource:
    """A raster on disk or behind a URL; `open_source` makes one.

    It may be pickled, forked and shared between threads: each opens the file for itself.

    Attributes:
        path: as it was given.
        height: rows.
        width: columns.
        bands: 1-based numbers of the bands that `read` gives.
        dtype: of the pixels; the common one where bands differ.
        crs: None where the file has none.
        transform: pixel (column, row) to CRS coordinates; the identity where the file has none.
        nodata: value of missing pixels, None if there is none that the dtype can hold.
        band_names: the bands' descriptions, "band_1" and so on where they have none.
        colormap: value to (red, green, blue, alpha), None where the first band has none.
    """

    mpp: float | None = None

    def __init__(self, path: str | Path, *, bands: Sequence[int] | None = None, nodata: float | None = None) -> None:
        self.path = os.fspath(path)
        self._handle = PerThread(functools.partial(open_dataset, self.path))
        dataset = self._handle.get()
        self.height: int = dataset.height
        self.width: int = dataset.width
        self.bands = _choose_bands(dataset, self.path, bands)
        self.dtype = _common_dtype(dataset, self.path, self.bands)
        self.crs = dataset.crs
        self.transform: Affine = dataset.transform
        self._nodata = _nodata_values(dataset, self.path, self.bands, self.dtype, nodata)
        self.nodata = next((value for value in self._nodata if value is not None), None)
        self.band_names = tuple(dataset.descriptions[band - 1] or f"band_{band}" for band in self.bands)
        self.colormap = _colormap(dataset, self.bands[0])
        self._alpha_bands = [i for i, kind in enumerate(dataset.colorinterp, 1) if kind == ColorInterp.alpha]
        self._has_mask = _has_mask(dataset, self.bands[0])

    @property
    def num_bands(self) -> int:
        """Bands that `read` gives."""
        return len(self.bands)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def extent(self) -> Window:
        """The window of all pixels."""
        return Window(0, 0, self.height, self.width)

    @property
    def bounds(self) -> Bounds:
        """(left, bottom, right, top) in CRS units; of a rotated raster, the box around it."""
        corners = ((0, 0), (self.width, 0), (0, self.height), (self.width, self.height))
        xs, ys = zip(*(self.transform @ corner for corner in corners), strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def read(self, window: Window) -> GeoImage:
        """Read a window, which may reach past the edge on any side.

        A pixel is invalid past the edge, where all bands hold nodata, where alpha or mask is 0, and where a band is
        not finite. Pixels past the edge are the nodata value, or 0.

        Args:
            window: rows and columns, in pixels of the raster.

        Returns:
            Pixels [num_bands, height, width] in the raster's dtype.

        Raises:
            InputError: the file is damaged there.
        """
        pixels = np.full((self.num_bands, *window.shape), self.nodata or 0, self.dtype)
        valid = np.zeros(window.shape, bool)
        shared = window.intersect(self.extent)
        if shared is not None:
            rows, cols = shared.slices_in(window)
            pixels[:, rows, cols], valid[rows, cols] = self._read_inside(shared, shared.shape)
        return GeoImage(pixels, valid, self.crs, self.transform @ Affine.translation(window.col, window.row))

    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window thinned out, or from the file's overviews: for statistics and pictures.

        Args:
            max_size_px: longest side of the result, in pixels; smaller windows are not enlarged.
            window: inside the raster, all of it by default.

        Returns:
            Pixels [num_bands, h, w] by nearest neighbour, with the transform of the larger pixels.

        Raises:
            InputError: the window is outside the raster, or the file is damaged there.
        """
        shared = (window or self.extent).intersect(self.extent)
        if shared is None:
            raise InputError(f"{window} must meet {self.path}, which is {self.height} rows x {self.width} columns")
        step = max(1.0, max(shared.shape) / max_size_px)
        height, width = (max(1, math.floor(side / step + 0.5)) for side in shared.shape)
        pixels, valid = self._read_inside(shared, (height, width))
        scale = Affine.scale(shared.width / width, shared.height / height)
        return GeoImage(pixels, valid, self.crs, self.transform @ Affine.translation(shared.col, shared.row) @ scale)

    def close(self) -> None:
        """Close this thread's file handle; a later read opens it again."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        layout = f"{self.height} x {self.width} px, {self.num_bands} x {self.dtype}, {crs_name(self.crs)}"
        return f"RasterSource({self.path!r}: {layout})"

    def _read_inside(self, window: Window, out_shape: tuple[int, int]) -> tuple[PixelArray, BoolArray]:
        read = functools.partial(read_window, self._handle.get(), self.path, window)
        pixels = read(indexes=self.bands, out_shape=(self.num_bands, *out_shape), out_dtype=self.dtype)
        valid = _holds_data(pixels, self._nodata)
        if self._alpha_bands:
            valid &= (read(indexes=self._alpha_bands, out_shape=(len(self._alpha_bands), *out_shape)) > 0).all(0)
        if self._has_mask:
            valid &= read(masks=True, indexes=self.bands[0], out_shape=out_shape) > 0
        return pixels, valid


def _holds_data(pixels: PixelArray, nodata: Sequence[float | None]) -> BoolArray:
    """False where all bands hold their nodata value, and where a band is not finite; [H, W]."""
    valid = np.zeros(pixels.shape[1:], bool)
    for band, value in zip(pixels, nodata, strict=True):
        # NaN differs from itself, so it passes here and is caught below.
        valid |= True if value is None else band != band.dtype.type(value)
    if pixels.dtype.kind == "f":
        for band in pixels:
            valid &= np.isfinite(band)
    return valid


def _choose_bands(dataset: Any, path: str, bands: Sequence[int] | None) -> tuple[int, ...]:
    if dataset.count == 0:
        parts = dataset.subdatasets
        hint = f"open one of its {len(parts)} subdatasets, such as {parts[0]}" if parts else "choose another file"
        raise InputError(f"{path} has no bands; {hint}")
    if bands is None:
        colors = [i for i, kind in enumerate(dataset.colorinterp, 1) if kind != ColorInterp.alpha]
        return tuple(colors or range(1, dataset.count + 1))
    wrong = [band for band in bands if not 1 <= band <= dataset.count]
    if wrong or not bands:
        got = f"got {wrong[0]}" if wrong else "got none"
        raise InputError(f"bands of {path} must be numbers from 1 to {dataset.count}, which it has; {got}")
    return tuple(bands)


def _common_dtype(dataset: Any, path: str, bands: Sequence[int]) -> np.dtype[Any]:
    names = {dataset.dtypes[band - 1] for band in bands}
    if any(name.startswith("complex") for name in names):
        raise InputError(f"{path} holds complex pixels; write their magnitude to a file and open that")
    return np.result_type(*names)


def _nodata_values(
    dataset: Any, path: str, bands: Sequence[int], dtype: np.dtype[Any], given: float | None
) -> tuple[float | None, ...]:
    if given is not None:
        if not _fits(given, dtype):
            raise InputError(f"nodata of {path} must be a value of its {dtype} pixels, got {given}")
        return (given,) * len(bands)
    declared = [dataset.nodatavals[band - 1] for band in bands]
    # Files often declare what their pixels can't hold, -9999 in bytes: then no pixel is missing.
    return tuple(value if value is not None and _fits(value, dtype) else None for value in declared)


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return not math.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def _colormap(dataset: Any, band: int) -> dict[int, tuple[int, int, int, int]] | None:
    if dataset.colorinterp[band - 1] != ColorInterp.palette:
        return None
    return dict(dataset.colormap(band))


def _has_mask(dataset: Any, band: int) -> bool:
    """Whether there is a mask band, inside the file or beside it."""
    derived = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    return not derived & set(dataset.mask_flag_enums[band - 1])
