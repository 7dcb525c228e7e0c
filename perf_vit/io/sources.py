"""One way to open whatever holds pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from perf_vit.errors import InputError
from perf_vit.io._band_layout import Palette
from perf_vit.io._grid import Bounds
from perf_vit.io._raster_inputs import open_raster
from perf_vit.io._slides import is_slide, open_slide
from perf_vit.io.pixel_size import PixelSize
from perf_vit.io.raster import RasterSource
from perf_vit.io.slide import SlideSource
from perf_vit.types import InputPath

__all__ = ["open_raster", "open_source"]


def open_source(
    path: InputPath,
    *,
    bands: Sequence[int | str] | None = None,
    nodata: float | None = None,
    crs: Any = None,
    resolution: float | tuple[float, float] | PixelSize | None = None,
    bounds: Bounds | None = None,
    resampling: str | None = None,
    palette: Palette | None = None,
    apply_scale: bool | None = None,
    asset: str | None = None,
    mpp: float | None = None,
    level: int | None = None,
    slide_mpp: float | tuple[float, float] | None = None,
    tissue: str | Path | None = None,
    icc: Literal["srgb"] | None = None,
) -> RasterSource | SlideSource:
    """Open a raster that GDAL reads (GeoTIFF, COG, VRT, JPEG 2000, ...; also by URL), many as one, or a whole slide.

    Slides are all formats of OpenSlide (SVS, NDPI, MRXS, DICOM, ...), OME-TIFF and OME-Zarr; they need the extra
    `slides`. A TIFF with a georeference is a raster, and so is a plain TIFF that is opened with options of rasters.

    A folder, a pattern such as "tiles/*.tif", a list of paths and a JSON file of STAC items open as a
    `MosaicSource`: of the files that hold a pixel, the first in order gives it. Files on another grid than the
    mosaic's are warped as they are read, and so is a single raster if `crs`, `resolution` or `bounds` is given.

    Args:
        path: a file, a folder, a pattern, a URL, a GDAL path, or a list of such paths.
        bands: 1-based numbers or names of the bands or channels to read, in this order; by default all but an alpha
            band.
        nodata: value of a raster's missing pixels, instead of the one the file declares.
        crs: to read rasters in, as "EPSG:32637" or whatever rasterio takes; by default the first file's.
        resolution: pixel size in units of the CRS, or (x, y), or a `PixelSize` in any unit; by default the files'
            finest.
        bounds: (left, bottom, right, top) to read, in the CRS, grown to whole pixels; by default around all files.
            Pixels begin at the first file's corner; with `resolution` or another `crs`, at the bounds' left top.
        resampling: of rasters on another grid, as rasterio calls it; by default "nearest" with a palette and
            "bilinear" without.
        palette: "keep", the default, gives the values of a band with a palette, "expand" its colours: red, green and
            blue. Pixels of a transparent colour are not valid then.
        apply_scale: give values times the scale plus the offset that the file declares, as float32, NaN where missing.
        asset: of each STAC item the one to read; by default its only data asset.
        mpp: micrometres per pixel to read a slide at. A level within 1 % of it is read as it is.
        level: level of a slide to read, instead of `mpp`; by default 0, the finest.
        slide_mpp: micrometres per pixel of a slide's level 0, or (x, y), where the file doesn't say or is wrong.
        tissue: "otsu" to find a slide's tissue by its colour, or a GeoJSON file of polygons in pixels of level 0, as
            QuPath exports them; pixels elsewhere are not valid.
        icc: "srgb" to convert colours with the profile that a slide of OpenSlide brings.

    Raises:
        InputError: a file can't be opened or placed, holds no such band or level, or the options don't fit it.
    """
    of_slides = _given(mpp=mpp, level=level, slide_mpp=slide_mpp, tissue=tissue, icc=icc)
    of_rasters = _given(
        nodata=nodata,
        crs=crs,
        resolution=resolution,
        bounds=bounds,
        resampling=resampling,
        palette=palette,
        apply_scale=apply_scale,
        asset=asset,
    )
    source: RasterSource | SlideSource
    asked = True if of_slides else False if of_rasters else None
    if isinstance(path, (str, Path)) and is_slide(os.fspath(path), asked=asked):
        if of_rasters:
            raise InputError(f"{' and '.join(of_rasters)} is for rasters, and {path} is a slide; leave it out")
        source = open_slide(os.fspath(path), bands=bands, **of_slides)
    elif of_slides:
        names = " and ".join(of_slides)
        raise InputError(f"{names} can't be used with {path}, which is a raster, not a slide; leave it out")
    else:
        source = open_raster(path, bands=bands, **of_rasters)
    source.options = _given(bands=bands, **of_slides, **of_rasters)
    source.opened_from = path
    return source


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
