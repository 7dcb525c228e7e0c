"""Pyramids of any file format: levels, and the level to read at a pixel size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from perf_vit.sources.slides.frame import inside_bounds
from perf_vit.types import BoolArray, Window

__all__ = [
    "Level",
    "LevelGrid",
    "PyramidReader",
    "finest_enough",
    "grid_at",
    "grid_of_level",
    "grid_within",
    "read_grid",
    "true_downsample",
]

# Scanners give 0.4990 or 0.2527 for nominal 0.5 and 0.25: within this tolerance a level is not resampled.
_SAME_SIZE = 0.01


@dataclass(frozen=True, slots=True)
class Level:
    """Level of a pyramid.

    Attributes:
        height: Number of rows.
        width: Number of columns.
        downsample_yx: Height and width of its pixels, in pixels of level 0.
    """

    height: int
    width: int
    downsample_yx: tuple[float, float] = (1.0, 1.0)


class PyramidReader(ABC):
    """Base class of readers of a file format for `SlideSource`; register subclasses with `register_source`.

    A reader must be picklable.

    Attributes:
        levels: Levels, finest first; level 0 has downsample (1, 1).
        mpp_yx: Micrometres per pixel of level 0 that the file states; None for none.
        objective_power: Magnification of the objective that the file states; None for none.
        dtype: Data type of the pixels.
        band_names: Name of each band.
        alpha: Index of the opacity band, or None; it is read only on request.
        fill: Value of missing pixels.
        bounds: Scanned area in pixels of level 0, outside of which nothing is valid; None for all of it.
        format: Name of the format, such as "aperio".
    """

    levels: tuple[Level, ...]
    mpp_yx: tuple[float, float] | None = None
    objective_power: float | None = None
    dtype: np.dtype[Any]
    band_names: tuple[str, ...]
    alpha: int | None = None
    fill: int = 0
    bounds: Window | None = None
    format: str = "unknown"

    @abstractmethod
    def read(self, level: int, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        """Read pixels [C, h, w] of a window inside the level, and their mask, [C or 1, h, w]; must be thread-safe."""

    def read_bands(self, level: int, window: Window, bands: Sequence[int]) -> tuple[npt.NDArray[Any], BoolArray]:
        """Read some bands, given by index in any order, as `read` does; override it where this takes less."""
        pixels, mask = self.read(level, window)
        return pixels[list(bands)], mask if len(mask) == 1 else mask[list(bands)]

    def bands_per_chunk(self, level: int) -> int:
        """Return the number of adjacent bands, counted from the first, that are decoded together."""
        return len(self.band_names)

    def close(self) -> None:  # noqa: B027
        """Close this thread's handle, if any."""


@dataclass(frozen=True, slots=True)
class LevelGrid:
    """Pixel grid over a level.

    Attributes:
        level: Index of the level to read.
        height: Number of rows of the grid.
        width: Number of columns of the grid.
        step_yx: Height and width of a grid pixel, in pixels of the level.
        start_yx: Upper left corner of the grid, in pixels of the level.
    """

    level: int
    height: int
    width: int
    step_yx: tuple[float, float] = (1.0, 1.0)
    start_yx: tuple[float, float] = (0.0, 0.0)

    def window_of(self, window: Window, level: Level) -> Window | None:
        """Return a window of the grid in pixels of the level, if these are the grid's pixels and the level has them."""
        if self.step_yx != (1.0, 1.0) or not all(start.is_integer() for start in self.start_yx):
            return None
        row, col = window.row + int(self.start_yx[0]), window.col + int(self.start_yx[1])
        found = Window(row, col, window.height, window.width)
        return found if found.intersect(Window(0, 0, level.height, level.width)) == found else None


def true_downsample(full: int, reduced: int) -> float:
    """Return the downsampling factor of a level from its length and that of level 0.

    Writers drop or add partial pixels at the end, so 1001 to 250 is 4, not 4.004; and 60,000 to 235 is 256, not 255, as
    most pyramids halve.
    """
    ratio = full / reduced
    for whole in (2 ** round(math.log2(ratio)), round(ratio)) if not ratio.is_integer() else ():
        if whole >= 1 and abs(reduced - full / whole) < 1:
            return float(whole)
    return ratio


def grid_of_level(levels: Sequence[Level], level: int) -> LevelGrid:
    """Return the grid of the level's own pixels."""
    return LevelGrid(level, levels[level].height, levels[level].width)


def grid_at(levels: Sequence[Level], factor_yx: tuple[float, float]) -> LevelGrid:
    """Return a grid of pixels `factor_yx` times as large as those of level 0, over the best level.

    This is a level with pixels of this size within 1 %, which isn't resampled, else the coarsest one that is at least
    as fine, else level 0, enlarged.
    """
    for index, level in enumerate(levels):
        if all(abs(f / d - 1) <= _SAME_SIZE for f, d in zip(factor_yx, level.downsample_yx, strict=True)):
            return grid_of_level(levels, index)
    index = finest_enough(levels, factor_yx)
    step_y, step_x = (f / d for f, d in zip(factor_yx, levels[index].downsample_yx, strict=True))
    height = max(1, math.floor(levels[0].height / factor_yx[0] + 0.5))
    width = max(1, math.floor(levels[0].width / factor_yx[1] + 0.5))
    return LevelGrid(index, height, width, (step_y, step_x))


def grid_within(grid: LevelGrid, bounds: Window, level: Level) -> LevelGrid:
    """Return the part of a grid over the bounds of a slide, in pixels of level 0.

    The grid's corner is that of the bounds, on a level that isn't resampled the nearest one of its pixels.
    """
    start = [corner / down for corner, down in zip((bounds.row, bounds.col), level.downsample_yx, strict=True)]
    sides = [
        side / (down * step) for side, down, step in zip(bounds.shape, level.downsample_yx, grid.step_yx, strict=True)
    ]
    height, width = (max(1, math.floor(side + 0.5)) for side in sides)
    if grid.step_yx != (1.0, 1.0):
        return replace(grid, height=height, width=width, start_yx=(start[0], start[1]))
    row, col = (math.floor(at + 0.5) for at in start)
    height, width = max(1, min(height, level.height - row)), max(1, min(width, level.width - col))
    return replace(grid, height=height, width=width, start_yx=(float(row), float(col)))


def finest_enough(levels: Sequence[Level], factor_yx: tuple[float, float]) -> int:
    """Return the index of the coarsest level whose pixels are at most `factor_yx` pixels of level 0; 0 for none."""
    fitting = [
        index
        for index, level in enumerate(levels)
        if all(d <= f for d, f in zip(level.downsample_yx, factor_yx, strict=True))
    ]
    return max(fitting, key=lambda index: levels[index].downsample_yx, default=0)


# Maximum number of level pixels held at once; larger windows are cut in two.
_MAX_PIXELS = 1 << 24


def read_grid(
    reader: PyramidReader, grid: LevelGrid, window: Window, bands: Sequence[int]
) -> tuple[npt.NDArray[Any], BoolArray]:
    """Read a window of a grid over a pyramid level.

    Resampling uses a triangle filter with a width of two grid pixels or two level pixels, whichever is larger:
    antialiased when reducing, bilinear when enlarging. Weights depend on the position in the whole grid and are summed
    in a fixed order, so adjacent windows match bit for bit. Invalid values are left out of the average; a band of a
    grid pixel is valid if at least half of the weight is.

    Args:
        reader: Pyramid reader.
        grid: Grid to read.
        window: Window inside the grid.
        bands: 0-based indices of the bands to read.

    Returns:
        Pixels [C, h, w] in the reader's dtype, and their mask, [C, h, w] or [1, h, w].
    """
    level = reader.levels[grid.level]
    if (own := grid.window_of(window, level)) is not None:
        return _read_bands(reader, grid.level, own, bands)
    rows = _Taps(grid.start_yx[0], grid.step_yx[0], level.height, window.row, window.row_stop)
    cols = _Taps(grid.start_yx[1], grid.step_yx[1], level.width, window.col, window.col_stop)
    if rows.span * cols.span > _MAX_PIXELS and max(window.shape) > 1:
        return _read_halves(reader, grid, window, bands)
    place = Window(rows.first, cols.first, rows.span, cols.span)
    return _filtered(*_read_bands(reader, grid.level, place, bands), rows, cols, reader.fill)


def _read_bands(
    reader: PyramidReader, level: int, window: Window, bands: Sequence[int]
) -> tuple[npt.NDArray[Any], BoolArray]:
    # An alpha band that is read as data is not a mask.
    alpha = [] if reader.alpha is None or reader.alpha in bands else [reader.alpha]
    pixels, mask = reader.read_bands(level, window, [*bands, *alpha])
    if alpha:
        pixels, mask = pixels[:-1], (mask if len(mask) == 1 else mask[:-1]) & (pixels[-1] > 0)
    inside = None
    if reader.bounds is not None:
        inside = inside_bounds(reader.bounds, reader.levels[level].downsample_yx, window)
    if inside is not None:
        pixels, mask = np.where(inside, pixels, np.array(reader.fill, pixels.dtype)), mask & inside
    # NaN and the like stay.
    if pixels.dtype.kind != "f" and not mask.all():
        pixels = np.where(mask, pixels, np.array(reader.fill, pixels.dtype))
    return pixels, mask


def _read_halves(
    reader: PyramidReader, grid: LevelGrid, window: Window, bands: Sequence[int]
) -> tuple[npt.NDArray[Any], BoolArray]:
    if window.height >= window.width:
        half = window.height // 2
        parts = [
            Window(window.row, window.col, half, window.width),
            Window(window.row + half, window.col, window.height - half, window.width),
        ]
    else:
        half = window.width // 2
        parts = [
            Window(window.row, window.col, window.height, half),
            Window(window.row, window.col + half, window.height, window.width - half),
        ]
    pixels = np.empty((len(bands), *window.shape), reader.dtype)
    mask = np.empty((len(bands), *window.shape), bool)
    for part in parts:
        rows, cols = part.slices_in(window)
        pixels[:, rows, cols], mask[:, rows, cols] = read_grid(reader, grid, part, bands)
    return pixels, mask


class _Taps:
    """Weights of a level's rows (or columns) in the grid's rows `first_out` to `stop_out`."""

    def __init__(self, start: float, step: float, length: int, first_out: int, stop_out: int) -> None:
        support = max(step, 1.0)
        centers = start + (np.arange(first_out, stop_out) + 0.5) * step
        # At the far edge, a centre may lie slightly outside a level whose length was rounded down.
        centers = np.clip(centers, 0.5, length - 0.5)
        lowest = np.ceil(centers - support - 0.5).astype(np.int64)
        index = lowest[:, None] + np.arange(int(np.floor(2 * support)) + 1)
        weight = 1 - np.abs(index + 0.5 - centers[:, None]) / support
        used = (weight > 0) & (index >= 0) & (index < length)
        self.first = int(index[used].min())
        self.span = int(index[used].max()) + 1 - self.first
        self._columns = index[used] - self.first
        self._weights = weight[used]
        self._ends = np.concatenate([[0], np.cumsum(used.sum(1))])
        self.totals: npt.NDArray[np.float64] = (weight * used).sum(1)

    def matrix(self, dtype: npt.DTypeLike) -> Any:
        """Return the weight matrix, [out, span]; scipy sums each row's entries in order."""
        shape = (len(self._ends) - 1, self.span)
        return csr_array((self._weights.astype(dtype), self._columns, self._ends), shape=shape)


def _filtered(
    pixels: npt.NDArray[Any], mask: BoolArray, rows: _Taps, cols: _Taps, fill: int
) -> tuple[npt.NDArray[Any], BoolArray]:
    # The 24-bit mantissa of float32 holds 16-bit pixels exactly.
    work = np.dtype(np.float32 if pixels.dtype.itemsize <= 2 or pixels.dtype == np.float32 else np.float64)
    num_bands, height, width = pixels.shape
    num_layers = num_bands + len(mask)
    stack = np.empty((height, width, num_layers), work)
    stack[..., :num_bands] = np.where(mask, pixels, 0).transpose(1, 2, 0)
    stack[..., num_bands:] = mask.transpose(1, 2, 0)
    down = rows.matrix(work) @ stack.reshape(height, -1)
    turned = np.ascontiguousarray(down.reshape(-1, width, num_layers).transpose(1, 0, 2))
    out = (cols.matrix(work) @ turned.reshape(width, -1)).reshape(-1, len(down), num_layers).transpose(2, 1, 0)
    weight = out[num_bands:]
    held = weight >= 0.4999 * np.multiply.outer(rows.totals, cols.totals)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(held, out[:num_bands] / weight, fill)
    return _cast(values, pixels.dtype), held


def _cast(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
