"""Rasters warped to a grid pixel by pixel, so that no pixel depends on the window that it is read in."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as warp_points

from perf_vit.errors import InputError
from perf_vit.sources._bands import BandLayout
from perf_vit.sources._gdal import GDAL_ERRORS, crs_name, open_dataset, reason_of
from perf_vit.sources._grid import Grid

__all__ = ["open_warped", "suggested_grid"]


def suggested_grid(dataset: Any, path: str, crs: CRS) -> Grid:
    """The north-up grid that GDAL makes for an open raster in a CRS, from its transform, rotated or not, or its GCPs.

    Raises:
        InputError: the raster has no place in that CRS.
    """
    try:
        with WarpedVRT(dataset, crs=crs) as warped:
            return Grid(crs, warped.transform, warped.height, warped.width)
    except GDAL_ERRORS as error:
        raise InputError(f"can't warp {path} to {crs_name(crs)}: {reason_of(error)}") from error


def open_warped(layout: BandLayout, grid: Grid, resampling: Resampling, overview: int | None = None) -> Any:
    """A file's bands on a grid, as a dataset; its last band is alpha, 0 where there is no data.

    rasterio's `WarpedVRT` to a chosen grid approximates the transformation, by default to an eighth of a pixel, window
    by window. To the grid that GDAL suggests it can do without; so that one is made and its description moved.

    Args:
        layout: of the file.
        grid: the pixels to make.
        resampling: how.
        overview: level of the file's overviews to read from.

    Raises:
        InputError: the file can't be read, or has no place in the grid's CRS.
    """
    options: dict[str, Any] = {} if overview is None else {"overview_level": overview}
    with open_dataset(layout.path, **options) as dataset:
        try:
            with WarpedVRT(dataset, crs=grid.crs, resampling=resampling, tolerance=0) as warped:
                root = ElementTree.fromstring(warped.tags(ns="xml:VRT")["xml:VRT"])
        except GDAL_ERRORS as error:
            raise InputError(f"can't warp {layout.path} to {crs_name(grid.crs)}: {reason_of(error)}") from error
        scale = _scale(dataset, grid)
    _move(root, grid)
    _set_bands(root, layout)
    by_band = _masks_by_band(layout)
    fill = {"INIT_DEST": "NO_DATA" if by_band else "0", "UNIFIED_SRC_NODATA": "NO" if by_band else "YES"}
    _set_options(root, {**fill, **scale})
    return open_dataset(ElementTree.tostring(root, encoding="unicode"), name=layout.path)


def _move(root: ElementTree.Element, grid: Grid) -> None:
    """Put the grid in the place of the one that GDAL suggests."""
    # Relative paths are relative to the working directory, not to a VRT that has no place.
    _find(root, "SourceDataset").set("relativeToVRT", "0")
    root.set("rasterXSize", str(grid.width))
    root.set("rasterYSize", str(grid.height))
    for tag, transform in (("GeoTransform", grid.transform), ("DstGeoTransform", grid.transform)):
        _find(root, tag).text = _numbers(transform)
    _find(root, "DstInvGeoTransform").text = _numbers(~grid.transform)
    _find(root, "BlockXSize").text = _find(root, "BlockYSize").text = "512"


def _set_bands(root: ElementTree.Element, layout: BandLayout) -> None:
    """Warp the bands that are read, no others, each with its own nodata value, and give alpha as the last."""
    for band in root.findall("VRTRasterBand"):
        root.remove(band)
    kind = {"dataType": _gdal_type(layout.raw_dtype.name)}
    count = len(layout.bands) + 1
    for number in range(1, count + 1):
        band = ElementTree.SubElement(root, "VRTRasterBand", kind, band=str(number), subClass="VRTWarpedRasterBand")
    ElementTree.SubElement(band, "ColorInterp").text = "Alpha"
    options = _find(root, "GDALWarpOptions")
    _find(options, "WorkingDataType").text = kind["dataType"]
    for tag in ("BandList", "SrcAlphaBand", "DstAlphaBand"):
        for element in options.findall(tag):
            options.remove(element)
    bands = ElementTree.SubElement(options, "BandList")
    for number, (band_number, nodata) in enumerate(zip(layout.bands, _warped_nodata(layout), strict=True), 1):
        mapping = ElementTree.SubElement(bands, "BandMapping", src=str(band_number), dst=str(number))
        if nodata is not None:
            for side in ("Src", "Dst") if _masks_by_band(layout) else ("Src",):
                ElementTree.SubElement(mapping, f"{side}NoDataReal").text = repr(float(nodata))
                ElementTree.SubElement(mapping, f"{side}NoDataImag").text = "0"
    if layout.alpha_bands:
        ElementTree.SubElement(options, "SrcAlphaBand").text = str(layout.alpha_bands[-1])
    ElementTree.SubElement(options, "DstAlphaBand").text = str(count)


def _warped_nodata(layout: BandLayout) -> tuple[float | None, ...]:
    """The value of each band that GDAL leaves out of what it averages."""
    # GDAL heeds a mask only where no band has a nodata value.
    if layout.mask_bands:
        return (None,) * len(layout.bands)
    if _masks_by_band(layout):
        missing = float("nan") if layout.raw_dtype.kind == "f" else None
        return tuple(missing if value is None else value for value in layout.raw_nodata)
    # A pixel is missing where all bands are; a band without such a value never is.
    return (None,) * len(layout.bands) if None in layout.raw_nodata else layout.raw_nodata


def _masks_by_band(layout: BandLayout) -> bool:
    """Whether GDAL leaves out values of single bands, or only pixels that are missing in all bands."""
    if layout.mask_bands:
        return False
    has_nan = layout.raw_dtype.kind == "f" and set(layout.raw_nodata) == {None}
    return layout.nodata_by_band or has_nan


def _set_options(root: ElementTree.Element, values: dict[str, str]) -> None:
    options = _find(root, "GDALWarpOptions")
    for element in options.findall("Option"):
        if element.get("name") in values:
            options.remove(element)
    for name, value in values.items():
        ElementTree.SubElement(options, "Option", name=name).text = value


def _scale(dataset: Any, grid: Grid) -> dict[str, str]:
    """Sides of the dataset's pixels in pixels of the grid, in the middle of the dataset.

    GDAL measures them anew for each window, so that what interpolation averages would depend on the window.
    """
    if dataset.crs is None:
        return {}
    col, row = dataset.width / 2, dataset.height / 2
    xs, ys = zip(*(dataset.transform @ point for point in ((col, row), (col + 1, row), (col, row + 1))), strict=True)
    placed = [~grid.transform @ point for point in zip(*warp_points(dataset.crs, grid.crs, xs, ys)[:2], strict=True)]
    x_scale, y_scale = (math.dist(placed[0], point) for point in placed[1:])
    known = math.isfinite(x_scale) and math.isfinite(y_scale) and min(x_scale, y_scale) > 0
    return {"XSCALE": repr(x_scale), "YSCALE": repr(y_scale)} if known else {}


def _find(element: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = element.find(f".//{tag}")
    assert found is not None
    return found


def _numbers(transform: Affine) -> str:
    return ",".join(repr(float(value)) for value in transform.to_gdal())


def _gdal_type(name: str) -> str:
    """GDAL's name of a dtype: UInt16 of uint16."""
    return "Byte" if name == "uint8" else name.replace("u", "U").replace("int", "Int").replace("float", "Float")
