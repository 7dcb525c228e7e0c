"""Levels of a pyramid read on another grid, such that a pixel never depends on the window it is read in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from perf_vit.io._pyramid import LevelGrid, PyramidReader
from perf_vit.types import BoolArray, Window

__all__ = ["read_grid"]

# Pixels of a level held at once, before a window is cut in two.
_MAX_PIXELS = 1 << 24


def read_grid(
    reader: PyramidReader, grid: LevelGrid, window: Window, bands: Sequence[int]
) -> tuple[npt.NDArray[Any], BoolArray]:
    """Read a window of a grid over a pyramid's level.

    Reduction and enlargement use a triangle filter, as wide as two grid pixels or two level pixels, whichever are
    larger: anti-aliased in the first case, bilinear in the second. Weights come from a pixel's place in the whole grid
    and are summed in a fixed order, so windows meet without a seam, bit for bit. Invalid values have no part in their
    neighbours; a band of a grid pixel is valid where at least half of the weight is.

    Args:
        reader: the pyramid.
        grid: what to read.
        window: inside the grid.
        bands: indices of the bands to read, from 0.

    Returns:
        Pixels [C, h, w] in the reader's dtype, and which hold data, [C, h, w] or [1, h, w].
    """
    if grid.is_level:
        return _read_bands(reader, grid.level, window, bands)
    level = reader.levels[grid.level]
    rows = _Taps(grid.start_yx[0], grid.step_yx[0], level.height, window.row, window.row_stop)
    cols = _Taps(grid.start_yx[1], grid.step_yx[1], level.width, window.col, window.col_stop)
    if rows.span * cols.span > _MAX_PIXELS and max(window.shape) > 1:
        return _read_halves(reader, grid, window, bands)
    place = Window(rows.first, cols.first, rows.span, cols.span)
    return _filtered(*_read_bands(reader, grid.level, place, bands), rows, cols, reader.fill)


def _read_bands(
    reader: PyramidReader, level: int, window: Window, bands: Sequence[int]
) -> tuple[npt.NDArray[Any], BoolArray]:
    pixels, mask = reader.read(level, window)
    mask = mask if len(mask) == 1 else mask[list(bands)]
    # A band that is read as data masks nothing.
    if reader.alpha is not None and reader.alpha not in bands:
        mask = mask & (pixels[reader.alpha] > 0)
    return pixels[list(bands)], mask


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
        # At the far edge, a centre may lie a part of a pixel outside a level whose length was rounded down.
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
        """[out, span]; scipy multiplies it row by row, each row's entries in order."""
        shape = (len(self._ends) - 1, self.span)
        return csr_array((self._weights.astype(dtype), self._columns, self._ends), shape=shape)


def _filtered(
    pixels: npt.NDArray[Any], mask: BoolArray, rows: _Taps, cols: _Taps, fill: int
) -> tuple[npt.NDArray[Any], BoolArray]:
    # 24 bits of mantissa hold 16-bit pixels.
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
