"""What a user may name as rasters: files, folders, patterns, lists of them, and lists of STAC items."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf_vit.errors import DataWarning, InputError
from perf_vit.io._band_layout import Palette, PixelOptions
from perf_vit.io._grid import Bounds, GridOptions
from perf_vit.io._stac import is_item_list, item_paths
from perf_vit.io.image_files import RASTER_SUFFIXES, is_by_product, previews_among, without_repeats
from perf_vit.io.mosaic import MosaicSource
from perf_vit.io.pixel_size import PixelSize
from perf_vit.io.raster import RasterSource

__all__ = ["open_raster"]


def open_raster(
    path: str | Path | Sequence[str | Path],
    *,
    bands: Sequence[int | str] | None = None,
    nodata: float | None = None,
    crs: Any = None,
    resolution: float | tuple[float, float] | PixelSize | None = None,
    bounds: Bounds | None = None,
    resampling: str | None = None,
    palette: Palette = "keep",
    apply_scale: bool = False,
    asset: str | None = None,
) -> RasterSource:
    """Open what GDAL reads as a raster, or several as one; `open_source` describes the arguments.

    Raises:
        InputError: a file can't be read or placed, or the options or other files don't fit it.
    """
    pixels = PixelOptions(bands=bands, nodata=nodata, palette=palette, apply_scale=apply_scale)
    grid = GridOptions(crs=crs, resolution=resolution, bounds=bounds)
    name, paths = _paths_of(path, asset)
    if paths is None and grid.empty:
        source = RasterSource(name, bands=bands, nodata=nodata, palette=palette, apply_scale=apply_scale)
        if not source.placed_by_gcps:
            return source
    return MosaicSource(name, paths or [name], pixels=pixels, grid=grid, resampling=resampling)


def _paths_of(path: str | Path | Sequence[str | Path], asset: str | None) -> tuple[str, list[str] | None]:
    """A name for messages, and the files of a mosaic; None for one raster."""
    if not isinstance(path, (str, Path)):
        paths = [os.fspath(part) for part in path]
        if not paths:
            raise InputError("expected paths of rasters, got an empty list")
        return (paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"), paths
    name = os.fspath(path)
    if is_item_list(name):
        return name, item_paths(name, asset)
    if asset is not None:
        raise InputError(f"asset is for a JSON file of STAC items, got {name}; leave it out")
    if os.path.isdir(name):
        # Some formats are folders themselves: those hold no rasters of their own and are GDAL's to open.
        return name, _rasters_in(name) or None
    if glob.has_magic(name) and not os.path.exists(name) and "://" not in name and not name.startswith("/vsi"):
        return name, _matching(name)
    return name, None


def _rasters_in(folder: str) -> list[str]:
    files = {
        file
        for file in Path(folder).iterdir()
        if file.suffix.lower() in RASTER_SUFFIXES and file.is_file() and not is_by_product(file.name)
    }
    previews = previews_among(files)
    if previews:
        warnings.warn(
            f"{len(previews)} of {len(files)} files of the mosaic {folder} are taken as previews of the rasters beside "
            f"them and left out, the first {min(previews)}",
            DataWarning,
            stacklevel=4,
        )
    return sorted(map(str, files - previews))


def _matching(pattern: str) -> list[str]:
    matches = (Path(match) for match in glob.glob(pattern, recursive=True))
    files = [str(file) for file in without_repeats(matches) if file.is_file() and not is_by_product(file.name)]
    if not files:
        raise InputError(f"no file matches {pattern}")
    return files
