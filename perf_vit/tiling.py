"""Windows on a grid and their blending weights, the same in training and prediction."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from perf_vit.errors import PerfVitError
from perf_vit.types import Window

__all__ = [
    "Blend",
    "blend_weights",
    "gaussian_weights",
    "grid_windows",
    "hann_weights",
    "random_window",
    "random_window_holding",
]


def grid_windows(extent: Window, window_size: int, overlap: int) -> list[Window]:
    """Cover an extent with square windows, row by row.

    The last row and column of windows are shifted back to end at the extent's edge, so they share more with their
    neighbours than the others do. Along an axis shorter than a window there is one window, which begins at the
    extent's start and reaches past its edge.

    Args:
        extent: the pixels to cover, at least one.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbours share, from 0 to window_size - 1.

    Raises:
        PerfVitError: a window size below 1, or an overlap outside its range.
    """
    _check_size(window_size)
    if not 0 <= overlap < window_size:
        raise PerfVitError(
            f"overlap must lie between 0 and window_size - 1 = {window_size - 1}, got {overlap}; try {window_size // 4}"
        )
    rows = _starts(extent.row, extent.height, window_size, window_size - overlap)
    cols = _starts(extent.col, extent.width, window_size, window_size - overlap)
    return [Window(row, col, window_size, window_size) for row in rows for col in cols]


def random_window(extent: Window, window_size: int, rng: np.random.Generator) -> Window:
    """Draw a square window, every place inside the extent with the same probability.

    Along an axis shorter than a window there is one place: the extent's start.

    Args:
        extent: the pixels to stay inside.
        window_size: side of the window, in pixels.
        rng: decides the place.

    Raises:
        PerfVitError: a window size below 1.
    """
    _check_size(window_size)
    row = extent.row + int(rng.integers(max(1, extent.height - window_size + 1)))
    col = extent.col + int(rng.integers(max(1, extent.width - window_size + 1)))
    return Window(row, col, window_size, window_size)


def random_window_holding(extent: Window, row: int, col: int, window_size: int, rng: np.random.Generator) -> Window:
    """Draw a square window that holds a pixel, every such place inside the extent with the same probability.

    Along an axis shorter than a window there is one place: the extent's start.

    Args:
        extent: the pixels to stay inside.
        row: of the pixel, inside the extent.
        col: of the pixel, inside the extent.
        window_size: side of the window, in pixels.
        rng: decides the place.

    Raises:
        PerfVitError: a window size below 1.
    """
    _check_size(window_size)
    first_row = _start_holding(row, extent.row, extent.height, window_size, rng)
    first_col = _start_holding(col, extent.col, extent.width, window_size, rng)
    return Window(first_row, first_col, window_size, window_size)


def _start_holding(pixel: int, start: int, length: int, size: int, rng: np.random.Generator) -> int:
    last = start + max(0, length - size)
    return int(rng.integers(min(max(start, pixel - size + 1), last), min(pixel, last) + 1))


def _starts(start: int, length: int, size: int, stride: int) -> list[int]:
    last = start + max(0, length - size)
    return [*range(start, last, stride), last]


def _check_size(window_size: int) -> None:
    if window_size < 1:
        raise PerfVitError(f"window_size must be at least 1 pixel, got {window_size}")


Blend = Literal["hann", "gaussian"]


# As small as MONAI's default; a weight of 0 would leave corners of a scene without any.
_MIN_WEIGHT = 1e-3


def blend_weights(blend: Blend, window_size: int) -> npt.NDArray[np.float32]:
    """The weights of a name, [window_size, window_size].

    Raises:
        PerfVitError: neither "hann" nor "gaussian".
    """
    if blend == "hann":
        return hann_weights(window_size)
    if blend == "gaussian":
        return gaussian_weights(window_size)
    raise PerfVitError(f"blend must be hann or gaussian, got {blend}")


def hann_weights(window_size: int) -> npt.NDArray[np.float32]:
    """Separable Hann window, sampled at pixel centres and therefore above 0 everywhere.

    At an overlap of half the window, the weights of all windows over a pixel sum to 1.

    Args:
        window_size: side of a window, in pixels.

    Returns:
        [window_size, window_size] float32, symmetric, at most 1.
    """
    phase = np.pi * (np.arange(window_size) + 0.5) / window_size
    profile = np.sin(phase) ** 2
    return np.outer(profile, profile).astype(np.float32)


def gaussian_weights(window_size: int) -> npt.NDArray[np.float32]:
    """Gaussian around the window's centre with a standard deviation of an eighth of its side, at least .001.

    The same importance map as MONAI's `sliding_window_inference(mode="gaussian")` has by default.

    Args:
        window_size: side of a window, in pixels.

    Returns:
        [window_size, window_size] float32, symmetric, at most 1.
    """
    offsets = np.arange(window_size) - (window_size - 1) / 2
    profile = np.exp(-0.5 * (offsets / (0.125 * window_size)) ** 2)
    return np.maximum(np.outer(profile, profile), _MIN_WEIGHT).astype(np.float32)
