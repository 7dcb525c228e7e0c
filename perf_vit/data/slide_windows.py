"""The windows of a slide that show tissue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError
from perf_vit.tiling import grid_windows
from perf_vit.types import BoolArray, Source, Window

__all__ = ["tissue_windows"]

# Pixels of the reduced mask along a window's side: shares to about a percent.
_MASK_PX = 8
_MAX_MASK_PX = 8192


def tissue_windows(source: Source, tile_px: int, min_tissue: float) -> list[Window]:
    """The windows of a grid without overlap of which at least some share is valid, row by row.

    The shares are those of the valid mask at low resolution: about 8 pixels along a window.

    Args:
        source: a slide opened with `tissue`, so that only tissue is valid; or any other source.
        tile_px: side of a window, in pixels.
        min_tissue: least share of valid pixels, 0 to 1; a window without any is never taken.

    Raises:
        InputError: no window is valid enough, or the slide can't be read.
    """
    windows = grid_windows(source.extent, tile_px, overlap=0)
    size_px = min(_MAX_MASK_PX, -(-max(source.size) * _MASK_PX // tile_px))
    mask = source.read_reduced(size_px).valid
    shares = _shares(mask, windows, source.height, source.width)
    chosen = [window for window, share in zip(windows, shares, strict=True) if share > 0 and share >= min_tissue]
    if not chosen:
        raise InputError(
            f"no window of {tile_px} px in {source.path} has {min_tissue:.0%} of tissue, the most is "
            f"{max(shares):.0%}; lower data.min_tissue, or leave the slide out"
        )
    return chosen


def _shares(mask: BoolArray, windows: Sequence[Window], height: int, width: int) -> npt.NDArray[np.float64]:
    """Share of valid pixels in each window; what lies outside the source is not valid."""
    rows, cols = mask.shape
    summed = np.zeros((rows + 1, cols + 1))
    summed[1:, 1:] = mask.cumsum(0).cumsum(1)
    edges = np.array([[w.row, w.row_stop, w.col, w.col_stop] for w in windows], np.float64)
    scale = np.array([rows / height, rows / height, cols / width, cols / width])
    limits = np.array([rows, rows, cols, cols])
    top, bottom, left, right = np.clip(np.rint(edges * scale), 0, limits).astype(np.int64).T
    # A window smaller than a pixel of the mask still sees one.
    top, left = np.minimum(top, rows - 1), np.minimum(left, cols - 1)
    bottom, right = np.maximum(bottom, top + 1), np.maximum(right, left + 1)
    valid = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
    inside = np.minimum(edges[:, 1], height) - edges[:, 0], np.minimum(edges[:, 3], width) - edges[:, 2]
    covered = inside[0] * inside[1] / ((edges[:, 1] - edges[:, 0]) * (edges[:, 3] - edges[:, 2]))
    return np.asarray(valid / ((bottom - top) * (right - left)) * covered)
