"""Tissue of stained slides: what differs in colour from the glass, or in saturation by Otsu's threshold."""

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

__all__ = ["find_stained", "find_tissue", "otsu_threshold"]

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


_OTSU_CLOSING_RADIUS_PX = 3

# Lower saturation is glass, whatever the histogram; darker pixels are pen marks, folds or the slide's rim, whose
# saturation is noise.
_MIN_SATURATION, _MIN_VALUE = 0.05, 0.1


def find_tissue(pixels: npt.NDArray[np.uint8], valid: BoolArray) -> BoolArray:
    """Detect tissue by HSV saturation above Otsu's threshold, with gaps closed and small spots and holes removed.

    Strokes of pens are left out, and so do not raise the threshold.

    Args:
        pixels: Red, green and blue, [3, H, W], at about 8 micrometres per pixel.
        valid: Scanned pixels, [H, W].

    Returns:
        Tissue mask, [H, W].
    """
    density = optical_density(pixels, valid)
    density -= fit_glass(density, valid).density
    ink = find_ink(density, valid)
    high, low = pixels.max(0).astype(np.float32), pixels.min(0)
    saturation = (high - low) / np.maximum(high, 1)
    lit = valid & (high >= _MIN_VALUE * 255) & ~ink
    counts = np.bincount((saturation[lit] * 255).astype(np.int64), minlength=256)
    threshold = max(_MIN_SATURATION, (otsu_threshold(counts) + 1) / 255)
    mask = lit & (saturation >= threshold)
    return without_holes(without_small(close_gaps(mask, _OTSU_CLOSING_RADIUS_PX))) & valid & ~ink


def otsu_threshold(counts: npt.NDArray[np.int64]) -> int:
    """Return the last bin of the lower class, which maximises the between-class variance (Otsu 1979, eq. 18).

    Args:
        counts: Histogram counts, [num_bins].
    """
    bins = np.arange(len(counts))
    weight = np.cumsum(counts)
    moment = np.cumsum(counts * bins, dtype=np.float64)
    rest = weight[-1] - weight
    between = (moment * weight[-1] - moment[-1] * weight) ** 2 / np.maximum(weight * rest.astype(np.float64), 1)
    return int(np.argmax(between))
