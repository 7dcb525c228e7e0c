"""Overviews: rows of a raster at half its resolution, a row of blocks at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "half_average", "half_nearest"]

Array = npt.NDArray[Any]


def half_average(rows: Array, above: Array | None, first: int, shape: tuple[int, int], nodata: float | None) -> Array:
    """Average the valid pixels that each pixel of the overview covers, weighted with the covered share.

    An overview of ceil(n / 2) pixels covers the same ground: where n is odd, one of its pixels covers less than two.

    Args:
        rows: Rows [C, h, w] from an even row on, even in number unless they are the last.
        above: Row [C, 1, w] above them, None at the top.
        first: Index of the first.
        shape: Height and width of the whole raster.
        nodata: Value of missing pixels, which is the result where all are.

    Returns:
        Rows [C, ceil(h / 2), ceil(w / 2)] in the same dtype.
    """
    bands = range(len(rows))
    return np.stack([_half(rows[i], None if above is None else above[i], first, shape, nodata) for i in bands])


def half_nearest(rows: Array, above: Array | None, first: int, shape: tuple[int, int]) -> Array:
    """Take one of the pixels that each pixel of the overview covers; see `half_average`."""
    height, width = shape
    cols = _nearest(0, -(-width // 2), width)
    wanted = _nearest(first // 2, -(-rows.shape[1] // 2), height) - first
    if height % 2 == 0 and width % 2 == 0:
        return np.ascontiguousarray(rows[:, ::2, ::2])
    if wanted[0] < 0:
        assert above is not None
        rows, wanted = np.concatenate([above, rows], axis=1), wanted + 1
    return rows[:, wanted][:, :, cols]


def _nearest(first: int, count: int, length: int) -> npt.NDArray[np.intp]:
    """Index of the pixel that each of some pixels of the overview takes, along an axis of `length` pixels."""
    # As GDAL: the pixel at the left edge, rounded.
    ratio = length / -(-length // 2)
    return np.floor(np.arange(first, first + count) * ratio + 0.5).astype(np.intp)


def _half(rows: Array, above: Array | None, first: int, shape: tuple[int, int], nodata: float | None) -> Array:
    """Average of one band, [h, w]."""
    is_even = shape[0] % 2 == 0 and shape[1] % 2 == 0
    missing = None if nodata is None else _missing(rows, nodata)
    above_missing = None if nodata is None or above is None else _missing(above, nodata)
    if missing is not None and not missing.any() and (above_missing is None or not above_missing.any()):
        missing = None
    if missing is None and is_even and rows.dtype == np.uint8:
        # In integers: a third of the time.
        sums = _pair_sums(_pair_sums(rows.astype(np.uint16), 1, None, 0, shape[1]), 0, None, first, shape[0])
        return _unlike(((sums + 2) >> 2).astype(np.uint8), nodata)
    dtype = np.float32 if rows.dtype.itemsize <= 2 or rows.dtype == np.float32 else np.float64
    total = _sums(rows, above, missing, above_missing, first, shape, dtype)
    if missing is None:
        # Covered pixels in each direction: 2 of an even number.
        total /= np.prod([length / -(-length // 2) for length in shape]).astype(dtype)
        return _unlike(_as(total, rows.dtype), nodata)
    assert nodata is not None
    ones = np.ones(1, dtype)
    share = _sums(
        np.broadcast_to(ones, rows.shape),
        None if above is None else np.broadcast_to(ones, above.shape),
        missing, above_missing, first, shape, dtype,
    )  # fmt: skip
    # Rounded weights of which the true sum is 0.
    found = share > 1e-5
    total /= np.where(found, share, 1)
    return np.where(found, _unlike(_as(total, rows.dtype), nodata), rows.dtype.type(nodata))


def _missing(pixels: Array, nodata: float) -> npt.NDArray[np.bool_]:
    return np.isnan(pixels) if np.isnan(nodata) else pixels == nodata


def _unlike(values: Array, nodata: float | None) -> Array:
    """Averages that aren't missing: the next number where one is the value of missing pixels by chance."""
    if nodata is None or np.isnan(nodata) or not (alike := values == nodata).any():
        return values
    if values.dtype.kind == "f":
        return np.where(alike, np.nextafter(values, values.dtype.type(np.inf)), values)
    step = -1 if nodata == np.iinfo(values.dtype).max else 1
    return np.where(alike, values.dtype.type(nodata + step), values)


def _as(values: Array, dtype: np.dtype[Any]) -> Array:
    return np.floor(values + 0.5).astype(dtype) if dtype.kind in "iu" else values.astype(dtype, copy=False)


def _sums(
    rows: Array,
    above: Array | None,
    missing: Array | None,
    above_missing: Array | None,
    first: int,
    shape: tuple[int, int],
    dtype: type[np.floating[Any]],
) -> Array:
    """Weighted sum of the valid pixels that each pixel of the overview covers."""
    across = [
        None if part is None else _pair_sums(_valid(part, gone, dtype), 1, None, 0, shape[1])
        for part, gone in ((rows, missing), (above, above_missing))
    ]
    assert across[0] is not None
    return _pair_sums(across[0], 0, across[1], first, shape[0])


def _valid(pixels: Array, missing: Array | None, dtype: type[np.floating[Any]]) -> Array:
    return pixels.astype(dtype) if missing is None else np.where(missing, dtype(0), pixels.astype(dtype))


def _pair_sums(pixels: Array, axis: int, before: Array | None, first: int, length: int) -> Array:
    """Weighted sums of the two or three pixels along an axis that each pixel of the overview covers.

    Args:
        pixels: Pixels from an even index on.
        axis: Axis along which to sum.
        before: Pixels before the first, of one index of this axis; None where there are none.
        first: Index of the first.
        length: Number of pixels of the whole raster along the axis.
    """
    lines = np.moveaxis(pixels, axis, 0)
    even, odd = lines[::2], lines[1::2]
    if length % 2 == 0:
        return np.moveaxis(even + odd, 0, axis)
    # Pixel j of m covers from 2j - j/m to 2j + 2 - (j + 1)/m.
    half = (length + 1) // 2
    share = (np.arange(first // 2, first // 2 + len(even)) / half).astype(pixels.dtype).reshape(-1, 1)
    whole = np.asarray((half - 1) / half, pixels.dtype)
    total = even.copy()
    total[: len(odd)] += odd * (whole - share[: len(odd)])
    total[1:] += odd[: len(even) - 1] * share[1:]
    if before is not None:
        total[:1] += before * share[:1]
    return np.moveaxis(total, 0, axis)
