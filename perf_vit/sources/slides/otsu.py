"""Tissue of stained slides by Otsu's threshold on the saturation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from perf_vit.types import BoolArray

__all__ = ["find_tissue", "otsu_threshold"]

_CLOSING_RADIUS_PX = 3

# 0.01 mm2 at 8 um/px: larger than dust and pen dots, smaller than the smallest biopsies.
_MIN_AREA_PX = 156

# Lower saturation is glass, whatever the histogram; darker pixels are pen marks, folds or the slide's rim, whose
# saturation is noise.
_MIN_SATURATION, _MIN_VALUE = 0.05, 0.1


def find_tissue(pixels: npt.NDArray[np.uint8], valid: BoolArray) -> BoolArray:
    """Detect tissue by HSV saturation above Otsu's threshold, with gaps closed and small spots and holes removed.

    Args:
        pixels: Red, green and blue, [3, H, W], at about 8 micrometres per pixel.
        valid: Scanned pixels, [H, W].

    Returns:
        Tissue mask, [H, W].
    """
    high, low = pixels.max(0).astype(np.float32), pixels.min(0)
    saturation = (high - low) / np.maximum(high, 1)
    lit = valid & (high >= _MIN_VALUE * 255)
    counts = np.bincount((saturation[lit] * 255).astype(np.int64), minlength=256)
    threshold = max(_MIN_SATURATION, (otsu_threshold(counts) + 1) / 255)
    mask = lit & (saturation >= threshold)
    y, x = np.ogrid[-_CLOSING_RADIUS_PX : _CLOSING_RADIUS_PX + 1, -_CLOSING_RADIUS_PX : _CLOSING_RADIUS_PX + 1]
    disk = x * x + y * y <= _CLOSING_RADIUS_PX**2
    # Padding keeps the closing from eroding tissue at the edge.
    padded = np.pad(mask, _CLOSING_RADIUS_PX, mode="edge")
    inner = slice(_CLOSING_RADIUS_PX, -_CLOSING_RADIUS_PX)
    closed = ndimage.binary_closing(padded, disk)[inner, inner]
    return ~_without_small(~_without_small(closed)) & valid


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


def _without_small(mask: BoolArray) -> BoolArray:
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= _MIN_AREA_PX
    large[0] = False
    return np.asarray(large[labels])
