"""Whether labels and a raster can be laid on each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from pyproj.exceptions import ProjError
from rasterio.warp import transform_bounds

from perf_vit.errors import InputError, warn_once
from perf_vit.sources import RasterSource
from perf_vit.sources._gdal import crs_name
from perf_vit.sources.raster import Bounds
from perf_vit.sources.slides import SlideSource
from perf_vit.types import Source

__all__ = [
    "check_both_placed",
    "check_on_pixels",
    "check_on_slide",
    "check_overlap",
    "local_transform",
    "place_geometries",
    "reproject_bounds",
    "span",
]

# Longitudes are also written from 0 to 360.
_MOST_DEGREES = (360, 90)


def check_both_placed(source: RasterSource, path: str, crs: Any) -> None:
    """Refuse labels or a raster without CRS.

    Raises:
        InputError: one of them has none.
    """
    if source.crs is None:
        raise InputError(
            f"{source.path} has no CRS, so labels in {crs_name(crs)} can't be placed on it; assign one with "
            f"rio edit-info --crs EPSG:CODE {source.path}"
        )
    if crs is None:
        raise InputError(
            f"labels {path} have no CRS, so they can't be placed on {source.path} ({crs_name(source.crs)}); assign one"
        )


def place_geometries(geometries: Any, path: str, source: Source) -> npt.NDArray[Any]:
    """Transform the geometries of a vector file to the CRS of a source.

    Args:
        geometries: a geopandas series with a CRS.
        path: the file's name in errors.
        source: with a CRS.

    Returns:
        Geometries, [n]; an empty polygon for each that has no place in the source's CRS.

    Raises:
        InputError: coordinates that are no longitudes and latitudes where the file says so, as a GeoJSON without CRS
            does; or no transformation leads from one CRS to the other.
    """
    _check_degrees(geometries, path)
    assert source.crs is not None
    try:
        placed: npt.NDArray[Any] = geometries.to_crs(source.crs.to_wkt()).to_numpy().copy()
    except ProjError as error:
        raise InputError(
            f"no transformation is known from the CRS of {path} ({crs_name(geometries.crs)}) to that of {source.path} "
            f"({crs_name(source.crs)}); save the labels in the CRS of the raster"
        ) from error
    placed[~np.isfinite(shapely.bounds(placed).reshape(-1, 4)).all(axis=1)] = shapely.Polygon()
    return placed


def _check_degrees(geometries: Any, path: str) -> None:
    if not len(geometries) or not geometries.crs.is_geographic:
        return
    bounds = np.abs(geometries.bounds.to_numpy())
    if (bounds > np.tile(_MOST_DEGREES, 2)).any(axis=1).all():
        raise InputError(
            f"labels {path} cover {span(tuple(geometries.total_bounds))}, which are no longitudes and latitudes, but "
            f"were taken for such ({crs_name(geometries.crs)}), as GeoJSON without a crs member is (RFC 7946); "
            "save them in longitude and latitude, or as GeoPackage with their own CRS"
        )


def check_overlap(
    source: RasterSource, path: str, bounds: Bounds, own_bounds: Bounds | None = None, own_crs: Any = None
) -> None:
    """Refuse labels that lie wholly elsewhere.

    Args:
        source: the raster.
        path: the labels' name in errors.
        bounds: of the labels, in the raster's CRS.
        own_bounds: of the labels, in their own CRS, if it is another.
        own_crs: the labels' CRS.

    Raises:
        InputError: both don't meet.
    """
    left, bottom, right, top = source.bounds
    if bounds[0] < right and bounds[2] > left and bounds[1] < top and bounds[3] > bottom:
        return
    own = "" if own_bounds is None else f" (in the file {span(own_bounds)}, {crs_name(own_crs)})"
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {span(bounds)}{own}, the raster "
        f"{span(source.bounds)} ({crs_name(source.crs)}); check their CRS or choose other labels"
    )


def check_on_slide(source: SlideSource, path: str, bounds: Bounds) -> None:
    """Refuse labels that lie wholly beside a slide.

    Args:
        source: the slide, at any size.
        path: the labels' name in errors.
        bounds: of the labels, in pixels of level 0.

    Raises:
        InputError: both don't meet.
    """
    height, width = source.levels[0]
    if bounds[0] < width and bounds[2] > 0 and bounds[1] < height and bounds[3] > 0:
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {span(bounds)}, the slide {width} x {height} pixels "
        "of level 0; labels of slides are in these pixels, as QuPath exports them"
    )


def local_transform(source: Source, path: str, bounds: Bounds) -> Affine:
    """From pixels of a raster without CRS to the coordinates of its labels.

    A transform without CRS, as of a world file, is a local grid. Labels that lie on the raster there are in coordinates
    of that grid, others in pixels.

    Args:
        source: without CRS.
        path: the labels' name in messages.
        bounds: of the labels.
    """
    if source.transform.is_identity or not isinstance(source, RasterSource):
        return Affine.identity()
    on_grid, on_pixels = (_meet(bounds, place) for place in (source.bounds, (0, 0, source.width, source.height)))
    if on_grid and on_pixels:
        warn_once(
            "local grid",
            f"labels {path} cover {span(bounds)}, which lies on {source.path} both in pixels and on the grid of its "
            "transform without CRS; they are taken to be on that grid, so remove the world file if they are in pixels",
        )
    return source.transform if on_grid else Affine.identity()


def _meet(bounds: Bounds, other: Bounds) -> bool:
    return bounds[0] < other[2] and bounds[2] > other[0] and bounds[1] < other[3] and bounds[3] > other[1]


def check_on_pixels(source: RasterSource, path: str, bounds: Bounds) -> None:
    """Refuse labels in pixels that lie wholly beside an image.

    Args:
        source: the image, without CRS.
        path: the labels' name in errors.
        bounds: of the labels, in pixels.

    Raises:
        InputError: both don't meet.
    """
    if _meet(bounds, (0, 0, source.width, source.height)) or _meet(bounds, source.bounds):
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {span(bounds)}, the image {source.width} x "
        f"{source.height} pixels; it has no CRS, so labels must be in its pixels, or assign it one"
    )


def reproject_bounds(bounds: Bounds, crs: Any, to_crs: Any) -> Bounds:
    """Bounds around a box of another CRS."""
    left, bottom, right, top = transform_bounds(crs, to_crs, *bounds)
    return left, bottom, right, top


def span(bounds: Bounds) -> str:
    """Left to right and bottom to top, in words."""
    return f"x {bounds[0]:.8g} to {bounds[2]:.8g}, y {bounds[1]:.8g} to {bounds[3]:.8g}"
