"""Checks and transforms that place labels on a raster or slide."""

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
from perf_vit.sources._qupath import FrameName
from perf_vit.sources.raster import Bounds
from perf_vit.sources.slides import SlideSource
from perf_vit.types import Source

__all__ = [
    "check_both_have_crs",
    "check_on_pixels",
    "check_on_slide",
    "check_overlap",
    "local_transform",
    "reproject_bounds",
    "span",
    "transform_geometries",
]

# Longitudes may range from 0 to 360.
_MOST_DEGREES = (360, 90)


def check_both_have_crs(source: RasterSource, path: str, crs: Any) -> None:
    """Check that labels and raster have a CRS.

    Raises:
        InputError: One of them has none.
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


def transform_geometries(geometries: Any, path: str, source: Source) -> npt.NDArray[Any]:
    """Transform the geometries of a vector file to the CRS of a source.

    Args:
        geometries: A geopandas series with a CRS.
        path: Name of the file, for errors.
        source: Source with a CRS.

    Returns:
        Geometries, [n]; an empty polygon for each one outside of the domain of the source's CRS.

    Raises:
        InputError: Coordinates are not longitudes and latitudes although the file claims so (e.g. GeoJSON without CRS),
            or there is no transformation between the CRSs.
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
    if (np.abs(geometries.bounds.to_numpy()) > np.tile(_MOST_DEGREES, 2)).any(axis=1).all():
        raise InputError(
            f"labels {path} cover {span(tuple(geometries.total_bounds))}, which are no longitudes and latitudes, as "
            f"assumed ({crs_name(geometries.crs)}) for GeoJSON without a crs member (RFC 7946); "
            "save them in longitude and latitude, or as GeoPackage with their own CRS"
        )


def check_overlap(
    source: RasterSource, path: str, bounds: Bounds, own_bounds: Bounds | None = None, own_crs: Any = None
) -> None:
    """Check that labels overlap a raster.

    Args:
        source: Raster.
        path: Name of the labels, for errors.
        bounds: Bounds of the labels in the raster's CRS.
        own_bounds: Bounds of the labels in their own CRS, if that differs.
        own_crs: CRS of the labels.

    Raises:
        InputError: They don't overlap.
    """
    if _meet(bounds, source.bounds):
        return
    own = "" if own_bounds is None else f" (in the file {span(own_bounds)}, {crs_name(own_crs)})"
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {span(bounds)}{own}, the raster "
        f"{span(source.bounds)} ({crs_name(source.crs)}); check their CRS or choose other labels"
    )


def check_on_slide(source: SlideSource, path: str, bounds: Bounds, frame: FrameName) -> None:
    """Check that labels overlap a slide.

    Args:
        source: Slide, read at any resolution.
        path: Name of the labels, for errors.
        bounds: Bounds of the labels in pixels of level 0.
        frame: Frame of these coordinates.

    Raises:
        InputError: They don't overlap.
    """
    width, height = source.frame.size_xy(frame, source.levels[0])
    if bounds[0] < width and bounds[2] > 0 and bounds[1] < height and bounds[3] > 0:
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {span(bounds)}, the slide {width} x {height} pixels "
        f"of level 0{_counted_from(source, frame)}"
    )


def _counted_from(source: SlideSource, frame: FrameName) -> str:
    bounds = source.frame.bounds
    if frame == "level 0" or source.frame.size_xy(frame, source.levels[0]) == source.levels[0][::-1]:
        return "; labels of slides are in these pixels, as QuPath exports them"
    return (
        f" from the corner ({bounds.col}, {bounds.row}) of its bounds, as QuPath exports them; labels from the corner "
        'of level 0 say so with "frame": "level 0" in their GeoJSON'
    )


def local_transform(source: Source, path: str, bounds: Bounds) -> Affine:
    """Return the transform from pixels of a raster without CRS to the coordinates of its labels.

    A transform without CRS (e.g. from a world file) defines a local grid. Labels that lie on the raster in this grid
    are in its coordinates, all others in pixels.

    Args:
        source: Raster without CRS.
        path: Name of the labels, for messages.
        bounds: Bounds of the labels.
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
    """Check that labels in pixel coordinates overlap an image.

    Args:
        source: Image without CRS.
        path: Name of the labels, for errors.
        bounds: Bounds of the labels in pixels.

    Raises:
        InputError: They don't overlap.
    """
    if _meet(bounds, (0, 0, source.width, source.height)) or _meet(bounds, source.bounds):
        return
    raise InputError(
        f"labels {path} don't overlap {source.path}: they cover {span(bounds)}, the image {source.width} x "
        f"{source.height} pixels; it has no CRS, so labels must be in its pixels, or assign it one"
    )


def reproject_bounds(bounds: Bounds, crs: Any, to_crs: Any) -> Bounds:
    """Return the bounds of a box reprojected to another CRS."""
    left, bottom, right, top = transform_bounds(crs, to_crs, *bounds)
    return left, bottom, right, top


def span(bounds: Bounds) -> str:
    """Format bounds as text: left to right and bottom to top."""
    return f"x {bounds[0]:.8g} to {bounds[2]:.8g}, y {bounds[1]:.8g} to {bounds[3]:.8g}"
