"""Which pixels hold data: nodata values, NaN and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import MaskFlags

from perf_vit.errors import InputError
from perf_vit.types import BoolArray

__all__ = ["fits", "has_mask", "holds_data", "nodata_values"]


def holds_data(pixels: npt.NDArray[Any], nodata: Sequence[float | None]) -> BoolArray:
    """False where all bands hold their nodata value, and where a band is not finite.

    Args:
        pixels: [C, H, W].
        nodata: one value a band, None where a band has none.

    Returns:
        [H, W].
    """
    valid = np.zeros(pixels.shape[1:], bool)
    for band, value in zip(pixels, nodata, strict=True):
        # NaN differs from itself, so it passes here and is caught below.
        valid |= True if value is None else band != band.dtype.type(value)
    if pixels.dtype.kind == "f":
        for band in pixels:
            valid &= np.isfinite(band)
    return valid


def nodata_values(
    dataset: Any, path: str, bands: Sequence[int], dtype: np.dtype[Any], given: float | None
) -> tuple[float | None, ...]:
    """The nodata value of each band: the one given, or what the file declares and its pixels can hold.

    Raises:
        InputError: the pixels can't hold the value given.
    """
    if given is not None:
        if not fits(given, dtype):
            raise InputError(f"nodata of {path} must be a value of its {dtype} pixels, got {given}")
        return (given,) * len(bands)
    declared = [dataset.nodatavals[band - 1] for band in bands]
    # Files often declare what their pixels can't hold, -9999 in bytes: then no pixel is missing.
    return tuple(value if value is not None and fits(value, dtype) else None for value in declared)


def fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether pixels of a dtype can hold a value."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return not math.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def has_mask(dataset: Any, band: int) -> bool:
    """Whether there is a mask band, inside the file or beside it."""
    derived = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    return not derived & set(dataset.mask_flag_enums[band - 1])
