"""One way to open whatever holds pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from perf_vit.errors import InputError
from perf_vit.io._slides import is_slide, open_slide
from perf_vit.io.raster import RasterSource
from perf_vit.types import Source

__all__ = ["open_raster", "open_source"]


def open_source(
    path: str | Path,
    *,
    bands: Sequence[int | str] | None = None,
    nodata: float | None = None,
    mpp: float | None = None,
    level: int | None = None,
    slide_mpp: float | tuple[float, float] | None = None,
    tissue: str | Path | None = None,
    icc: Literal["srgb"] | None = None,
) -> Source:
    """Open a raster that GDAL reads (GeoTIFF, COG, VRT, JPEG 2000, ...; also by URL) or a whole slide.

    Slides are all formats of OpenSlide (SVS, NDPI, MRXS, DICOM, ...), OME-TIFF and OME-Zarr; they need the extra
    `slides`. A TIFF with a georeference is a raster.

    Args:
        path: a file, a folder of OME-Zarr, a URL or a GDAL path.
        bands: 1-based bands to read, in this order, or channel names of a slide; by default all but an alpha band.
        nodata: value of a raster's missing pixels, instead of the one the file declares.
        mpp: micrometres per pixel to read a slide at. A level within 1 % of it is read as it is.
        level: level of a slide to read, instead of `mpp`; by default 0, the finest.
        slide_mpp: micrometres per pixel of a slide's level 0, or (x, y), where the file doesn't say or is wrong.
        tissue: "otsu" to find a slide's tissue by its colour, or a GeoJSON file of polygons in pixels of level 0, as
            QuPath exports them; pixels elsewhere are not valid.
        icc: "srgb" to convert colours with the profile that a slide of OpenSlide brings.

    Raises:
        InputError: the file can't be opened, holds no such band or level, or the options don't fit it.
    """
    path = os.fspath(path)
    options = {"mpp": mpp, "level": level, "slide_mpp": slide_mpp, "tissue": tissue, "icc": icc}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if is_slide(path, asked=bool(given)):
        if nodata is not None:
            raise InputError(f"nodata is for rasters, and {path} is a slide; leave it out")
        return open_slide(path, bands=bands, **given)
    if given:
        names = " and ".join(given)
        raise InputError(f"{names} can't be used with {path}, which is a raster, not a slide; leave it out")
    return open_raster(path, bands=bands, nodata=nodata)


def open_raster(
    path: str | Path, *, bands: Sequence[int | str] | None = None, nodata: float | None = None
) -> RasterSource:
    """Open what GDAL reads as a raster, slide or not.

    Args:
        path: a file, a URL or a GDAL path.
        bands: 1-based bands to read, in this order; by default all but an alpha band.
        nodata: value of missing pixels, instead of the one the file declares.

    Raises:
        InputError: the file can't be opened, holds no such band, or its pixels can't hold the nodata value.
    """
    numbers = None if bands is None else [band for band in bands if isinstance(band, int)]
    if bands is not None and numbers != list(bands):
        raise InputError(f"bands of the raster {os.fspath(path)} must be numbers from 1 on, got {list(bands)}")
    return RasterSource(path, bands=numbers, nodata=nodata)
