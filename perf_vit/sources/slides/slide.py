"""Whole slides at any magnification."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from affine import Affine

from perf_vit.errors import InputError
from perf_vit.sources._bands import warn_of_alpha
from perf_vit.sources.base import BaseSource
from perf_vit.sources.slides.frame import SlideFrame
from perf_vit.sources.slides.pyramid import (
    LevelGrid,
    PyramidReader,
    finest_enough,
    grid_at,
    grid_of_level,
    grid_within,
    read_grid,
)
from perf_vit.sources.slides.scale import SlideMpp, choose_mpp, unknown_mpp
from perf_vit.sources.slides.tissue import TissueMask, open_tissue
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["SlideSource"]


class SlideSource(BaseSource):
    """Whole slide, opened by `open_source`.

    It can be pickled, forked and shared between threads; each opens its own file.

    Args:
        path: Path of the slide.
        reader: Reader of its levels.
        mpp: Micrometres per pixel to read at.
        level: Level to read, instead of `mpp`; None for 0.
        slide_mpp: Micrometres per pixel of level 0, (x, y) or "objective", for a file that states none.
        slide_mpp_override: Micrometres per pixel of level 0, or (x, y), which replaces that of the file.
        bands: Names or 1-based numbers of the channels to read, in this order; None for all but alpha.
        tissue: "auto" or "otsu", or a file of outlines in QuPath's coordinates; other pixels are invalid.

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
        frame: Transforms from pixels of this source to level 0, QuPath's coordinates and micrometres.
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
        slide_mpp: SlideMpp | None = None,
        slide_mpp_override: float | tuple[float, float] | None = None,
        bands: Sequence[int | str] | None = None,
        tissue: str | None = None,
    ) -> None:
        self.path = path
        self._reader = reader
        self.format = reader.format
        self.levels = tuple((level.height, level.width) for level in reader.levels)
        mpp_yx = choose_mpp(path, reader, slide_mpp, slide_mpp_override, warn=mpp is None)
        if mpp is not None and mpp_yx is None:
            raise unknown_mpp(path, reader, mpp, slide_mpp)
        self.slide_mpp = None if mpp_yx is None else (mpp_yx[1], mpp_yx[0])
        self._grid = _choose_grid(path, reader, mpp, level, mpp_yx)
        down_y, down_x = reader.levels[self._grid.level].downsample_yx
        self.downsample_xy = (self._grid.step_yx[1] * down_x, self._grid.step_yx[0] * down_y)
        self.mpp = None if mpp_yx is None else math.sqrt(math.prod(mpp_yx) * math.prod(self.downsample_xy))
        bounds = reader.bounds or Window(0, 0, *self.levels[0])
        self.frame = SlideFrame(Affine.scale(*self.downsample_xy), bounds, self.slide_mpp)
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
        self._whole: SlideSource | None = None
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
                inside = inside & self._tissue.read(shared, self.downsample_xy, self._start_xy)
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
            start_xy = (self._start_xy[0] + shared.col * down_x, self._start_xy[1] + shared.row * down_y)
            mask = mask & self._tissue.read(Window(0, 0, height, width), coarse_xy, start_xy)
        mpp = None if self.mpp is None else self.mpp * math.sqrt(math.prod(scale_yx))
        scale = Affine.scale(scale_yx[1], scale_yx[0])
        return GeoImage.from_mask(pixels, mask, None, Affine.translation(shared.col, shared.row) @ scale, mpp)

    def within_bounds(self) -> SlideSource:
        """Return the slide as QuPath shows it, of its bounds only; itself if it has none."""
        if self._reader.bounds is None or self._whole is not None:
            return self
        level = self._reader.levels[self._grid.level]
        cropped = copy.copy(self)
        cropped._whole = self
        cropped._grid = grid_within(self._grid, self._reader.bounds, level)
        cropped.height, cropped.width = cropped._grid.height, cropped._grid.width
        start_y, start_x = (at * down for at, down in zip(cropped._grid.start_yx, level.downsample_yx, strict=True))
        place = Affine.translation(start_x, start_y) @ Affine.scale(*self.downsample_xy)
        cropped.frame = replace(self.frame, to_level0=place)
        return cropped

    @property
    def whole(self) -> SlideSource:
        """The slide with all of level 0, of which `within_bounds` gave a part."""
        return self if self._whole is None else self._whole

    @property
    def _start_xy(self) -> tuple[float, float]:
        """Upper left corner of the source in pixels of level 0."""
        return self.frame.to_level0.c, self.frame.to_level0.f

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
        start_yx = (
            (self._start_xy[1] + window.row * down_yx[0]) / level_yx[0],
            (self._start_xy[0] + window.col * down_yx[1]) / level_yx[1],
        )
        return LevelGrid(index, window.height, window.width, step_yx, start_yx)


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
    assert mpp_yx is not None
    return grid_at(reader.levels, (mpp / mpp_yx[0], mpp / mpp_yx[1]))


def _choose_bands(path: str, reader: PyramidReader, bands: Sequence[int | str] | None) -> tuple[int, ...]:
    names = reader.band_names
    if bands is None:
        return tuple(index for index in range(len(names)) if index != reader.alpha)
    known: dict[int | str, int] = {name: index for index, name in reversed(list(enumerate(names)))}
    known |= {index + 1: index for index in range(len(names))}
    for name in {band for band in bands if isinstance(band, str) and names.count(band) > 1}:
        numbers = " and ".join(str(index + 1) for index, each in enumerate(names) if each == name)
        raise InputError(f"{name!r} is the name of bands {numbers} of {path}; give the number of one of them")
    wrong = [band for band in bands if band not in known]
    if wrong or not bands:
        got = f"got {wrong[0]!r}" if wrong else "got none"
        raise InputError(f"bands of {path} must be numbers from 1 to {len(names)} or of {', '.join(names)}; {got}")
    return tuple(known[band] for band in bands)
