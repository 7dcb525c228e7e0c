"""The file of a Cloud-Optimised GeoTIFF, put together from blocks that are compressed already."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import rasterio

from perf_vit.errors import DataWarning, OutputError
from perf_vit.sources._gdal import crs_name
from perf_vit.writers.blocks import NUMBERS, TILE_OFFSETS, TILE_SIZES, Tag, block_options, read_tags
from perf_vit.writers.layout import RasterLayout
from perf_vit.writers.pyramid import Level, Pyramid

__all__ = ["write_cog_file"]

# What GDAL looks for at the beginning of a file: https://gdal.org/en/stable/drivers/raster/cog.html
_STRUCTURE = (
    b"LAYOUT=IFDS_BEFORE_DATA\n"
    b"BLOCK_ORDER=ROW_MAJOR\n"
    b"BLOCK_LEADER=SIZE_AS_UINT4\n"
    b"BLOCK_TRAILER=LAST_4_BYTES_REPEATED\n"
    b"KNOWN_INCOMPATIBLE_EDITION=NO\n "
)
_GHOST = b"GDAL_STRUCTURAL_METADATA_SIZE=%06d bytes\n" % len(_STRUCTURE) + _STRUCTURE

_SHORT, _LONG, _LONG8 = 3, 4, 16
_SUBFILE_TYPE, _WIDTH, _HEIGHT = 254, 256, 257
_REDUCED_IMAGE = 1

# Tags of the raster that its overviews don't repeat: description, metadata, and the place on the ground.
_ONLY_OF_RASTER = {270, 33550, 33922, 34264, 34735, 34736, 34737, 42112}

# 32-bit offsets reach so far.
_MOST_BYTES = (1 << 32) - 1

_BYTES_AT_ONCE = 1 << 22


def write_cog_file(made: Path, layout: RasterLayout, pyramid: Pyramid, path: Path) -> None:
    """Write a Cloud-Optimised GeoTIFF, and read it once to compare checksums of its blocks.

    Directories come first, then the blocks of the coarsest overview, and those of the raster last.

    Args:
        made: File to write.
        layout: Layout of the raster with all metadata.
        pyramid: Blocks of all rows.
        path: Name of the output, for errors.

    Raises:
        OSError: The disk is full.
        OutputError: The file holds other bytes than were written.
    """
    pyramid.finish()
    levels = pyramid.levels
    tags = _tags(layout, path)
    # Offsets of 64 bits hold any place: this header can be made before the file's size is known, and is the longer one.
    start = len(_header(tags, levels, big=True, start=0))
    big = start + sum(level.num_bytes for level in levels) > _MOST_BYTES
    if not big:
        start = len(_header(tags, levels, big=False, start=0))
    with made.open("wb") as file:
        file.write(_header(tags, levels, big=big, start=start))
        for level in reversed(levels):
            level.file.seek(0)
            while part := level.file.read(_BYTES_AT_ONCE):
                file.write(part)
    _verify(made, start, levels, path)


def _verify(made: Path, start: int, levels: Sequence[Level], path: Path) -> None:
    with made.open("rb") as file:
        file.seek(start)
        for level in reversed(levels):
            checksum, num_left = 0, level.num_bytes
            while num_left and (part := file.read(min(num_left, _BYTES_AT_ONCE))):
                checksum, num_left = zlib.crc32(part, checksum), num_left - len(part)
            if num_left or checksum != level.checksum:
                raise OutputError(f"can't write {path}: blocks differ on disk; is the disk full?")


def _tags(layout: RasterLayout, path: Path) -> dict[int, Tag]:
    """Tags of the raster, as GDAL writes them; warns of a CRS that these can't hold."""
    with rasterio.MemoryFile(ext=".tif") as memory:
        layout.create(memory.name, {**block_options(layout), "sparse_ok": True}).close()
        written = bytes(memory.getbuffer())
    # GDAL keeps a CRS that has no GeoTIFF keys in a file next to the raster.
    with rasterio.MemoryFile(written, ext=".tif") as memory, memory.open() as dataset:
        is_lost = layout.crs is not None and dataset.crs is None
    if is_lost:
        warnings.warn(
            f"GeoTIFF can't hold the CRS of {path} ({crs_name(layout.crs)}), which has none; assign that of the input "
            "where the map is read, or read the input in another CRS",
            DataWarning,
            stacklevel=2,
        )
    return read_tags(memoryview(written))


def _header(tags: dict[int, Tag], levels: Sequence[Level], *, big: bool, start: int) -> bytes:
    """All that precedes the blocks, which begin at `start`."""
    offsets: list[Tag] = []
    for level in reversed(levels):
        offsets.insert(0, _number_tag(level.offsets(start), _LONG8 if big else _LONG))
        start += level.num_bytes
    begin = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else struct.pack("<2sHI", b"II", 42, 0)
    header = bytearray(begin + _GHOST + b"\0" * (-len(_GHOST) % 2))
    pointer = len(begin) - (8 if big else 4)
    for level, places in zip(levels, offsets, strict=True):
        _set_pointer(header, pointer, len(header), big)
        entries = {**tags, TILE_OFFSETS: places, TILE_SIZES: _number_tag(level.sizes, _LONG)}
        if level is not levels[0]:
            entries = {number: tag for number, tag in entries.items() if number not in _ONLY_OF_RASTER}
            entries[_SUBFILE_TYPE] = _number_tag([_REDUCED_IMAGE], _LONG)
            entries |= {_WIDTH: _number_tag([level.width], _LONG), _HEIGHT: _number_tag([level.height], _LONG)}
        pointer = _append_directory(header, entries, big)
    return bytes(header)


def _append_directory(header: bytearray, tags: dict[int, Tag], big: bool) -> int:
    """Append a directory and its values, and return where the place of the next directory belongs."""
    count, entry, inline = ("<Q", "<HHQ", 8) if big else ("<H", "<HHI", 4)
    entry_bytes = struct.calcsize(entry) + inline
    place = len(header) + struct.calcsize(count)
    pointer = place + entry_bytes * len(tags)
    header += struct.pack(count, len(tags)) + bytes(pointer - place + inline)
    places = {number: place + entry_bytes * index for index, number in enumerate(sorted(tags))}
    # Places and sizes of many blocks are long: metadata come before them, near the beginning of the file.
    for number in sorted(tags, key=lambda number: (number in (TILE_OFFSETS, TILE_SIZES), number)):
        tag, place = tags[number], places[number]
        value = tag.value
        if len(value) > inline:
            header += b"\0" * (len(header) % 2)
            value = len(header).to_bytes(inline, "little")
            header += tag.value
        header[place : place + entry_bytes] = struct.pack(entry, number, tag.type, tag.num) + value.ljust(inline, b"\0")
    header += b"\0" * (len(header) % 2)
    return pointer


def _set_pointer(header: bytearray, place: int, value: int, big: bool) -> None:
    size = 8 if big else 4
    header[place : place + size] = value.to_bytes(size, "little")


def _number_tag(numbers: Iterable[int], kind: int) -> Tag:
    values = np.fromiter(numbers, NUMBERS[kind])
    return Tag(kind, len(values), values.tobytes())
