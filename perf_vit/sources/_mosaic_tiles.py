"""The files of a mosaic: where each lies, and its pixels on the mosaic's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.enums import Resampling

from perf_vit.errors import InputError
from perf_vit.sources._bands import BandLayout, PixelOptions, holds_data, is_finite
from perf_vit.sources._gdal import crs_name, open_dataset, read_window
from perf_vit.sources._grid import Grid
from perf_vit.sources._warp import open_warped, suggested_grid
from perf_vit.types import BoolArray, Window

__all__ = ["OpenTile", "Tile", "describe_tile", "open_tile"]

_MARGIN_PX = 2


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One file of a mosaic.

    Attributes:
        layout: its bands.
        placed: its own grid where that is north-up or south-up in the target CRS, else the grid that GDAL suggests
            for it there.
        native: whether `placed` is its own grid.
        gcps: whether only ground control points say where it lies.
        overviews: reduction of each of its overviews.
    """

    layout: BandLayout
    placed: Grid
    native: bool
    gcps: bool
    overviews: tuple[int, ...]

    @property
    def path(self) -> str:
        """Of the file."""
        return self.layout.path

    def footprint_in(self, grid: Grid) -> Window:
        """Pixels of a grid in the target CRS that the tile can reach."""
        around = grid.window_of(self.placed.bounds)
        if self.native and self.placed.window_in(grid):
            return around
        size = around.height + 2 * _MARGIN_PX, around.width + 2 * _MARGIN_PX
        return Window(around.row - _MARGIN_PX, around.col - _MARGIN_PX, *size)


class OpenTile:
    """A file opened to be read on a grid; `open_tile` makes one.

    Args:
        dataset: whose pixels are the grid's, shifted.
        layout: of the file.
        place: of the dataset's pixels on the grid.
        warped: whether the dataset is one of `open_warped`, not the file as it is.
    """

    def __init__(self, dataset: Any, layout: BandLayout, place: Window, *, warped: bool) -> None:
        self._dataset = dataset
        self._layout = layout
        self._extent = place
        self._warped = warped

    def read(self, window: Window) -> tuple[Window, npt.NDArray[Any], BoolArray] | None:
        """The part of a window of the grid that the tile covers: which part, pixels [C, h, w], and which hold data.

        Raises:
            InputError: the file is damaged there.
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
            # Where there is a mask, GDAL warps by that alone.
            mask = mask & holds_data(pixels, layout.raw_nodata)
        return shared, *layout.finish(pixels, mask)

    def close(self) -> None:
        """Close the file."""
        self._dataset.close()


def describe_tile(path: str, options: PixelOptions, crs: CRS | None) -> Tile:
    """Read a file's header.

    Args:
        path: of the file.
        options: what the user says about its pixels.
        crs: of the mosaic; None for the file's own.

    Raises:
        InputError: the file can't be read or placed, or the options don't fit it.
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
    """Open a file to be read on a grid.

    Args:
        tile: the file.
        grid: in the CRS of `tile.placed`.
        resampling: where the tile's pixels are not the grid's.
        reduction: how many times larger the grid's pixels are than the tile's, to read from an overview.

    Raises:
        InputError: the file can't be read.
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
