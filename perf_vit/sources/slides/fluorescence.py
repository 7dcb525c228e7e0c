"""Tissue of fluorescence slides, as what is brighter than a dark background in any channel."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from perf_vit.sources.slides.background import Planes, fit_surface, local_spread, lowest_mode, smooth
from perf_vit.sources.slides.morphology import close_gaps, parts_with, without_holes, without_lines, without_small
from perf_vit.types import BoolArray

__all__ = ["find_fluorescent", "is_dark"]

_CLOSING_RADIUS_PX, _LINE_RADIUS_PX = 3, 2

# Local spread of background, as a share of its light and in steps of the file's values.
_SPREAD_SHARE, _SPREAD_STEPS = 0.02, 0.6

# Light above the background: in standard deviations, as a share of the background, in steps; parts reach twice as much.
_SIGMAS, _LIGHT_SHARE, _LIGHT_STEPS = 6.0, 0.04, 0.75

_MIN_PART_PX = 4

# Pixels at a rim have at least this share of the light beside them; less is blur.
_RIM_SHARE, _RIM_PX = 0.4, 5


def is_dark(pixels: npt.NDArray[np.uint8], seen: BoolArray) -> bool:
    """Return whether three colours are those of fluorescence: no glass is bright and most pixels are nearly black.

    Args:
        pixels: Red, green and blue, [3, H, W].
        seen: Scanned pixels that are not padding, [H, W].
    """
    low = pixels.min(0)[seen]
    return len(low) > 0 and bool((low > 150).mean() < 0.02 and np.median(low) < 40)


def find_fluorescent(channels: Iterable[tuple[npt.NDArray[np.generic], BoolArray]]) -> BoolArray:
    """Find tissue.

    Args:
        channels: Each channel [H, W] at about 8 micrometres per pixel, and its valid pixels, [H, W].

    Returns:
        Tissue mask, [H, W].
    """
    lit: BoolArray | None = None
    valid: BoolArray | None = None
    everywhere = False
    for pixels, seen in channels:
        found = _lit(pixels, seen)
        everywhere |= found is None
        valid = seen if valid is None else valid | seen
        if found is not None:
            lit = found if lit is None else lit | found
    assert valid is not None
    if everywhere and (lit is None or not lit.any()):
        return valid
    mask = np.zeros_like(valid) if lit is None else lit
    mask = without_lines(close_gaps(mask, _CLOSING_RADIUS_PX), _LINE_RADIUS_PX)
    return without_holes(without_small(mask)) & valid


def _lit(pixels: npt.NDArray[np.generic], seen: BoolArray) -> BoolArray | None:
    """Return the pixels of a channel above its background; None if it has no background."""
    step = 1.0 if pixels.dtype.kind in "iu" else 0.0
    plane = smooth(np.nan_to_num(pixels.astype(np.float32)), seen)
    background = _background(plane, seen & ~_padding(pixels), step)
    background = _background(plane, seen, step) if background is None else background
    if background is None:
        return None
    level, noise = background
    light = plane - level
    limit = np.maximum(np.maximum(_SIGMAS * noise, _LIGHT_STEPS * step), _LIGHT_SHARE * level)
    weak = (light > limit) & (light > _RIM_SHARE * ndimage.maximum_filter(light, _RIM_PX)) & seen
    return parts_with(close_gaps(weak, 2), light > 2 * limit, _MIN_PART_PX)


def _padding(pixels: npt.NDArray[np.generic]) -> BoolArray:
    """Return areas of zeros, which may be missing tiles."""
    return without_small(ndimage.binary_erosion(pixels == 0, np.ones((3, 3)), border_value=1))


def _background(plane: Planes, seen: BoolArray, step: float) -> tuple[Planes, float] | None:
    """Return the level of the background at each pixel, [H, W], and its noise; None if there is none."""
    if not seen.any():
        return None
    spread = local_spread(plane)
    is_smooth = spread < np.maximum(_SPREAD_SHARE * plane, _SPREAD_STEPS * step)
    offset = max(8 * step, 1e-3 * float(np.percentile(plane[seen], 99.9)), 1e-9)
    # A tenth of the logarithm: a bin of the histogram is a change by an eighth.
    values = np.asarray(0.1 * np.log10(np.maximum(plane, 0) + offset), np.float32)
    level = lowest_mode(values[seen], is_smooth[seen], int(np.count_nonzero(seen)))
    if level is None:
        return None
    chosen = seen & is_smooth & (np.abs(values - level) < 0.015)
    surface, noise = fit_surface(plane[None], chosen, lambda difference: np.abs(difference[0]))
    return surface[0], noise
