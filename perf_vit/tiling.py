"""Windows on a grid and their blending weights, the same in training and prediction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from perf_vit.errors import OptionError, PerfVitError
from perf_vit.registry import Registry
from perf_vit.types import Window

__all__ = [
    "BLENDS",
    "gaussian_weights",
    "grid_windows",
    "hann_weights",
    "random_window",
    "random_window_holding",
    "register_blend",
]


def grid_windows(extent: Window, window_size: int, overlap: int) -> list[Window]:
    """Cover an extent with square windows, in row-major order.

    The last row and column of windows are shifted back to end at the edge of the extent, so they overlap more. Along an
    axis shorter than a window there is a single window, which starts at the extent and reaches past its edge.

    Args:
        extent: Pixels to cover, at least one.
        window_size: Window size in pixels.
        overlap: Overlap of neighbouring windows in pixels, from 0 to window_size - 1.

    Raises:
        PerfVitError: The window size is below 1 or the overlap out of range.
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
    """Draw a square window uniformly from those inside the extent.

    Along an axis shorter than a window, the window starts at the extent.

    Args:
        extent: Pixels to stay inside.
        window_size: Window size in pixels.
        rng: Random number generator.

    Raises:
        PerfVitError: The window size is below 1.
    """
    _check_size(window_size)
    row = extent.row + int(rng.integers(max(1, extent.height - window_size + 1)))
    col = extent.col + int(rng.integers(max(1, extent.width - window_size + 1)))
    return Window(row, col, window_size, window_size)


def random_window_holding(extent: Window, row: int, col: int, window_size: int, rng: np.random.Generator) -> Window:
    """Draw a square window uniformly from those inside the extent that contain a pixel.

    Along an axis shorter than a window, the window starts at the extent.

    Args:
        extent: Pixels to stay inside.
        row: Row of the pixel, inside the extent.
        col: Column of the pixel, inside the extent.
        window_size: Window size in pixels.
        rng: Random number generator.

    Raises:
        PerfVitError: The window size is below 1.
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
        raise PerfVitError(f"window_size must be at least 1 pixel, got {window_size}; 512 suits most models")


# MONAI's default. With a weight of 0, the corners of a scene would have no weight at all.
_MIN_WEIGHT = 1e-3

BLENDS: Registry[Callable[[int], npt.NDArray[np.float32]]] = Registry("blend", OptionError)
"""Blending weights by name: functions (window size) -> positive weights [window_size, window_size]."""

register_blend = BLENDS.register


@register_blend("hann")
def hann_weights(window_size: int) -> npt.NDArray[np.float32]:
    """Return a separable Hann window, sampled at pixel centres and therefore positive everywhere.

    With an overlap of half a window, the weights of all windows over a pixel sum to 1.

    Args:
        window_size: Window size in pixels.

    Returns:
        [window_size, window_size] float32, symmetric, at most 1.
    """
    phase = np.pi * (np.arange(window_size) + 0.5) / window_size
    profile = np.sin(phase) ** 2
    return np.outer(profile, profile).astype(np.float32)


@register_blend("gaussian")
def gaussian_weights(window_size: int) -> npt.NDArray[np.float32]:
    """Return a Gaussian with a standard deviation of an eighth of the window size, clipped to at least 0.001.

    It is the default importance map of MONAI's `sliding_window_inference(mode="gaussian")`.

    Args:
        window_size: Window size in pixels.

    Returns:
        [window_size, window_size] float32, symmetric, at most 1.
    """
    offsets = np.arange(window_size) - (window_size - 1) / 2
    profile = np.exp(-0.5 * (offsets / (0.125 * window_size)) ** 2)
    return np.maximum(np.outer(profile, profile), _MIN_WEIGHT).astype(np.float32)
