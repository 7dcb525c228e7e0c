"""Rows of an unfinished raster as strips, each a file that is complete or absent."""

from __future__ import annotations

import functools
import os
import re
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine

from perf_vit.errors import OutputError
from perf_vit.files import put_in_place
from perf_vit.sources._gdal import GDAL_ERRORS, plain_images_allowed, reason_of
from perf_vit.writers.layout import BLOCK_PX, RasterLayout
from perf_vit.writers.pyramid import Pyramid
from perf_vit.writers.scratch import empty_array

__all__ = ["StoredStrip", "StripStore"]

_NAME = re.compile(r"rows_(\d+)_(\d+)_([0-9a-f]{8})\.tif")
# Rows of wide maps of many bands are compressed once the model's memory is free.
_EARLY_BYTES = 1 << 26
# TIFF tile sizes are multiples of 16.
_BLOCK_STEP_PX = 16


@dataclass(frozen=True, slots=True, order=True)
class StoredStrip:
    """Strip on disk.

    Attributes:
        row: First row.
        num_rows: Number of rows.
        checksum: CRC-32 of the pixels.
        name: File name.
    """

    row: int
    num_rows: int
    checksum: int
    name: str


class StripStore:
    """Folder of full-width strips, written in any order; complete strips survive a crash.

    Whoever has written strips calls `close` at the end, which leaves them where they are.

    Several processes may write to the same folder.

    Args:
        folder: Existing folder.
        layout: Layout of the whole raster; its tags and colours don't matter.
        path: Name of the output, for errors.
        encode_early: Compress the final blocks in a thread as soon as their rows are stored, where this takes little
            memory. Only for the process that finishes the map.

    Attributes:
        folder: Folder as given.
    """

    def __init__(self, folder: Path, layout: RasterLayout, path: Path, *, encode_early: bool = False) -> None:
        self.folder = folder
        self._layout = layout
        self._path = path
        block_row_bytes = layout.num_bands * layout.width * BLOCK_PX * layout.dtype.itemsize
        self._encodes_early = encode_early and block_row_bytes <= _EARLY_BYTES
        self._encoder: ThreadPoolExecutor | None = None
        self._encoding: Future[None] | None = None
        self._pyramid: Pyramid | None = None
        self._is_closed = False

    def write(self, row: int, block: npt.NDArray[Any]) -> None:
        """Write a strip of rows, as several files where it is part of several rows of blocks.

        Args:
            row: First row of the strip.
            block: Pixels in the layout's dtype, [C, h, width].

        Raises:
            OutputError: The strip has another shape or dtype or exceeds the raster, or the disk is full.
        """
        self._layout.check_rows(row, block, self._path)
        with self._refusing():
            for first in range(row - row % BLOCK_PX, row + block.shape[1], BLOCK_PX):
                start = max(first, row)
                self._write(start, block[:, start - row : first + BLOCK_PX - row])
            if self._encodes_early:
                self._encode_later()

    def pyramid(self) -> Pyramid:
        """Return the compressed blocks of all rows; the caller closes it.

        Raises:
            OutputError: A strip has changed on disk, or the disk is full.
        """
        with self._refusing():
            if self._encoder is not None:
                self._encoder.shutdown()
                self._encoder = None
            if self._encoding is not None:
                self._encoding.result()
                self._encoding = None
            self._encode_ready()
            pyramid, self._pyramid = self._pyramid, None
        assert pyramid is not None
        assert pyramid.is_complete
        return pyramid

    def close(self) -> None:
        """Stop compressing, and give up blocks that nobody has asked for."""
        self._is_closed = True
        if self._encoder is not None:
            self._encoder.shutdown(cancel_futures=True)
        if self._pyramid is not None:
            self._pyramid.close()
        self._encoder = self._encoding = self._pyramid = None

    def strips(self) -> list[StoredStrip]:
        """Return the stored strips, from top to bottom."""
        found = ((_NAME.fullmatch(file), file) for file in os.listdir(self.folder))
        return sorted(
            StoredStrip(int(match[1]), int(match[2]), int(match[3], 16), file) for match, file in found if match
        )

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the missing rows of [start, stop) as (first, stop) pairs, from top to bottom."""
        missing = []
        for strip in self.strips():
            if strip.row >= stop:
                break
            if strip.row > start:
                missing.append((start, strip.row))
            start = max(start, strip.row + strip.num_rows)
        return [*missing, (start, stop)] if start < stop else missing

    def _encode_later(self) -> None:
        """Have a thread compress the blocks whose rows are stored."""
        if self._encoding is not None:
            if not self._encoding.done():
                # It looks for further rows itself; those that it misses come with the next strip.
                return
            self._encoding.result()
        if self._encoder is None:
            self._encoder = ThreadPoolExecutor(1, thread_name_prefix="perf_vit-encoder")
        self._encoding = self._encoder.submit(self._encode_ready)

    def _encode_ready(self) -> None:
        """Compress the blocks whose rows are stored, from top to bottom."""
        if self._pyramid is None:
            self._pyramid = Pyramid(self._layout, self.folder)
        while not (self._is_closed or self._pyramid.is_complete or self.gaps(*self._pyramid.next_rows)):
            self._pyramid.add(self._read(*self._pyramid.next_rows))

    def _read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return stored rows [C, stop - start, width].

        Raises:
            OSError: The disk is full.
            OutputError: A strip has changed on disk.
        """
        shape = (self._layout.num_bands, stop - start, self._layout.width)
        rows = empty_array(shape, self._layout.dtype, self.folder)
        for strip in self.strips():
            first, below = max(start, strip.row), min(stop, strip.row + strip.num_rows)
            if first < below:
                self._read_strip(
                    strip, rows[:, first - start : below - start], slice(first - strip.row, below - strip.row)
                )
        return rows

    def _read_strip(self, strip: StoredStrip, into: npt.NDArray[Any], rows: slice) -> None:
        """Read rows of a strip, band by band."""
        checksum = 0
        with rasterio.open(self.folder / strip.name) as file:
            for band in range(self._layout.num_bands):
                pixels = file.read(band + 1)
                checksum = zlib.crc32(pixels, checksum)
                into[band] = pixels[rows]
        if checksum != strip.checksum:
            raise OutputError(f"can't write {self._path}: rows from {strip.row} on differ on disk; is the disk full?")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (*GDAL_ERRORS, OSError) as error:
            raise OutputError(f"can't write {self._path}: {reason_of(error)}; is the disk full?") from error

    def _write(self, row: int, block: npt.NDArray[Any]) -> None:
        block = np.ascontiguousarray(block)
        name = f"rows_{row:010d}_{block.shape[1]:05d}_{zlib.crc32(block.data):08x}.tif"
        with rasterio.MemoryFile() as memory:
            self._encode(memory, block)
            self._write_file(name, memory.getbuffer())

    def _encode(self, memory: Any, block: npt.NDArray[Any]) -> None:
        """Encode as TIFF in memory: unlike GDAL, Python reports errors when a file is closed."""
        num_rows = block.shape[1]
        tile_rows = min(BLOCK_PX, -(-num_rows // _BLOCK_STEP_PX) * _BLOCK_STEP_PX)
        tiles = {"tiled": True, "blockxsize": BLOCK_PX, "blockysize": tile_rows}
        # Band interleaving, as pixel interleaving takes longer than compression.
        options = {"interleave": "band", **_compression(block.dtype), **tiles, **self._layout.profile(num_rows)}
        # A dummy transform avoids rasterio's warning.
        with memory.open(driver="GTiff", transform=Affine(1, 0, 1, 0, -1, 1), **options) as file:
            file.write(block)

    def _write_file(self, name: str, content: Any) -> None:
        unfinished = self.folder / f"{uuid.uuid4().hex}.tmp"
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(unfinished, self.folder / name)


def _compression(dtype: np.dtype[Any]) -> dict[str, Any]:
    return {"compress": _fast_compression(), "zlevel": 1, "zstd_level": 1, "predictor": 3 if dtype.kind == "f" else 2}


@functools.cache
def _fast_compression() -> str:
    """Return the fastest compression that this GDAL supports, zstd or deflate, for temporary files."""
    with rasterio.MemoryFile() as memory, plain_images_allowed():
        try:
            with memory.open(driver="GTiff", height=1, width=1, count=1, dtype="uint8", compress="zstd"):
                return "zstd"
        except GDAL_ERRORS:
            return "deflate"
