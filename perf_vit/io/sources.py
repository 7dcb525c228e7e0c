"""One way to open whatever holds pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perf_vit.io.raster import RasterSource

__all__ = ["open_source"]


def open_source(path: str | Path, *, bands: Sequence[int] | None = None, nodata: float | None = None) -> RasterSource:
    """Open a raster that GDAL reads: GeoTIFF, COG, VRT, JPEG 2000, ..., also by URL.

    Args:
        path: a file, a URL or a GDAL path.
        bands: 1-based bands to read, in this order; by default all but an alpha band.
        nodata: value of missing pixels, instead of the one the file declares.

    Raises:
        InputError: the file can't be opened, holds no such band, or its pixels can't hold the nodata value.
    """
    return RasterSource(path, bands=bands, nodata=nodata)
