"""Strips on disk become a Cloud-Optimised GeoTIFF."""

from __future__ import annotations

import zlib
from pathlib import Path

import rasterio
import rasterio.shutil

from perf_vit.errors import OutputError
from perf_vit.io._gdal import GDAL_ERRORS, bounded_cache, plain_images_allowed, reason_of
from perf_vit.io.layout import RasterLayout
from perf_vit.io.strips import StripStore

__all__ = ["write_cog"]

_BLOCK_PX = 512


def write_cog(store: StripStore, layout: RasterLayout, made: Path, path: Path) -> None:
    """Write all strips of a store into a COG with overviews, and read it once to be sure of it.

    The same strips make the same bytes.

    Args:
        store: holds every row.
        layout: of the raster.
        made: the file to write.
        path: its name in errors.

    Raises:
        OutputError: rows are missing, or the disk is full.
    """
    mosaic = store.mosaic()
    try:
        with bounded_cache(), plain_images_allowed():
            rasterio.shutil.copy(
                mosaic,
                made,
                driver="COG",
                compress="deflate",
                # Differences of neighbours compress measurements; of class indices they only make more symbols.
                predictor="no" if layout.colormap else "yes",
                blocksize=_BLOCK_PX,
                bigtiff="if_safer",
                overview_resampling=layout.overviews or ("nearest" if layout.colormap else "average"),
                num_threads="all_cpus",
            )
            _compare(store, layout, made, path)
    except GDAL_ERRORS as error:
        raise OutputError(f"can't write {path}: {reason_of(error)}; is the disk full?") from error


def _compare(store: StripStore, layout: RasterLayout, made: Path, path: Path) -> None:
    """GDAL tells nobody of errors at closing, such as a disk that is full by then: read the file and see."""
    with rasterio.open(made, num_threads="all_cpus") as dataset:
        for strip in store.strips():
            block = dataset.read(window=rasterio.windows.Window(0, strip.row, layout.width, strip.num_rows))
            if zlib.crc32(block) != strip.checksum:
                raise OutputError(f"can't write {path}: rows from {strip.row} on differ on disk; is the disk full?")
