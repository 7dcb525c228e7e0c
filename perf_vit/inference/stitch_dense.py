"""Blending of overlapping windows into finished rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from perf_vit.types import BoolArray, Window

__all__ = ["RowStitcher"]

FloatArray = npt.NDArray[np.float32]

# So few that intermediate results stay in the processor's cache.
_ROWS_AT_ONCE = 32


class RowStitcher:
    """Weighted mean of overlapping windows, held for one row of windows at a time.

    The mean is updated window by window, m += (x - m) w / W with W the weight so far, instead of dividing a sum by a
    sum at the end: where all windows agree the result is their value, bit for bit, in float32.

    Memory is [C, window height, scene width], whatever the scene's height: a ring, in which scene row r lies at
    r modulo the window height. Windows must come in the order of `perf_vit.tiling.grid_windows`: row by row, top to
    bottom.

    Args:
        extent: the rows and columns to fill.
        window_height: of every window.
        num_channels: C.
    """

    def __init__(self, extent: Window, window_height: int, num_channels: int) -> None:
        self._extent = extent
        self._held = Window(extent.row, extent.col, window_height, extent.width)
        self._mean = np.zeros((num_channels, *self._held.shape), np.float32)
        self._weight = np.zeros(self._held.shape, np.float32)
        self._valid = np.zeros(self._held.shape, bool)

    def add(self, window: Window, scores: FloatArray, valid: BoolArray, weights: FloatArray) -> None:
        """Blend in one window of the current row of windows; what reaches past the extent is cut off.

        Args:
            window: where it lies.
            scores: [C, h, w].
            valid: [h, w], where the source has data.
            weights: [h, w], above 0.
        """
        inside = window.intersect(self._extent)
        assert inside is not None
        assert inside.intersect(self._held) == inside, "windows must come row by row"
        _, held_cols = inside.slices_in(self._held)
        for part, held_rows in self._ring_parts(inside, _ROWS_AT_ONCE):
            source, held = part.slices_in(window), (held_rows, held_cols)
            self._valid[held] |= valid[source]
            mean, before, weight = self._mean[:, *held], self._weight[held], weights[source]
            if not before.any():
                # The first window here: the step below would give the same, in four times the time.
                mean[:] = scores[:, *source]
                before[:] = weight
                continue
            total = before + weight
            step = scores[:, *source] - mean
            step *= weight / total
            mean += step
            before[:] = total

    def advance(self, row: int, max_rows: int | None = None) -> Iterator[tuple[Window, FloatArray, BoolArray]]:
        """Take out the rows above `row`, which no later window reaches, in blocks; take all of them.

        Args:
            row: first row of the next row of windows, or the extent's end.
            max_rows: of a block; all rows in one by default.

        Yields:
            Where the block lies, its scores [C, rows, width], 0 where no window was added, and where the source has
            data, [rows, width].
        """
        while self._held.row < row:
            count = min(row - self._held.row, max_rows or self._held.height)
            block = Window(self._held.row, self._extent.col, count, self._extent.width)
            parts = [rows for _, rows in self._ring_parts(block)]
            yield (
                block,
                np.concatenate([self._mean[:, rows] for rows in parts], axis=1),
                np.concatenate([self._valid[rows] for rows in parts]),
            )
            for rows in parts:
                self._mean[:, rows] = 0
                self._weight[rows] = 0
                self._valid[rows] = False
            self._held = Window(block.row_stop, self._held.col, *self._held.shape)

    def _ring_parts(self, window: Window, max_rows: int | None = None) -> Iterator[tuple[Window, slice]]:
        """A window's rows, cut where the ring begins anew: the part, and its rows of the buffers."""
        height = self._held.height
        row = window.row
        while row < window.row_stop:
            start = (row - self._extent.row) % height
            count = min(window.row_stop - row, height - start, max_rows or height)
            yield Window(row, window.col, count, window.width), slice(start, start + count)
            row += count
