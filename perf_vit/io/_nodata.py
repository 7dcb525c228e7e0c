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

__all__ = ["fits", "holds_data", "is_finite", "is_nodata_by_band", "mask_bands", "nodata_values"]


def holds_data(pixels: npt.NDArray[Any], nodata: Sequence[float | None]) -> BoolArray:
    """True where a value is finite and not nodata.

    Args:
        pixels: [C, H, W].
        nodata: one value a band, None where a band has none.

    Returns:
        [C, H, W], or [1, H, W] where all bands are alike.
    """
    mask = np.ones((1, *pixels.shape[1:]), bool)
    if any(value is not None for value in nodata):
        # NaN differs from itself, so it is no nodata here and not finite below.
        missing = np.stack(
            [
                np.zeros(band.shape, bool) if value is None else band == band.dtype.type(value)
                for band, value in zip(pixels, nodata, strict=True)
            ]
        )
        mask = ~(missing if is_nodata_by_band(nodata, pixels.dtype) else np.asarray(missing.all(0, keepdims=True)))
    return mask & is_finite(pixels) if pixels.dtype.kind == "f" else mask


def is_finite(pixels: npt.NDArray[Any]) -> BoolArray:
    """True where a value is a number that float32, the networks' dtype, can hold."""
    return np.isfinite(pixels) if pixels.dtype.itemsize <= 4 else np.abs(pixels) <= np.finfo(np.float32).max


def is_nodata_by_band(nodata: Sequence[float | None], dtype: np.dtype[Any]) -> bool:
    """Whether a nodata value means a missing value in its band alone, or only where all bands hold theirs.

    0, and any value of 8-bit pixels, may be data, too: the red of a dark green pixel, the blue of a yellow one.
    """
    return dtype.itemsize > 1 and any(value not in (None, 0) for value in nodata)


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
    # Of all bands at each access, which takes minutes for thousands.
    nodata = dataset.nodatavals
    declared = [nodata[band - 1] for band in bands]
    # Files often declare what their pixels can't hold, -9999 in bytes: then no pixel is missing.
    return tuple(value if value is not None and fits(value, dtype) else None for value in declared)


def fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether pixels of a dtype can hold a value."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return not math.isfinite(value) or bool(np.isfinite(dtype.type(value)))
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def mask_bands(dataset: Any, bands: Sequence[int]) -> tuple[int, ...]:
    """Bands whose mask band, inside the file or beside it, is to be read: none, one for all, or each."""
    derived = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    # As above.
    of_all = dataset.mask_flag_enums
    flags = [set(of_all[band - 1]) for band in bands]
    masked = [each for each in flags if not derived & each]
    if not masked:
        return ()
    return (bands[0],) if all(MaskFlags.per_dataset in each for each in masked) else tuple(bands)
