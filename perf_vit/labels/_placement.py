"""Checks and transforms that place labels on a raster or slide."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from pyproj import Transformer
from pyproj.enums import TransformDirection
from pyproj.exceptions import ProjError
from rasterio.warp import transform_bounds

from perf_vit.errors import InputError, warn_once
from perf_vit.sources import RasterSource
from perf_vit.sources._gdal import GDAL_ERRORS, crs_name
from perf_vit.sources._qupath import FrameName
from perf_vit.sources.raster import Bounds
from perf_vit.sources.slides import SlideSource
from perf_vit.types import Source

__all__ = [
    "check_both_have_crs",
    "check_mask_overlap",
    "check_on_pixels",
    "check_on_slide",
    "check_overlap",
    "local_transform",
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
        Geometries, [n]; those that leave the domain of the source's CRS are cut, those outside of it empty polygons.

    Raises:
        InputError: Coordinates are not longitudes and latitudes although the file claims so (e.g. GeoJSON without CRS),
            or there is no transformation between the CRSs.
    """
    _check_degrees(geometries, path)
    assert source.crs is not None
    try:
        placed: npt.NDArray[Any] = geometries.to_crs(source.crs.to_wkt()).to_numpy().copy()
        leaving = ~_are_finite(placed) & ~shapely.is_empty(placed)
        if leaving.any():
            placed[leaving] = _cut_to_domain(geometries[leaving], source.crs).to_crs(source.crs.to_wkt()).to_numpy()
    except ProjError as error:
        raise _no_transformation(path, geometries.crs, source) from error
    placed[~_are_finite(placed)] = shapely.Polygon()
    return placed


def _are_finite(geometries: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(shapely.bounds(geometries).reshape(-1, 4)).all(axis=1))


def _cut_to_domain(geometries: Any, crs: Any) -> Any:
    """Return the parts of polygons that have coordinates in a CRS, as a geopandas series in the polygons' own CRS.

    The domain is made of boxes that lie within it, as far as points in them show: 32 a side, quartered where they cross
    its border, which leaves a strip of a thousandth of the polygons' extent at most.
    """
    to_crs = Transformer.from_crs(geometries.crs, crs.to_wkt(), always_xy=True)
    left, bottom, right, top = geometries.total_bounds
    x, y = np.linspace(left, right, 33), np.linspace(bottom, top, 33)
    boxes = np.stack(
        [side.ravel() for each in (slice(-1), slice(1, None)) for side in np.meshgrid(x[each], y[each])], 1
    )
    inside = []
    for _ in range(6):
        placed = _have_place(to_crs, *_points_in(boxes), degrees=geometries.crs.is_geographic)
        inside.append(boxes[placed.all(axis=1)])
        boxes = _quartered(boxes[placed.any(axis=1) & ~placed.all(axis=1)])
        if len(boxes) == 0:
            break
    # A snapped union of boxes leaves no gaps of rounding errors between them.
    domain = shapely.union_all(shapely.box(*np.concatenate(inside).T), grid_size=(right - left) * 1e-12)
    cut = shapely.intersection(shapely.make_valid(geometries.to_numpy()), domain)
    # Polygons that only touch the domain leave lines and points.
    parts, owners = shapely.get_parts(cut, return_index=True)
    areal = shapely.get_dimensions(parts) == 2
    kept = [shapely.MultiPolygon(parts[areal & (owners == index)].tolist()) for index in range(len(cut))]
    return type(geometries)(kept, index=geometries.index, crs=geometries.crs)


def _have_place(
    to_crs: Transformer, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], *, degrees: bool
) -> npt.NDArray[np.bool_]:
    """Return where points have coordinates in a CRS, which lead back to them: near poles of a projection some don't."""
    back_x, back_y = to_crs.transform(*to_crs.transform(x, y), direction=TransformDirection.INVERSE)
    with np.errstate(invalid="ignore"):
        off_x, off_y = back_x - x, back_y - y
        if degrees:
            off_x = ((off_x + 180) % 360 - 180) * np.cos(np.radians(y))
        return np.asarray(np.hypot(off_x, off_y) < 1e-6 * max(1.0, np.abs(x).max(), np.abs(y).max()))


def _points_in(boxes: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return x and y of 5 x 5 points of each box (left, bottom, right, top), from edge to edge, [n, 25]."""
    x, y = (np.linspace(boxes[:, axis], boxes[:, axis + 2], 5, axis=1) for axis in (0, 1))
    return np.tile(x, 5), np.repeat(y, 5, axis=1)


def _quartered(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    left, bottom, right, top = boxes.T
    x, y = (left + right) / 2, (bottom + top) / 2
    quarters = [(left, bottom, x, y), (x, bottom, right, y), (left, y, x, top), (x, y, right, top)]
    return np.concatenate([np.stack(quarter, axis=1) for quarter in quarters])


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


def check_mask_overlap(source: RasterSource, labels: RasterSource) -> None:
    """Check that a mask with a CRS overlaps a raster in another one.

    Raises:
        InputError: It doesn't, or there is no transformation between the CRSs.
    """
    try:
        bounds = transform_bounds(labels.crs, source.crs, *labels.bounds)
    except GDAL_ERRORS as error:
        raise _no_transformation(labels.path, labels.crs, source) from error
    # Bounds across 180 degrees, or of a mask that leaves the CRS's domain, tell nothing.
    if np.isfinite(bounds).all() and bounds[0] <= bounds[2]:
        check_overlap(source, labels.path, bounds)


def _no_transformation(path: str, crs: Any, source: Source) -> InputError:
    return InputError(
        f"no transformation is known from the CRS of {path} ({crs_name(crs)}) to that of {source.path} "
        f"({crs_name(source.crs)}); save the labels in the CRS of the raster"
    )


def span(bounds: Bounds) -> str:
    """Format bounds as text: left to right and bottom to top."""
    return f"x {bounds[0]:.8g} to {bounds[2]:.8g}, y {bounds[1]:.8g} to {bounds[3]:.8g}"
