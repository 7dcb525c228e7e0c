"""Tissue of stained slides, as what differs in colour from the glass."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from perf_vit.sources.slides.background import Planes, local_spread
from perf_vit.sources.slides.glass import Glass, find_padding, fit_glass, optical_density, stain_of
from perf_vit.sources.slides.ink import find_ink
from perf_vit.sources.slides.morphology import (
    close_gaps,
    dilate,
    parts_with,
    without_holes,
    without_lines,
    without_small,
)
from perf_vit.types import BoolArray

__all__ = ["find_stained"]

_CLOSING_RADIUS_PX, _LINE_RADIUS_PX = 2, 2

# Chroma above that of the glass, in optical density: of tissue with texture, of parts of it, and of tissue without.
# The first follows the noise of glass within limits.
_MIN_STAIN, _MAX_STAIN, _SIGMAS = 0.006, 0.012, 4.0
_PART_STAIN, _PLAIN_STAIN = 0.016, 0.025

_MIN_PART_PX = 4

# Local spread of tissue, and in units of that of the glass.
_MIN_SPREAD, _SPREADS = 0.0035, 3.0

# Stained pixels at a rim have at least this share of the stain beside them; less is blur.
_RIM_SHARE, _RIM_PX = 0.5, 5

# What darkens all colours alike is no stain: glass edges, cracks, bubbles, dust, shadows.
_GREY_SHARE, _GREY_DENSITY = 0.19, 0.06


def find_stained(pixels: npt.NDArray[np.uint8], valid: BoolArray) -> BoolArray:
    """Find tissue.

    Args:
        pixels: Red, green and blue, [3, H, W], at about 8 micrometres per pixel.
        valid: Scanned pixels, [H, W].

    Returns:
        Tissue mask, [H, W].
    """
    seen = valid & ~dilate(find_padding(pixels, valid), 1)
    density = optical_density(pixels, seen)
    glass = fit_glass(density, seen)
    density -= glass.density
    ink = find_ink(density, seen)
    free = seen & ~ink
    stained = _stained(density, glass, free)
    mask = without_holes(without_small(without_lines(close_gaps(stained, _CLOSING_RADIUS_PX), _LINE_RADIUS_PX)))
    return mask & free


def _stained(density: Planes, glass: Glass, free: BoolArray) -> BoolArray:
    stain, mean = stain_of(density), density.mean(0)
    grey = (stain < _GREY_SHARE * mean) & (mean > _GREY_DENSITY)
    if not glass.is_seen:
        return free & ~(grey & (mean > 0.3))
    textured = local_spread(mean) > max(_MIN_SPREAD, _SPREADS * glass.spread)
    limit = min(max(_MIN_STAIN, _SIGMAS * glass.noise), _MAX_STAIN)
    weak = (stain > limit) & (textured | (stain > _PLAIN_STAIN)) & (mean > 0) & ~grey & free
    weak &= stain > _RIM_SHARE * ndimage.maximum_filter(stain, _RIM_PX)
    return parts_with(close_gaps(weak, 1), stain > _PART_STAIN, _MIN_PART_PX)
