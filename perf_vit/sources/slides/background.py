"""Slowly changing background of a slide: its level, its surface and its noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from perf_vit.types import BoolArray

__all__ = ["Planes", "fit_surface", "local_spread", "lowest_mode", "smooth"]

Planes = npt.NDArray[np.float32]

_SPREAD_PX = 7

# Less of a slide may be holes, bubbles and reflections.
_MIN_SHARE, _MIN_PX = 0.002, 64

_BIN = 0.005

# One pixel in each block of this size takes part in a fit.
_STEP_PX = 4


def smooth(plane: Planes, seen: BoolArray) -> Planes:
    """Smooth by one pixel; unseen pixels do not count."""
    if seen.all():
        return _gauss(plane)
    weight = np.maximum(_gauss(seen.astype(np.float32)), np.float32(1e-3))
    return np.asarray(_gauss(np.where(seen, plane, np.float32(0))) / weight, np.float32)


def _gauss(plane: Planes) -> Planes:
    return np.asarray(ndimage.gaussian_filter(plane, 1.0, truncate=2.0), np.float32)


def local_spread(plane: Planes, size_px: int = _SPREAD_PX) -> Planes:
    """Return the standard deviation in a square around each pixel."""
    mean = ndimage.uniform_filter(plane, size_px)
    return np.asarray(np.sqrt(np.maximum(ndimage.uniform_filter(plane * plane, size_px) - mean * mean, 0)), np.float32)


def lowest_mode(values: Planes, is_smooth: BoolArray, num_seen: int) -> float | None:
    """Return the lowest value that enough pixels have, most of them smooth; None if there is none.

    Args:
        values: Logarithms of the light of candidates, [N], as densities or densities turned round.
        is_smooth: Whether there is no texture around each, [N].
        num_seen: Number of pixels of the whole slide.
    """
    if len(values) == 0:
        return None
    low = float(values.min())
    bins = ((values - low) / _BIN).astype(np.int64)
    counts = _heaps(bins, 0)
    smooth_counts = _heaps(bins[is_smooth], len(counts))
    enough = smooth_counts >= max(_MIN_SHARE * num_seen, 0.05 * smooth_counts.max(), _MIN_PX)
    found = np.flatnonzero(enough & (smooth_counts > 0.5 * counts))
    if len(found) == 0:
        return None
    best = int(found[0])
    while best + 1 < len(counts) and smooth_counts[best + 1] > smooth_counts[best]:
        best += 1
    return low + (best + 0.5) * _BIN


def _heaps(bins: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Count pixels in windows of five bins."""
    counts = np.bincount(bins, minlength=max(length, 5))
    return np.convolve(counts, np.ones(5, np.int64), "same")


def fit_surface(planes: Planes, chosen: BoolArray, measure: Callable[[Planes], Planes]) -> tuple[Planes, float]:
    """Fit a surface of second order to each plane at chosen pixels; outliers are left out twice.

    Args:
        planes: Values, [C, H, W].
        chosen: Pixels of the background, [H, W].
        measure: Makes distances [N] of differences [C, N].

    Returns:
        Surfaces [C, H, W], within the range of the chosen values, and the standard deviation of the distances.
    """
    height, width = chosen.shape
    step = _STEP_PX if np.count_nonzero(chosen) > 4096 else 1
    rows, cols = np.nonzero(chosen[::step, ::step])
    values = planes[:, ::step, ::step][:, rows, cols].astype(np.float64)
    terms = _terms(rows * step / height, cols * step / width)
    kept = np.ones(len(rows), bool)
    for _ in range(3):
        factors = np.linalg.lstsq(terms[kept], values[:, kept].T, rcond=1e-3)[0]
        distance = measure((values.T - terms @ factors).T.astype(np.float32))
        noise = 1.4826 * float(np.median(distance[kept]))
        kept = distance <= max(4 * noise, float(np.quantile(distance, 0.5)))
    low, high = np.percentile(values[:, kept], [1, 99], axis=1)
    whole = np.empty(planes.shape, np.float32)
    for index, each in enumerate(factors.T):
        whole[index] = _evaluate(each, height, width).clip(low[index], high[index])
    return whole, noise


def _terms(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    y, x = y - 0.5, x - 0.5
    return np.stack([np.ones_like(y), y, x, y * y, x * y, x * x], axis=-1)


def _evaluate(factors: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float64]:
    y, x = (np.arange(height) / height - 0.5)[:, None], (np.arange(width) / width - 0.5)[None]
    c, by, bx, byy, bxy, bxx = factors
    return np.asarray(c + by * y + bx * x + byy * y * y + bxy * x * y + bxx * x * x)
