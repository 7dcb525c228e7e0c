"""Compressed blocks of a tiled TIFF, encoded by GDAL in memory, and the tags of TIFF directories."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine

from perf_vit.writers.layout import BLOCK_PX, RasterLayout

__all__ = [
    "NUMBERS",
    "TILE_OFFSETS",
    "TILE_SIZES",
    "Tag",
    "block_options",
    "encode_blocks",
    "parts_to_encode",
    "read_tags",
]

TILE_OFFSETS, TILE_SIZES = 324, 325
"""Tags of the blocks' places and numbers of bytes."""

NUMBERS = {3: "<u2", 4: "<u4", 16: "<u8"}
"""NumPy's name of each type of unsigned integers."""

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}

# Several threads encode, and GDAL holds a copy of what each of them encodes.
_BYTES_AT_ONCE = 1 << 22


class Tag(NamedTuple):
    """Entry of a TIFF directory.

    Attributes:
        type: Number of the value's type in the TIFF specification.
        num: Number of values.
        value: Values, little-endian.
    """

    type: int
    num: int
    value: bytes


def block_options(layout: RasterLayout) -> dict[str, Any]:
    """Return GDAL's creation options for a TIFF whose blocks are those of a map of a layout."""
    measures = layout.resampling == "average"
    return {
        "tiled": True,
        "blockxsize": BLOCK_PX,
        "blockysize": BLOCK_PX,
        "interleave": "pixel",
        "compress": "deflate",
        # Measurements are noise in their last digits: higher levels take up to twice the time for at most 5 %.
        "zlevel": 1 if measures else 6,
        # The predictor compresses measurements; for class indices it only adds symbols.
        "predictor": (3 if layout.dtype.kind == "f" else 2) if measures else 1,
        "bigtiff": "NO",
        "endianness": "LITTLE",
    }


def parts_to_encode(pixels: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Cut rows of blocks, [C, h, w], into parts of few blocks."""
    step = max(1, _BYTES_AT_ONCE // (pixels.shape[0] * BLOCK_PX**2 * pixels.itemsize)) * BLOCK_PX
    return [pixels[:, :, col : col + step] for col in range(0, pixels.shape[2], step)]


def encode_blocks(pixels: npt.NDArray[Any], layout: RasterLayout) -> list[bytes]:
    """Encode a row of blocks.

    Args:
        pixels: Pixels [C, h, w], of at most as many rows as a block has.
        layout: Layout of the map.

    Returns:
        Blocks from left to right.

    Raises:
        OSError: GDAL failed to encode a block.
    """
    count, height, width = pixels.shape
    shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with rasterio.MemoryFile() as memory:
        # A dummy transform avoids rasterio's warning.
        place = Affine(1, 0, 1, 0, -1, 1)
        with memory.open(driver="GTiff", transform=place, **shape, **block_options(layout)) as file:
            file.write(pixels)
        content = memory.getbuffer()
        tags = read_tags(content)
        offsets, sizes = (_numbers(tags[tag]) for tag in (TILE_OFFSETS, TILE_SIZES))
        # GDAL reports no errors at closing.
        if min(sizes) == 0 or max(np.add(offsets, sizes)) > len(content):
            raise OSError("blocks are missing from memory")
        return [bytes(content[offset : offset + size]) for offset, size in zip(offsets, sizes, strict=True)]


def read_tags(content: Any) -> dict[int, Tag]:
    """Read the first directory of a little-endian TIFF (not BigTIFF).

    Args:
        content: Buffer of bytes.
    """
    (start,) = struct.unpack_from("<I", content, 4)
    (num_tags,) = struct.unpack_from("<H", content, start)
    tags = {}
    for entry in range(start + 2, start + 2 + 12 * num_tags, 12):
        number, kind, count, place = struct.unpack_from("<HHII", content, entry)
        size = _TYPE_BYTES[kind] * count
        first = entry + 8 if size <= 4 else place
        tags[number] = Tag(kind, count, bytes(content[first : first + size]))
    return tags


def _numbers(tag: Tag) -> list[int]:
    return [int(number) for number in np.frombuffer(tag.value, NUMBERS[tag.type])]
