"""Weights that let overlapping windows fade into each other."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from perf_vit.errors import PerfVitError

__all__ = ["Blend", "blend_weights", "gaussian_weights", "hann_weights"]

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
