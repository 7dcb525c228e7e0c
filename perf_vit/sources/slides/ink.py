"""Ink of pens on stained slides, by the colour of what it absorbs."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from perf_vit.sources.slides.background import Planes, local_spread
from perf_vit.sources.slides.glass import stain_of
from perf_vit.sources.slides.morphology import dilate, parts_with, without_holes
from perf_vit.types import BoolArray

__all__ = ["find_ink"]

# Ink is transparent and even: its relative spread is below that of tissue, whose nuclei and fibres differ.
_MAX_UNEVEN = 0.22

_MIN_CORE_PX = 40

_GREY_SHARE = 0.11

# Colour fades at the border of a stroke.
_MARGIN_PX = 3

_GAP_PX, _HOLE_PX = 9, 600

# What haematoxylin and eosin absorb of red, green and blue (Ruifrok and Johnston 2001).
_HAEMATOXYLIN, _EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)

# Red ink over tissue has at least this share of the density of ink on glass, and more than tissue elsewhere, whose
# colour varies between laboratories.
_OVER_TISSUE, _DEVIATIONS = 0.5, 5.0

_SMOOTH_PX, _STAINED = 5, 0.05


def find_ink(density: Planes, seen: BoolArray) -> BoolArray:
    """Find strokes of blue, violet, green, red and black pens.

    Ruifrok and Johnston (2001) give what haematoxylin, eosin and DAB absorb: none absorbs red clearly more than green,
    as blue and green inks do, and none absorbs green and blue but hardly red, as red ink does. A stroke is a part of
    such a colour, with a core that is dense and even.

    Args:
        density: Optical densities above the glass, [3, H, W].
        seen: Scanned pixels, [H, W].
    """
    red, green, blue = density
    total = np.sqrt((density * density).sum(0))
    even = local_spread(total, 5) < _MAX_UNEVEN * np.maximum(total, 0.05)
    # Each: the colour, down to the faint ends of strokes, and the core.
    blue_or_green = (red > 1.12 * green + 0.03) & (red > 1.5 * blue), (red > 0.4) & even
    violet = (red > 0.9 * green) & (blue < 0.34 * green) & (total > 0.2), (red > 0.5) & even
    # Dry strokes of red are streaks.
    red_core = (red < 0.22 * green) & (blue > 0.66 * green) & (green > 0.4)
    red_ink = (red < 0.26 * green) & (blue > 0.61 * green) & (green > 0.1), red_core
    black = (stain_of(density) < _GREY_SHARE * total) & (total > 0.1), (total > 1.2) & even
    ink = np.zeros(seen.shape, bool)
    for color, core in (blue_or_green, violet, red_ink, black):
        ink |= parts_with(color & seen, core, _MIN_CORE_PX)
    pure = ink & red_core
    if pure.sum() >= _MIN_CORE_PX:
        ink |= parts_with((_red_over_tissue(density, pure, seen) | pure) & seen, pure, _MIN_CORE_PX)
    return _compact(ink) if ink.any() else ink


def _red_over_tissue(density: Planes, pure: BoolArray, seen: BoolArray) -> BoolArray:
    """Find red ink over tissue, which has the colours of tissue, by unmixing it from haematoxylin and eosin.

    The colour of the ink is that of its strokes on glass.
    """
    color = np.median(density[:, pure], axis=1)
    shares = np.linalg.inv(np.stack([_HAEMATOXYLIN, _EOSIN, color], axis=1))[2]
    amount = ndimage.uniform_filter(np.tensordot(shares, density, 1), _SMOOTH_PX)
    tissue = amount[seen & ~pure & (stain_of(density) > _STAINED)]
    middle = np.median(tissue) if tissue.size else 0.0
    spread = 1.48 * np.median(np.abs(tissue - middle)) if tissue.size else 0.0
    return np.asarray(amount > max(_OVER_TISSUE, middle + _DEVIATIONS * spread))


def _compact(ink: BoolArray) -> BoolArray:
    """Fill gaps in strokes, as over dark tissue, and add a margin."""
    wide = dilate(np.pad(ink, _GAP_PX), _GAP_PX)
    closed = ~dilate(~wide, _GAP_PX - _MARGIN_PX)
    inner = slice(_GAP_PX, -_GAP_PX)
    return without_holes(closed[inner, inner], _HOLE_PX)
