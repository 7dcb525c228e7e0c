"""Clean-up of tissue masks: gaps, specks, holes and thin lines."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from perf_vit.types import BoolArray

__all__ = ["MIN_AREA_PX", "close_gaps", "dilate", "parts_with", "without_holes", "without_lines", "without_small"]

# 0.01 mm2 at 8 um/px: larger than dust and pen dots, smaller than the smallest biopsies.
MIN_AREA_PX = 156


def disk(radius_px: int) -> BoolArray:
    """Return a disk, [2 * radius_px + 1, 2 * radius_px + 1]."""
    y, x = np.ogrid[-radius_px : radius_px + 1, -radius_px : radius_px + 1]
    return np.asarray(x * x + y * y <= radius_px**2)


def dilate(mask: BoolArray, radius_px: int) -> BoolArray:
    """Grow a mask by a distance; the outside is empty."""
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius_px) if mask.any() else mask


def close_gaps(mask: BoolArray, radius_px: int) -> BoolArray:
    """Close gaps up to twice the radius wide."""
    # Padding keeps the closing from eroding tissue at the edge.
    padded = np.pad(mask, radius_px, mode="edge")
    inner = slice(radius_px, -radius_px)
    return np.asarray(ndimage.binary_closing(padded, disk(radius_px))[inner, inner])


def without_small(mask: BoolArray, min_area_px: int = MIN_AREA_PX) -> BoolArray:
    """Remove parts below an area."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= min_area_px
    large[0] = False
    return np.asarray(large[labels])


def without_holes(mask: BoolArray, max_area_px: int = MIN_AREA_PX) -> BoolArray:
    """Fill holes below an area."""
    return ~without_small(~mask, max_area_px)


def without_lines(mask: BoolArray, radius_px: int) -> BoolArray:
    """Remove what is thinner than twice the radius, except at the rim of thicker parts."""
    padded = np.pad(mask, radius_px, mode="edge")
    inner = slice(radius_px, -radius_px)
    thick = ndimage.binary_opening(padded, disk(radius_px))[inner, inner]
    return mask & dilate(np.asarray(thick), 2 * radius_px)


def parts_with(mask: BoolArray, core: BoolArray, min_core_px: int) -> BoolArray:
    """Return the parts of a mask that hold enough pixels of a core."""
    labels, num = ndimage.label(mask)
    kept = np.bincount(labels[mask & core], minlength=num + 1) >= min_core_px
    kept[0] = False
    return np.asarray(kept[labels])
