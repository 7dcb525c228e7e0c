"""Standardised pixels of which some are invalid: resized from the valid ones alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from perf_vit.types import BoolArray

__all__ = ["divide_by_weight", "resize_masked"]

FloatArray = npt.NDArray[np.float32]

# A hair below one half, for sums of weights in float32.
_LEAST_WEIGHT = 0.4999


def resize_masked(pixels: FloatArray, mask: BoolArray, height: int, width: int) -> tuple[FloatArray, BoolArray]:
    """Resize standardised pixels, bilinear and without aliasing.

    Args:
        pixels: [C, H, W].
        mask: True where a value holds data, [C, H, W], or [1, H, W] for all bands.
        height: of the result.
        width: of the result.

    Returns:
        Pixels and mask of the new size; invalid values are 0, the mean, and have no part in their neighbours.
    """
    if pixels.shape[1:] == (height, width):
        return pixels, mask
    if mask.all():
        return _resized(pixels, height, width), np.ones((1, height, width), bool)
    weight = _resized(mask.astype(np.float32), height, width)
    return divide_by_weight(_resized(np.where(mask, pixels, np.float32(0)), height, width), weight)


def divide_by_weight(sums: FloatArray, weight: FloatArray) -> tuple[FloatArray, BoolArray]:
    """Weighted means of valid values, 0 where less than half of the weight is valid, and where it is more.

    Args:
        sums: interpolated values, in which invalid ones are 0, [C, H, W].
        weight: interpolated mask, [C or 1, H, W].
    """
    held = weight >= _LEAST_WEIGHT
    return np.where(held, sums / np.maximum(weight, _LEAST_WEIGHT), np.float32(0)), held


def _resized(image: FloatArray, height: int, width: int) -> FloatArray:
    batch = torch.from_numpy(np.ascontiguousarray(image))[None]
    resized = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
    return np.asarray(resized.numpy(), np.float32)
