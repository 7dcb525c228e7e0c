"""Weights that let overlapping windows fade into each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["hann_weights"]


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
