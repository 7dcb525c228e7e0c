"""Blending of overlapping windows into finished rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from perf_vit.types import BoolArray, Window

__all__ = ["RowStitcher"]

FloatArray = npt.NDArray[np.float32]


class RowStitcher:
    """Weighted mean of overlapping windows, held for one row of windows at a time.

    The mean is updated window by window, m += (x - m) w / W with W the weight so far, instead of dividing a sum by a
    sum at the end: where all windows agree the result is their value, bit for bit, in float32.

    Memory is [C, window height, scene width], whatever the scene's height. Windows must come in the order of
    `perf_vit.tiling.grid_windows`: row by row, top to bottom.

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
        source, held = inside.slices_in(window), inside.slices_in(self._held)
        weight = weights[source]
        total = self._weight[held] + weight
        mean = self._mean[:, *held]
        mean += (scores[:, *source] - mean) * (weight / total)
        self._weight[held] = total
        self._valid[held] |= valid[source]

    def advance(self, row: int) -> tuple[FloatArray, BoolArray]:
        """Take out the rows above `row`, which no later window reaches.

        Args:
            row: first row of the next row of windows, or the extent's end.

        Returns:
            Scores [C, rows, width], 0 where no window was added, and where the source has data, [rows, width].
        """
        count = row - self._held.row
        finished = self._mean[:, :count].copy(), self._valid[:count].copy()
        for buffer in (self._mean, self._weight[None], self._valid[None]):
            kept = self._held.height - count
            buffer[:, :kept] = buffer[:, count:].copy()
            buffer[:, kept:] = 0
        self._held = Window(row, self._held.col, *self._held.shape)
        return finished
