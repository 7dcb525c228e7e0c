"""Mosaics of rasters with any CRS and resolution, and lists of STAC items."""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import shapely
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError

from perf_vit.errors import InputError, parsing
from perf_vit.sources._bands import PixelArray, PixelOptions
from perf_vit.sources._gdal import PerThread, Pool, crs_name
from perf_vit.sources._grid import Grid, GridOptions, check_scale, target_grid
from perf_vit.sources._mosaic_tiles import OpenTile, Tile, describe_tile, open_tile
from perf_vit.sources.pixel_size import PixelSize
from perf_vit.sources.raster import RasterSource
from perf_vit.types import BoolArray, Window

__all__ = ["MosaicSource", "item_paths"]

_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "application/x-hdf", "application/x-netcdf")

_OTHER_ROLES = {"thumbnail", "overview", "metadata"}


def item_paths(path: str, asset: str | None) -> list[str]:
    """Return the raster of each STAC item in a file with an item, a list of items or an ItemCollection.

    Args:
        path: JSON file.
        asset: Name of the asset in each item; None if items have a single data asset.

    Raises:
        InputError: The file has no items, or an item lacks the asset or has several data assets.
    """
    items = _items(path)
    with parsing(path, "STAC items"):
        return [_locate(_choose(item, path, asset)["href"], path) for item in items]


def _items(path: str) -> list[Mapping[str, Any]]:
    with parsing(path, "JSON"), open(path, "rb") as file:
        content = json.load(file)
    if isinstance(content, dict):
        content = content.get("features", [content])
    listed = content if isinstance(content, list) else []
    items: list[Mapping[str, Any]] = [item for item in listed if isinstance(item, dict) and "assets" in item]
    if not items or len(items) != len(listed):
        raise InputError(f"{path} must hold STAC items, each with assets: an ItemCollection, a list or one item")
    return items


def _choose(item: Mapping[str, Any], path: str, asset: str | None) -> Mapping[str, Any]:
    assets, name = item["assets"], item.get("id", "without id")
    if asset is not None:
        if asset in assets:
            return assets[asset]
        near = difflib.get_close_matches(asset, assets, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise InputError(f"item {name} of {path} has no asset {asset!r}{hint}; its assets are {', '.join(assets)}")
    data = [key for key, value in assets.items() if _is_data(value)]
    if len(data) != 1:
        found = f"several data assets ({', '.join(data)})" if data else f"no data asset among {', '.join(assets)}"
        raise InputError(f"item {name} of {path} has {found}; choose one with asset=")
    return assets[data[0]]


def _is_data(asset: Mapping[str, Any]) -> bool:
    roles = set(asset.get("roles") or ())
    if roles & _OTHER_ROLES:
        return False
    return "data" in roles or str(asset.get("type", "")).startswith(_RASTER_TYPES)


def _locate(href: str, path: str) -> str:
    """Resolve a link to a path, relative to the JSON file."""
    local = href.removeprefix("file://")
    if ":" in local or local.startswith("/vsi"):
        return local
    here = os.path.join(os.path.dirname(path), local)
    # Links are URLs, with "%20" for a space, but many writers use plain paths.
    return here if os.path.exists(here) else os.path.join(os.path.dirname(path), unquote(local))


_MAX_OPEN = 32


class MosaicSource(RasterSource):
    """Mosaic of rasters on one grid, warped where they have another, opened by `open_source`.

    Where files overlap, a pixel comes from the first one in the order of `paths` that is valid there. A file aligned
    with the grid is read without resampling. A window opens only the files that it intersects, at most 32 per thread.

    It can be pickled, forked and shared between threads; each opens its own files.

    Args:
        path: Input as given, for messages.
        paths: Paths of the files.
        pixels: Options for the files' pixels.
        grid: Options for the grid.
        resampling: Resampling of files on another grid; None for "nearest" with a palette and "bilinear" without.

    Attributes:
        paths: Paths of the files.

    Other attributes are those of `RasterSource`, for the grid and, where files may differ, for the first file.

    Raises:
        InputError: A file can't be read or placed, or the files are inconsistent.
    """

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
        tiles, target = _place(self.paths, pixels or PixelOptions(), grid or GridOptions())
        self._describe(tiles[0].layout, target)
        self.nodata = next((tile.layout.nodata for tile in tiles if tile.layout.nodata is not None), None)
        self.placed_by_gcps = False
        self._tiles = tiles
        has_palette = any(tile.layout.colormap or tile.layout.colors is not None for tile in tiles)
        kind = _resampling(resampling or ("nearest" if has_palette else "bilinear"))
        self._tree = shapely.STRtree([_box(tile.footprint_in(target)) for tile in tiles])
        if self._tree.query(_box(self.extent)).size == 0:
            raise InputError(f"bounds {self.bounds} ({crs_name(self.crs)}) meet no file of {path}")
        self._handles = PerThread(functools.partial(_pool, tiles, target, kind))

    def close(self) -> None:
        """Close this thread's file handles; the next read opens them again."""
        self._handles.close()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {len(self.paths)} files)"

    def _read_inside(self, window: Window, out_shape: tuple[int, int]) -> tuple[PixelArray, BoolArray]:
        reduced = out_shape != window.shape
        grid = _thinned(self._grid, window, out_shape) if reduced else self._grid
        place = grid.extent if reduced else window
        pixels = np.full((self.num_bands, *out_shape), self.nodata or 0, self.dtype)
        mask = np.zeros((self.num_bands, *out_shape), bool)
        missing = np.ones(out_shape, bool)
        for index in sorted(self._tree.query(_box(window)).tolist()):
            with _opened(self._tiles[index], grid) if reduced else nullcontext(self._handles.get().get(index)) as tile:
                covered = tile.read(place)
            if covered is not None:
                _lay_under(pixels, mask, missing, place, *covered)
            if not missing.any():
                break
        return pixels, mask


def _thinned(grid: Grid, window: Window, shape: tuple[int, int]) -> Grid:
    """Return the grid of fewer, larger pixels over a window."""
    height, width = shape
    larger = Affine.translation(window.col, window.row) @ Affine.scale(window.width / width, window.height / height)
    return Grid(grid.crs, grid.transform @ larger, height, width)


def _opened(tile: Tile, grid: Grid) -> AbstractContextManager[OpenTile]:
    """Open a tile for a single read on a grid of larger pixels."""
    reduction = math.sqrt(math.prod(grid.resolution) / math.prod(tile.placed.resolution))
    return closing(open_tile(tile, grid, Resampling.nearest, reduction))


def _lay_under(
    pixels: PixelArray,
    mask: BoolArray,
    missing: BoolArray,
    window: Window,
    place: Window,
    new_pixels: PixelArray,
    new_mask: BoolArray,
) -> None:
    """Fill pixels of a window that no band has yet from those of a tile, which cover `place`."""
    rows, cols = place.slices_in(window)
    used = new_mask.any(0) & missing[rows, cols]
    np.copyto(pixels[:, rows, cols], new_pixels, where=used)
    np.copyto(mask[:, rows, cols], new_mask, where=used)
    missing[rows, cols] &= ~used


def _pool(tiles: Sequence[Tile], grid: Grid, resampling: Resampling) -> Pool[OpenTile]:
    return Pool(lambda index: open_tile(tiles[index], grid, resampling), _MAX_OPEN)


def _place(paths: Sequence[str], pixels: PixelOptions, options: GridOptions) -> tuple[list[Tile], Grid]:
    """Return the tiles and the grid to read them on."""
    crs = None if options.crs is None else _parse_crs(options.crs)
    tiles = [describe_tile(paths[0], pixels, crs)]
    crs = tiles[0].placed.crs
    for path in paths[1:]:
        tiles.append(describe_tile(path, pixels, crs))
        _check_alike(tiles[0], tiles[-1])
    grids = [tile.placed for tile in tiles]
    if isinstance(options.resolution, PixelSize):
        left, bottom, right, top = grids[0].bounds
        side = options.resolution.in_crs(crs, paths[0], ((left + right) / 2, (bottom + top) / 2))
        options = replace(options, resolution=side)
    if options.resolution is not None:
        check_scale(grids, options.resolution, paths[0])
    return tiles, target_grid(grids, options, anchored=tiles[0].native)


def _check_alike(first: Tile, other: Tile) -> None:
    """Check that two files can be part of the same mosaic.

    Raises:
        InputError: The number of bands, the dtype or the palette differs.
    """
    a, b = first.layout, other.layout
    if len(a.names) != len(b.names):
        raise InputError(
            f"files of a mosaic need the same bands, but {a.path} has {len(a.names)} and {b.path} has {len(b.names)}; "
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
    except (CRSError, ValueError) as error:
        raise InputError(f"crs must be a code such as EPSG:32637, or WKT or PROJ text, got {crs!r}") from error


def _resampling(name: str) -> Resampling:
    # The other methods of rasterio don't support warping.
    names = [kind.name for kind in Resampling if kind.name != "gauss"]
    if name not in names:
        raise InputError(f"resampling must be one of {', '.join(names)}, got {name!r}")
    return Resampling[name]


def _box(window: Window) -> Any:
    # Windows that only share an edge don't intersect.
    return shapely.box(window.col + 0.25, window.row + 0.25, window.col_stop - 0.25, window.row_stop - 0.25)
