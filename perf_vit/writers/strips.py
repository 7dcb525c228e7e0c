"""Rows of an unfinished raster as strips, each a file that is complete or absent."""

from __future__ import annotations

import functools
import os
import re
import uuid
import xml.etree.ElementTree as ET
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from affine import Affine

from perf_vit.errors import OutputError
from perf_vit.sources._gdal import GDAL_ERRORS, plain_images_allowed, reason_of
from perf_vit.writers.layout import RasterLayout

__all__ = ["StoredStrip", "StripStore", "fast_compression"]

_NAME = re.compile(r"rows_(\d+)_(\d+)_([0-9a-f]{8})\.tif")
_BLOCK_PX = 512
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

    Several processes may write to the same folder.

    Args:
        folder: Existing folder.
        layout: Layout of the whole raster.
        path: Name of the output, for errors.

    Attributes:
        folder: Folder as given.
    """

    def __init__(self, folder: Path, layout: RasterLayout, path: Path) -> None:
        self.folder = folder
        self._layout = layout
        self._path = path

    def write(self, row: int, block: npt.NDArray[Any]) -> None:
        """Write a strip of rows.

        Args:
            row: First row of the strip.
            block: Pixels in the layout's dtype, [C, h, width].

        Raises:
            OutputError: The strip has another shape or dtype or exceeds the raster, or the disk is full.
        """
        self._layout.check_rows(row, block, self._path)
        block = np.ascontiguousarray(block)
        name = f"rows_{row:010d}_{block.shape[1]:05d}_{zlib.crc32(block.data):08x}.tif"
        try:
            with rasterio.MemoryFile() as memory:
                self._encode(memory, block)
                self._write_file(name, memory.getbuffer())
        except (*GDAL_ERRORS, OSError) as error:
            raise OutputError(f"can't write {self._path}: {reason_of(error)}; is the disk full?") from error

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

    def mosaic(self, layout: RasterLayout) -> Path:
        """Write a VRT of all strips into the folder, and return its path.

        Args:
            layout: Layout of the raster with all its metadata.

        Raises:
            OutputError: Rows are missing, or the disk is full.
        """
        layout.check_complete(self.gaps(0, layout.height), self._path)
        template, mosaic = self.folder / "template.tif", self.folder / "mosaic.vrt"
        try:
            options = {"sparse_ok": True, "tiled": True, "blockxsize": 512, "blockysize": 512}
            layout.create(str(template), options).close()
            with plain_images_allowed():
                rasterio.shutil.copy(template, mosaic, driver="VRT")
            tree = ET.parse(mosaic)
            for band, element in enumerate(tree.getroot().iter("VRTRasterBand"), 1):
                self._fill(element, band)
            tree.write(mosaic)
        except (*GDAL_ERRORS, OSError, ET.ParseError) as error:
            raise OutputError(f"can't write {self._path}: {reason_of(error)}; is the disk full?") from error
        return mosaic

    def _fill(self, element: ET.Element, band: int) -> None:
        """Set the strips as sources of a VRT band."""
        for source in [child for child in element if child.tag.endswith("Source")]:
            element.remove(source)
        width = str(self._layout.width)
        for strip in self.strips():
            source = ET.SubElement(element, "SimpleSource")
            ET.SubElement(source, "SourceFilename", relativeToVRT="1").text = strip.name
            ET.SubElement(source, "SourceBand").text = str(band)
            rows = str(strip.num_rows)
            ET.SubElement(source, "SrcRect", xOff="0", yOff="0", xSize=width, ySize=rows)
            ET.SubElement(source, "DstRect", xOff="0", yOff=str(strip.row), xSize=width, ySize=rows)

    def _encode(self, memory: Any, block: npt.NDArray[Any]) -> None:
        """Encode as TIFF in memory: unlike GDAL, Python reports errors when a file is closed."""
        num_rows = block.shape[1]
        tile_rows = min(_BLOCK_PX, -(-num_rows // _BLOCK_STEP_PX) * _BLOCK_STEP_PX)
        tiles = {"tiled": True, "blockxsize": _BLOCK_PX, "blockysize": tile_rows}
        # Band interleaving, as pixel interleaving takes longer than compression.
        options = {"interleave": "band", **_compression(block.dtype), **tiles, **self._layout.profile(num_rows)}
        # A dummy transform avoids rasterio's warning; the mosaic has the true one.
        with memory.open(driver="GTiff", transform=Affine(1, 0, 1, 0, -1, 1), **options) as file:
            file.write(block)

    def _write_file(self, name: str, content: Any) -> None:
        unfinished = self.folder / f"{uuid.uuid4().hex}.tmp"
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / name)


def _compression(dtype: np.dtype[Any]) -> dict[str, Any]:
    return {"compress": fast_compression(), "zlevel": 1, "zstd_level": 1, "predictor": 3 if dtype.kind == "f" else 2}


@functools.cache
def fast_compression() -> str:
    """Return the fastest compression that this GDAL supports, zstd or deflate, for temporary files."""
    with rasterio.MemoryFile() as memory, plain_images_allowed():
        try:
            with memory.open(driver="GTiff", height=1, width=1, count=1, dtype="uint8", compress="zstd"):
                return "zstd"
        except GDAL_ERRORS:
            return "deflate"
