"""Tissue of stained slides by Otsu's threshold on the saturation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from perf_vit.sources.slides.glass import fit_glass, optical_density
from perf_vit.sources.slides.ink import find_ink
from perf_vit.sources.slides.morphology import close_gaps, without_holes, without_small
from perf_vit.types import BoolArray

__all__ = ["find_tissue", "otsu_threshold"]

_CLOSING_RADIUS_PX = 3

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
    return without_holes(without_small(close_gaps(mask, _CLOSING_RADIUS_PX))) & valid & ~ink


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
