"""Glass of a stained slide: its colour, which changes slowly over the slide, and its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from perf_vit.sources.slides.background import Planes, fit_surface, local_spread, lowest_mode, smooth
from perf_vit.types import BoolArray

__all__ = ["Glass", "chroma", "find_padding", "fit_glass", "optical_density", "stain_of"]

# Glass transmits at least half of the light and is nearly neutral: differences of optical densities.
_MAX_DENSITY, _MAX_CHROMA = 0.3, 0.05

# Spread of densities in 7 x 7 pixels: that of glass is mostly below, that of pale tissue above.
_MAX_SPREAD = 0.003

_MIN_PADDING_PX = 256


def optical_density(pixels: npt.NDArray[np.uint8], seen: BoolArray) -> Planes:
    """Return optical densities of slightly smoothed pixels, [3, H, W]; unseen pixels do not count."""
    planes = np.stack([smooth(band.astype(np.float32), seen) for band in pixels])
    return np.asarray(-np.log10(np.maximum(planes, 1) / 255), np.float32)


def chroma(density: Planes) -> Planes:
    """Return the two differences of optical densities that do not change with brightness, [2, ...]."""
    red, green, blue = density
    return np.stack([(red - green) / np.float32(np.sqrt(2)), (red + green - 2 * blue) / np.float32(np.sqrt(6))])


def stain_of(density: Planes) -> Planes:
    """Return how far densities are from grey, [...]."""
    return np.asarray(np.hypot(*chroma(density)))


def find_padding(pixels: npt.NDArray[np.uint8], seen: BoolArray) -> BoolArray:
    """Find black and white areas of one value, which writers and stitching add and no scanner sees.

    Args:
        pixels: Red, green and blue, [3, H, W].
        seen: Scanned pixels, [H, W].
    """
    low, high = pixels.min(0), pixels.max(0)
    still = ((high <= 8) | (low >= 247)) & seen
    for shift in (1, -1):
        for axis in (0, 1):
            still &= (pixels == np.roll(pixels, shift, axis + 1)).all(0) | _edge(still.shape, shift, axis)
    labels, num = ndimage.label(still)
    large = np.bincount(labels.ravel(), minlength=num + 1) >= _MIN_PADDING_PX
    large[0] = False
    return np.asarray(large[labels])


def _edge(shape: tuple[int, ...], shift: int, axis: int) -> BoolArray:
    """The row or column whose neighbour lies outside."""
    lines = np.arange(shape[axis]) == (0 if shift > 0 else shape[axis] - 1)
    return lines[:, None] if axis == 0 else lines[None]


@dataclass(frozen=True, slots=True)
class Glass:
    """Glass of a slide.

    Attributes:
        density: Optical densities of the glass at each pixel, [3, H, W].
        noise: Standard deviation of the chroma of glass.
        spread: Median of the local spread of glass.
        is_seen: Whether the slide has glass; if not, densities are those of its brightest pixels.
    """

    density: Planes
    noise: float
    spread: float
    is_seen: bool


def fit_glass(density: Planes, seen: BoolArray) -> Glass:
    """Model the glass of a slide: bright, nearly neutral, and without texture.

    Args:
        density: Optical densities, [3, H, W].
        seen: Scanned pixels that are not padding, [H, W].
    """
    mean = density.mean(0)
    plain = seen & (mean < _MAX_DENSITY) & (stain_of(density) < _MAX_CHROMA)
    spread = local_spread(mean)
    level = lowest_mode(mean[plain], spread[plain] < _MAX_SPREAD, int(np.count_nonzero(seen)))
    if level is None:
        bright = np.percentile(density[:, seen], 0.5, axis=1) if seen.any() else np.zeros(3)
        whole = np.broadcast_to(bright.astype(np.float32)[:, None, None], density.shape)
        return Glass(whole, 0.0, 0.0, is_seen=False)
    chosen = plain & (np.abs(mean - level) < 0.03) & (spread < 2 * _MAX_SPREAD)
    fitted, noise = fit_surface(density, chosen, stain_of)
    return Glass(fitted, noise, float(np.median(spread[chosen])), is_seen=True)
