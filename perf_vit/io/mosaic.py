"""Many rasters, of any CRS and resolution, read as one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import shapely
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError

from perf_vit.errors import InputError
from perf_vit.io._gdal import crs_name
from perf_vit.io._grid import Bounds, Grid, GridOptions, target_grid
from perf_vit.io._handles import PerThread, Pool
from perf_vit.io._layout import PixelOptions
from perf_vit.io._tiles import OpenTile, Tile, describe_tile, open_tile
from perf_vit.types import GeoImage, Window

__all__ = ["MosaicSource"]

_MAX_OPEN = 32


class MosaicSource:
    """Rasters on one grid, warped where they lie on another; `open_source` makes one.

    Of tiles that overlap, a pixel comes from the first, in the order of `paths`, that is valid there. A tile whose
    pixels fall on the grid's is read as it is. A window opens only the tiles that it meets, and a thread holds at most
    32 files open.

    It may be pickled, forked and shared between threads: each opens the files for itself.

    Args:
        path: what was given, for messages.
        paths: of the files.
        pixels: what the user says about the files' pixels.
        grid: the grid that the user asks for.
        resampling: of pixels that are not the grid's; "nearest" with a palette and "bilinear" without by default.

    Attributes:
        path: as it was given.
        paths: of the files.
        height: rows.
        width: columns.
        dtype: of the pixels.
        crs: of the grid.
        transform: pixel (column, row) to CRS coordinates.
        nodata: of the first file that has one; None if none has.
        band_names: the first file's.
        colormap: the first file's; None without palette.

    Raises:
        InputError: a file can't be read or placed, or the files don't fit each other.
    """

    mpp: float | None = None

    def __init__(
        self,
        path: str,
        paths: Sequence[str],
        *,
        pixels: PixelOptions | None = None,
        grid: GridOptions | None = None,
        resampling: str | None = None,
    ) -> None:
        self.path = path
        self.paths = tuple(paths)
        tiles, self._grid = _place(self.paths, pixels or PixelOptions(), grid or GridOptions())
        layout = tiles[0].layout
        self.height, self.width = self._grid.height, self._grid.width
        self.crs, self.transform = self._grid.crs, self._grid.transform
        self.dtype, self.band_names, self.colormap = layout.dtype, layout.names, layout.colormap
        self.nodata = next((tile.layout.nodata for tile in tiles if tile.layout.nodata is not None), None)
        self._tiles = tiles
        has_palette = any(tile.layout.colormap or tile.layout.colors is not None for tile in tiles)
        self._resampling = _resampling(resampling or ("nearest" if has_palette else "bilinear"))
        self._tree = shapely.STRtree([_box(tile.footprint_in(self._grid)) for tile in tiles])
        if self._tree.query(_box(self.extent)).size == 0:
            raise InputError(f"bounds {grid and grid.bounds} ({crs_name(self.crs)}) meet no file of {path}")
        self._handles = PerThread(functools.partial(_pool, tiles, self._grid, self._resampling))

    @property
    def num_bands(self) -> int:
        """Bands that `read` gives."""
        return len(self.band_names)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def extent(self) -> Window:
        """The window of all pixels."""
        return self._grid.extent

    @property
    def bounds(self) -> Bounds:
        """(left, bottom, right, top) in CRS units."""
        return self._grid.bounds

    def read(self, window: Window) -> GeoImage:
        """Read a window, which may reach past the edge on any side.

        Args:
            window: rows and columns, in pixels of the grid.

        Returns:
            Pixels [num_bands, height, width]; invalid ones are the nodata value, or 0.

        Raises:
            InputError: a file is damaged there.
        """
        image = self._blank(self._grid.cut(window))
        shared = window.intersect(self.extent)
        for index in self._meeting(shared):
            if not _lay(self._handles.get().get(index), image, window, shared):
                break
        return image

    def read_reduced(self, max_size_px: int, window: Window | None = None) -> GeoImage:
        """Read a window thinned out, or from the files' overviews: for statistics and pictures.

        Args:
            max_size_px: longest side of the result, in pixels; smaller windows are not enlarged.
            window: inside the mosaic, all of it by default.

        Returns:
            Pixels [num_bands, h, w] by nearest neighbour, with the transform of the larger pixels.

        Raises:
            InputError: the window is outside the mosaic, or a file is damaged there.
        """
        shared = (window or self.extent).intersect(self.extent)
        if shared is None:
            raise InputError(f"{window} must meet {self.path}, which is {self.height} rows x {self.width} columns")
        step = max(1.0, max(shared.shape) / max_size_px)
        if step == 1:
            return self.read(shared)
        height, width = (max(1, math.floor(side / step + 0.5)) for side in shared.shape)
        larger = Affine.translation(shared.col, shared.row) @ Affine.scale(shared.width / width, shared.height / height)
        grid = Grid(self.crs, self.transform @ larger, height, width)
        image = self._blank(grid)
        for index in self._meeting(shared):
            tile = self._tiles[index]
            reduction = math.sqrt(math.prod(grid.resolution) / math.prod(tile.placed.resolution))
            opened = open_tile(tile, grid, Resampling.nearest, reduction)
            missing = _lay(opened, image, grid.extent, grid.extent)
            opened.close()
            if not missing:
                break
        return image

    def close(self) -> None:
        """Close this thread's file handles; a later read opens them again."""
        self._handles.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        layout = f"{self.height} x {self.width} px, {self.num_bands} x {self.dtype}, {crs_name(self.crs)}"
        return f"MosaicSource({self.path!r}: {len(self.paths)} files, {layout})"

    def _blank(self, grid: Grid) -> GeoImage:
        shape = grid.height, grid.width
        pixels = np.full((self.num_bands, *shape), self.nodata or 0, self.dtype)
        return GeoImage(pixels, np.zeros(shape, bool), grid.crs, grid.transform)

    def _meeting(self, window: Window | None) -> list[int]:
        """Indices of the tiles that a window meets, the first ones first."""
        return [] if window is None else sorted(self._tree.query(_box(window)).tolist())


def _lay(tile: OpenTile, image: GeoImage, window: Window, inside: Window | None) -> bool:
    """Fill the pixels of an image that are missing so far; whether some still are, of those inside the mosaic."""
    if inside is None:
        return False
    covered = tile.read(inside)
    if covered is not None:
        place, pixels, valid = covered
        rows, cols = place.slices_in(window)
        new = valid & ~image.valid[rows, cols]
        np.copyto(image.pixels[:, rows, cols], pixels, where=new)
        image.valid[rows, cols] |= new
    return not image.valid[inside.slices_in(window)].all()


def _pool(tiles: Sequence[Tile], grid: Grid, resampling: Resampling) -> Pool[OpenTile]:
    return Pool(lambda index: open_tile(tiles[index], grid, resampling), _MAX_OPEN)


def _place(paths: Sequence[str], pixels: PixelOptions, options: GridOptions) -> tuple[list[Tile], Grid]:
    """The tiles, and the grid to read them on."""
    crs = None if options.crs is None else _parse_crs(options.crs)
    tiles = [describe_tile(paths[0], pixels, crs)]
    crs = tiles[0].placed.crs
    for path in paths[1:]:
        tiles.append(describe_tile(path, pixels, crs))
        _check_alike(tiles[0], tiles[-1])
    grid = target_grid([tile.placed for tile in tiles], options, anchored=tiles[0].native)
    return tiles, grid


def _check_alike(first: Tile, other: Tile) -> None:
    """Refuse files whose pixels can't stand beside each other.

    Raises:
        InputError: another number of bands, dtype or palette.
    """
    a, b = first.layout, other.layout
    if a.num_bands != b.num_bands:
        raise InputError(
            f"files of a mosaic need the same bands, but {a.path} has {a.num_bands} and {b.path} has {b.num_bands}; "
            "choose bands that all have with bands="
        )
    if a.dtype != b.dtype:
        raise InputError(
            f"files of a mosaic need the same dtype, but {a.path} holds {a.dtype} and {b.path} holds {b.dtype}; "
            "convert one of them (rio convert --dtype)"
        )
    if a.colormap != b.colormap:
        raise InputError(
            f'files of a mosaic need the same palette, but {a.path} and {b.path} differ; palette="expand" reads colours'
        )


def _parse_crs(crs: Any) -> CRS:
    try:
        return CRS.from_user_input(crs)
    except CRSError as error:
        raise InputError(f"crs must be a code such as EPSG:32637, or WKT or PROJ text, got {crs!r}") from error


def _resampling(name: str) -> Resampling:
    # The rest of rasterio's list is not for warping.
    names = [kind.name for kind in Resampling if kind.name != "gauss"]
    if name not in names:
        raise InputError(f"resampling must be one of {', '.join(names)}, got {name!r}")
    return Resampling[name]


def _box(window: Window) -> Any:
    return shapely.box(window.col, window.row, window.col_stop, window.row_stop)
