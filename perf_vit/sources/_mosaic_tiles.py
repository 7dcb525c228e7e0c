"""Files of a mosaic, warped to its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy.typing as npt
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as warp_points

from perf_vit.errors import InputError
from perf_vit.sources._bands import BandLayout, PixelOptions, holds_data, is_finite
from perf_vit.sources._gdal import GDAL_ERRORS, crs_name, open_dataset, read_window, reason_of
from perf_vit.sources._grid import Grid
from perf_vit.types import BoolArray, Window

__all__ = ["OpenTile", "Tile", "describe_tile", "open_tile", "open_warped", "suggested_grid"]


def suggested_grid(dataset: Any, path: str, crs: CRS) -> Grid:
    """Return the north-up grid that GDAL suggests for a raster in a CRS, from its transform (rotated or not) or GCPs.

    Raises:
        InputError: The raster can't be transformed to that CRS.
    """
    try:
        with WarpedVRT(dataset, crs=crs) as warped:
            return Grid(crs, warped.transform, warped.height, warped.width)
    except GDAL_ERRORS as error:
        raise InputError(f"can't warp {path} to {crs_name(crs)}: {reason_of(error)}") from error


def open_warped(layout: BandLayout, grid: Grid, resampling: Resampling, overview: int | None = None) -> Any:
    """Open a file's bands on a grid as a dataset; its last band is alpha, 0 for missing data.

    rasterio's `WarpedVRT` to a given grid approximates the transformation, by default to an eighth of a pixel,
    separately for each window. For the grid that GDAL suggests it can be exact, so this one is made and its description
    moved.

    Args:
        layout: Bands of the file.
        grid: Target grid.
        resampling: Resampling method.
        overview: Overview level of the file to read from.

    Raises:
        InputError: The file can't be read, or can't be transformed to the grid's CRS.
    """
    with open_dataset(layout.path, overview_level=overview) as dataset:
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
    """Replace the suggested grid by the target grid."""
    # Relative paths refer to the working directory, as the VRT isn't a file.
    _find(root, "SourceDataset").set("relativeToVRT", "0")
    root.set("rasterXSize", str(grid.width))
    root.set("rasterYSize", str(grid.height))
    for tag, transform in (("GeoTransform", grid.transform), ("DstGeoTransform", grid.transform)):
        _find(root, tag).text = _numbers(transform)
    _find(root, "DstInvGeoTransform").text = _numbers(~grid.transform)
    _find(root, "BlockXSize").text = _find(root, "BlockYSize").text = "512"


def _set_bands(root: ElementTree.Element, layout: BandLayout) -> None:
    """Set the bands to warp with their nodata values, and alpha as the last band."""
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
    """Return the value of each band that GDAL leaves out of averages."""
    # GDAL heeds a mask only where no band has a nodata value.
    if layout.mask_bands:
        return (None,) * len(layout.bands)
    if _masks_by_band(layout):
        missing = float("nan") if layout.raw_dtype.kind == "f" else None
        return tuple(missing if value is None else value for value in layout.raw_nodata)
    # A pixel is missing where all bands are; a band without such a value never is.
    return (None,) * len(layout.bands) if None in layout.raw_nodata else layout.raw_nodata


def _masks_by_band(layout: BandLayout) -> bool:
    """Return whether GDAL leaves out nodata values per band, or only pixels that are missing in all bands."""
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
    """Return the pixel width and height of the dataset in grid pixels, at its centre.

    By default GDAL measures them per window, so that interpolation would depend on the window.
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


_MARGIN_PX = 2


@dataclass(frozen=True, kw_only=True)
class Tile:
    """File of a mosaic.

    Attributes:
        layout: Bands of the file.
        placed: Own grid of the file if it is north-up or south-up in the target CRS, else the grid that GDAL suggests.
        native: Whether `placed` is its own grid.
        gcps: Whether only ground control points georeference it.
        overviews: Reduction factor of each overview.
    """

    layout: BandLayout
    placed: Grid
    native: bool
    gcps: bool
    overviews: tuple[int, ...]

    @property
    def path(self) -> str:
        """Path of the file."""
        return self.layout.path

    def footprint_in(self, grid: Grid) -> Window:
        """Return the window of a grid in the target CRS that the tile may cover."""
        around = grid.window_of(self.placed.bounds)
        if self.native and self.placed.window_in(grid):
            return around
        size = around.height + 2 * _MARGIN_PX, around.width + 2 * _MARGIN_PX
        return Window(around.row - _MARGIN_PX, around.col - _MARGIN_PX, *size)


class OpenTile:
    """File opened for reading on a grid, see `open_tile`.

    Args:
        dataset: Dataset with the grid's pixels, shifted.
        layout: Bands of the file.
        place: Window of the grid that the dataset covers.
        warped: Whether the dataset comes from `open_warped`, not directly from the file.
    """

    def __init__(self, dataset: Any, layout: BandLayout, place: Window, *, warped: bool) -> None:
        self._dataset = dataset
        self._layout = layout
        self._extent = place
        self._warped = warped

    def read(self, window: Window) -> tuple[Window, npt.NDArray[Any], BoolArray] | None:
        """Read the part of a window of the grid that the tile covers; return that part, pixels [C, h, w] and mask.

        Raises:
            InputError: The file is damaged there.
        """
        shared = window.intersect(self._extent)
        if shared is None:
            return None
        place = Window(shared.row - self._extent.row, shared.col - self._extent.col, *shared.shape)
        if not self._warped:
            return shared, *self._layout.read(self._dataset, place, place.shape)
        layout = self._layout
        raw = read_window(self._dataset, layout.path, place)
        pixels, mask = raw[:-1], raw[-1:] > 0
        if pixels.dtype.kind == "f":
            mask = mask & is_finite(pixels)
        if layout.nodata_by_band or layout.mask_bands:
            # GDAL ignores nodata while warping if there is a mask.
            mask = mask & holds_data(pixels, layout.raw_nodata)
        return shared, *layout.finish(pixels, mask)

    def close(self) -> None:
        """Close the file."""
        self._dataset.close()


def describe_tile(path: str, options: PixelOptions, crs: CRS | None) -> Tile:
    """Read a file's header.

    Args:
        path: Path of the file.
        options: Options for its pixels.
        crs: CRS of the mosaic; None for the file's own.

    Raises:
        InputError: The file can't be read or placed, or an option doesn't fit.
    """
    with open_dataset(path) as dataset:
        layout = BandLayout.of(dataset, path, options)
        gcps, gcp_crs = dataset.gcps
        by_gcps = bool(gcps) and dataset.crs is None
        own_crs = gcp_crs if by_gcps else dataset.crs
        _check_placed(dataset, path, own_crs, by_gcps)
        transform = dataset.transform
        native = not by_gcps and crs in (None, own_crs) and transform.b == 0 == transform.d
        grid = Grid(own_crs, transform, dataset.height, dataset.width) if native else None
        return Tile(
            layout=layout,
            placed=grid or suggested_grid(dataset, path, crs or own_crs),
            native=native,
            gcps=by_gcps,
            overviews=tuple(dataset.overviews(1)),
        )


def open_tile(tile: Tile, grid: Grid, resampling: Resampling, reduction: float = 1) -> OpenTile:
    """Open a file for reading on a grid.

    Args:
        tile: Tile of the file.
        grid: Grid in the CRS of `tile.placed`.
        resampling: Resampling if the tile isn't aligned with the grid.
        reduction: Ratio of the grid's pixel size to the tile's, to read from an overview.

    Raises:
        InputError: The file can't be read.
    """
    shift = tile.placed.window_in(grid) if tile.native else None
    if shift is not None:
        return OpenTile(open_dataset(tile.path), tile.layout, shift, warped=False)
    levels = [level for level, factor in enumerate(tile.overviews) if factor <= reduction]
    dataset = open_warped(tile.layout, grid, resampling, levels[-1] if levels else None)
    return OpenTile(dataset, tile.layout, grid.extent, warped=True)


def _check_placed(dataset: Any, path: str, crs: CRS | None, by_gcps: bool) -> None:
    if crs is None:
        raise InputError(
            f"{path} has no CRS, so it has no place in a mosaic and can't be warped; assign one with "
            f"rio edit-info --crs EPSG:CODE {path}"
        )
    if dataset.transform.is_identity and not by_gcps:
        raise InputError(
            f"{path} has a CRS ({crs_name(crs)}) but no transform, so it has no place in a mosaic and can't be warped; "
            f"assign one with rio edit-info --transform"
        )
