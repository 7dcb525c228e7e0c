"""Compressed blocks of a raster and its overviews, each at half the resolution, added from top to bottom."""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.threads import num_processors
from perf_vit.writers.blocks import encode_blocks, parts_to_encode
from perf_vit.writers.layout import BLOCK_PX, RasterLayout
from perf_vit.writers.scratch import empty_array, is_large

__all__ = ["Array", "Level", "Pyramid", "half_average", "half_nearest"]

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


# Blocks of a small map stay in memory.
_BYTES_IN_MEMORY = 1 << 20

# Parts of rows of blocks that wait for each thread, so that none is idle while the next rows are read.
_PARTS_AHEAD = 2

# Most bytes of all these parts; a single one may be larger.
_WAITING_BYTES = 1 << 28


class Level:
    """Compressed blocks of one resolution, row by row, in a temporary file that nobody else sees.

    Each block lies between its size and a copy of its last four bytes, as in a Cloud-Optimised GeoTIFF.

    Args:
        height: Number of rows of pixels.
        width: Number of columns of pixels.
        folder: Existing folder for the file.

    Attributes:
        height: As given.
        width: As given.
        file: Blocks so far.
        sizes: Bytes of each block, without what surrounds it.
        checksum: CRC-32 of the file.
    """

    def __init__(self, height: int, width: int, folder: Path) -> None:
        self.height, self.width = height, width
        self.sizes: list[int] = []
        self.checksum = 0
        self.file = tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY, dir=str(folder))  # noqa: SIM115  (lives as long as this)
        self._folder = folder
        self._rows: list[Array] = []
        self._num_taken = 0
        self._last: Array | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return sum(self.sizes) + 8 * len(self.sizes)

    def offsets(self, start: int) -> Iterator[int]:
        """Yield where each block lies if the file's content begins at `start`."""
        for size in self.sizes:
            yield start + 4
            start += size + 8

    def append(self, block: bytes) -> None:
        """Append a block.

        Raises:
            OSError: The disk is full.
        """
        content = struct.pack("<I", len(block)) + block + block[-4:]
        self.file.write(content)
        self.checksum = zlib.crc32(content, self.checksum)
        self.sizes.append(len(block))

    def take(self, rows: Array) -> tuple[Array, Array | None, int] | None:
        """Take the next rows, and return a row of blocks once it is full: its rows, the row above, and the first."""
        self._rows.append(rows)
        num_rows = sum(part.shape[1] for part in self._rows)
        first, above = self._num_taken, self._last
        if num_rows < min(BLOCK_PX, self.height - first):
            return None
        block = self._rows[0]
        if len(self._rows) > 1:
            shape = (len(block), num_rows, self.width)
            block = np.concatenate(self._rows, axis=1, out=empty_array(shape, block.dtype, self._folder))
        self._rows, self._num_taken, self._last = [], first + num_rows, block[:, -1:].copy()
        return block, above, first


class Pyramid:
    """Compressed blocks of a raster and of its overviews, each of half the resolution of the one before.

    Args:
        layout: Layout of the raster.
        folder: Existing folder for temporary files, which vanish with this object or its process.

    Attributes:
        levels: Resolutions, the raster's own first; the last fits into a block.
        num_rows: Rows added so far.
    """

    def __init__(self, layout: RasterLayout, folder: Path) -> None:
        self._layout, self._folder = layout, folder
        self._pool = ThreadPoolExecutor(num_processors(), thread_name_prefix="perf_vit-compressor")
        self._encoding: deque[tuple[Level, int, Future[list[bytes]]]] = deque()
        self._waiting_bytes = 0
        self.num_rows = 0
        height, width = layout.height, layout.width
        self.levels = [Level(height, width, folder)]
        while max(height, width) > BLOCK_PX:
            height, width = -(-height // 2), -(-width // 2)
            self.levels.append(Level(height, width, folder))

    @property
    def is_complete(self) -> bool:
        """Whether all rows were added."""
        return self.num_rows == self._layout.height

    @property
    def next_rows(self) -> tuple[int, int]:
        """First row to add next, and the first after these."""
        return self.num_rows, min(self.num_rows + BLOCK_PX, self._layout.height)

    def add(self, rows: Array) -> None:
        """Add the rows `next_rows`, [C, h, w].

        Raises:
            OSError: The disk is full.
        """
        self.num_rows += rows.shape[1]
        for level in self.levels:
            taken = level.take(rows)
            if taken is None:
                return
            block, above, first = taken
            self._encode(level, block)
            if level is not self.levels[-1]:
                rows = self._half(block, above, first, (level.height, level.width))

    def close(self) -> None:
        """Remove the temporary files."""
        self._pool.shutdown(cancel_futures=True)
        for level in self.levels:
            level.file.close()

    def finish(self) -> None:
        """Wait for the last blocks.

        Raises:
            OSError: The disk is full.
        """
        while self._encoding:
            self._append_next()

    def _encode(self, level: Level, rows: Array) -> None:
        """Have threads encode a row of blocks, and append the first of those that are on their way."""
        for part in parts_to_encode(rows):
            while self._encoding and not self._has_room(part.nbytes):
                self._append_next()
            # A copy of a part doesn't hold the rest of a large row while the next one is read.
            pixels = np.array(part) if rows.nbytes > _WAITING_BYTES else part
            self._encoding.append((level, part.nbytes, self._pool.submit(encode_blocks, pixels, self._layout)))
            self._waiting_bytes += part.nbytes

    def _has_room(self, num_bytes: int) -> bool:
        """Whether a part may wait too."""
        is_short = len(self._encoding) < _PARTS_AHEAD * num_processors()
        return is_short and self._waiting_bytes + num_bytes <= _WAITING_BYTES

    def _append_next(self) -> None:
        level, num_bytes, blocks = self._encoding.popleft()
        for block in blocks.result():
            level.append(block)
        self._waiting_bytes -= num_bytes

    def _half(self, rows: Array, above: Array | None, first: int, shape: tuple[int, int]) -> Array:
        half: Callable[..., Array] = half_nearest
        if self._layout.resampling == "average":
            half = partial(half_average, nodata=self._layout.nodata)
        if not is_large(rows.shape, rows.dtype):
            return half(rows, above, first, shape)
        halved = empty_array((len(rows), -(-rows.shape[1] // 2), -(-rows.shape[2] // 2)), rows.dtype, self._folder)
        for band in range(len(rows)):
            bands = slice(band, band + 1)
            halved[bands] = half(rows[bands], None if above is None else above[bands], first, shape)
        return halved
