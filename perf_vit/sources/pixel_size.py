"""Pixel sizes with units, so that a model reads its training resolution in any CRS."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import shapely
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform

from perf_vit.errors import InputError, warn_once
from perf_vit.sources._gdal import GDAL_ERRORS, crs_name
from perf_vit.sources.base import has_place
from perf_vit.types import GeoImage, Source

__all__ = [
    "PixelSize",
    "Unit",
    "common_unit",
    "pixel_area_grid",
    "pixel_areas",
    "pixel_lengths",
    "polygon_areas",
    "unit_of",
    "warn_of_ground_size",
]

Unit = tuple[str, float | None]
"""Name of a unit and its length in metres; None for degrees, whose length varies."""


@dataclass(frozen=True)
class PixelSize:
    """Pixel size with its unit; `open_source` accepts it as `resolution` and converts it to CRS units.

    Attributes:
        size: Size in `unit`.
        unit: Unit from `unit_of`.
    """

    size: float
    unit: Unit

    def in_crs(self, crs: Any, path: str, place_xy: tuple[float, float]) -> float:
        """Convert the size to units of a CRS.

        Args:
            crs: Target CRS.
            path: Path of the raster, for errors.
            place_xy: Centre of the raster in the CRS, for advice.

        Raises:
            InputError: One of the units is degrees, the other isn't.
        """
        name, metres = unit_of(crs)
        own_name, own_metres = self.unit
        if own_metres is not None and metres is not None:
            size = self.size * own_metres / metres
            warn_of_ground_size(crs, size, path, place_xy)
            return size
        if own_metres is metres:
            return self.size
        other = _utm_zone(crs, place_xy) if metres is None else "EPSG:4326"
        raise InputError(
            f"the model reads pixels of {self.size:g} {own_name}, but {path} is in {name} ({crs_name(crs)}); "
            f"give a CRS in {own_name}, such as `crs={other}`, or a size in {name} with `resolution`"
        )


def unit_of(crs: Any) -> Unit:
    """Return the unit of a CRS's coordinates."""
    if crs.is_geographic:
        return "degree", None
    try:
        name, metres = crs.linear_units_factor
    except CRSError:
        # rasterio doesn't know the units of local grids.
        return _unit_in(crs)
    return str(name), float(metres)


def _unit_in(crs: Any) -> Unit:
    axis = pyproj.CRS.from_wkt(crs.to_wkt()).axis_info[0]
    return axis.unit_name, float(axis.unit_conversion_factor)


def _same(unit: Unit, other: Unit) -> bool:
    """Return whether two units are the same, which may differ in name and last digits between files."""
    if unit[1] is None or other[1] is None:
        return unit[1] is other[1]
    return math.isclose(unit[1], other[1], rel_tol=1e-9)


def common_unit(crs_of: Sequence[tuple[str, Any]]) -> Unit:
    """Return the common CRS unit of several rasters.

    Args:
        crs_of: Path and CRS of each raster.

    Raises:
        InputError: The units differ.
    """
    first_path, first = crs_of[0]
    for path, crs in crs_of[1:]:
        if not _same(unit_of(crs), unit_of(first)):
            raise InputError(
                f"data.resolution is in units of the CRS, which is {unit_of(first)[0]} in {first_path} and "
                f"{unit_of(crs)[0]} in {path}; train on rasters of one unit"
            )
    return unit_of(first)


def _utm_zone(crs: Any, place_xy: tuple[float, float]) -> str:
    try:
        (longitude,), (latitude,) = transform(crs, "EPSG:4326", [place_xy[0]], [place_xy[1]])[:2]
    except GDAL_ERRORS:
        # Local grids and other bodies.
        return "EPSG:CODE"
    if not (math.isfinite(longitude) and math.isfinite(latitude)):
        return "EPSG:CODE"
    zone = math.floor((longitude + 180) / 6) % 60 + 1
    return f"EPSG:{(32600 if latitude >= 0 else 32700) + zone}"


_FloatArray = npt.NDArray[np.float64]

_METRES_PER_DEGREE = 111_320.0

_ORIGIN = np.zeros((1, 2))

# Ratio of pixel sizes up to which they are the same to a model.
_SAME_SIZE = 1.1

# Cells a side, within which the area of a pixel is nearly linear in its place.
_CELLS, _GRID_CELLS = 64, 32


def pixel_areas(source: Source | GeoImage, xy_px: _FloatArray) -> tuple[_FloatArray, str]:
    """Return the area of a pixel at each of some places, and its unit.

    - "m2" of rasters with a CRS: on the ellipsoid, so that maps in degrees or Web Mercator have true areas too;
    - "um2" of slides whose pixel size is known;
    - "px" of all others: 1.

    Args:
        source: Raster, mosaic or slide, or an image of one.
        xy_px: Places in pixels, [n, 2].
    """
    if source.mpp is not None:
        return np.full(len(xy_px), source.mpp**2), "um2"
    steps = _steps_on_ground(source, xy_px)
    if steps is None:
        return np.ones(len(xy_px)), "px"
    return np.abs(steps[:, 0, 0] * steps[:, 1, 1] - steps[:, 1, 0] * steps[:, 0, 1]), "m2"


def pixel_lengths(source: Source, xy_px: _FloatArray) -> _FloatArray:
    """Return the largest length on the ground or in the slide of a step of one pixel in any direction, [n].

    It is in metres, micrometres or pixels, as areas are in their squares; see `pixel_areas`.
    """
    if source.mpp is not None:
        frame: Any = getattr(source, "frame", None)
        return np.full(len(xy_px), max((frame and frame.pixel_um_xy) or (source.mpp,)))
    steps = _steps_on_ground(source, xy_px)
    return np.ones(len(xy_px)) if steps is None else np.asarray(np.linalg.norm(steps, ord=2, axis=(1, 2)))


def pixel_area_grid(image: GeoImage) -> tuple[_FloatArray, str]:
    """Return the area of each pixel of an image, [H, W], and its unit; see `pixel_areas`."""
    height, width = image.valid.shape
    rows, cols = _knots(height), _knots(width)
    places = np.stack(np.meshgrid(cols, rows), axis=-1).reshape(-1, 2)
    areas, unit = pixel_areas(image, places)
    by_row, by_col = _interpolation(height, rows), _interpolation(width, cols)
    return by_row @ areas.reshape(len(rows), len(cols)) @ by_col.T, unit


def polygon_areas(source: Source, polygons: npt.NDArray[Any]) -> tuple[_FloatArray, str]:
    """Return the areas of polygons on the ground or in the slide, [n], and their unit; see `pixel_areas`.

    A polygon that is large in a raster with pixels of different areas is cut into pieces, which are measured apart.

    Args:
        source: Raster, mosaic or slide.
        polygons: Shapely polygons or multipolygons in pixels, none empty, [n].
    """
    if len(polygons) == 0:
        return np.zeros(0), pixel_areas(source, np.zeros((1, 2)))[1]
    x, y = np.linspace(0, source.width, 5), np.linspace(0, source.height, 5)
    everywhere, unit = pixel_areas(source, np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))
    owners = np.arange(len(polygons))
    # Where the area is linear in the place, that at the centroid is the mean.
    if everywhere.max() > 1.02 * everywhere.min():
        size = max(1.0, source.width / _CELLS), max(1.0, source.height / _CELLS)
        bounds = shapely.bounds(polygons)
        large = (bounds[:, 2:] - bounds[:, :2] > size).any(axis=1)
        parts = [list(_pieces(polygon, size)) for polygon in polygons[large]]
        owners = np.concatenate([owners[~large], np.repeat(owners[large], [len(each) for each in parts])])
        polygons = np.array([*polygons[~large], *(piece for each in parts for piece in each)], object)
    of_pixels, _ = pixel_areas(source, shapely.get_coordinates(shapely.centroid(polygons)))
    return np.asarray(np.bincount(owners, shapely.area(polygons) * of_pixels), np.float64), unit


def _pieces(polygon: Any, size_xy: tuple[float, float]) -> Iterator[Any]:
    """Yield the parts of a polygon, none larger than a size; the polygon itself where it is smaller."""
    left, top, right, bottom = polygon.bounds
    shares = (right - left) / size_xy[0], (bottom - top) / size_xy[1]
    if max(shares) <= 1:
        yield polygon
        return
    x, y = (left + right) / 2, (top + bottom) / 2
    halves = (
        ((left, top, x, bottom), (x, top, right, bottom))
        if shares[0] > shares[1]
        else ((left, top, right, y), (left, y, right, bottom))
    )
    for half in halves:
        part = shapely.clip_by_rect(polygon, *half)
        if not part.is_empty:
            yield from _pieces(part, size_xy)


def _knots(length: int) -> _FloatArray:
    return np.linspace(0, length, min(length, _GRID_CELLS) + 1)


def _interpolation(length: int, knots: _FloatArray) -> _FloatArray:
    """Return the weights of values at knots for values at the centres of pixels, [length, knots]."""
    centres = np.arange(length) + 0.5
    return np.stack([np.interp(centres, knots, row) for row in np.eye(len(knots))], axis=1)


def warn_of_ground_size(crs: Any, size: float, path: str, place_xy: tuple[float, float]) -> None:
    """Warn, once for each CRS, if square pixels in a CRS of lengths have another size on the ground.

    Args:
        crs: CRS of the pixels.
        size: Side of a pixel in its units.
        path: Path of the raster, for the message.
        place_xy: Centre of the raster in the CRS.
    """
    name, metres = unit_of(crs)
    ground = None if metres is None else _steps_in(crs, Affine(size, 0, place_xy[0], 0, -size, place_xy[1]), _ORIGIN)
    if metres is None or ground is None or not np.isfinite(ground).all():
        return
    found = math.sqrt(abs(np.linalg.det(ground[0]))) / metres
    if not 1 / _SAME_SIZE < found / size < _SAME_SIZE:
        warn_once(
            f"ground size in {crs_name(crs)}",
            f"pixels of {size:g} {name} in {crs_name(crs)} are {found:.3g} {name} on the ground at {path}; a model "
            f"for pixels of {size:g} {name} on the ground needs a CRS of true lengths, such as "
            f"`crs={_utm_zone(crs, place_xy)}`",
        )


def _steps_on_ground(source: Source | GeoImage, xy_px: _FloatArray) -> _FloatArray | None:
    """Return the steps of a column and of a row in metres east and north, [n, 2, 2]; None where the unit is unknown."""
    if source.crs is None or source.transform is None or not has_place(source):
        return None
    metres, t = unit_of(source.crs)[1], source.transform
    steps = _steps_in(source.crs, t, xy_px)
    # Local grids have no place on the Earth, corners of world maps may have none.
    plain = np.array([[t.a, t.d], [t.b, t.e]]) * (metres or _METRES_PER_DEGREE)
    if steps is None:
        return None if metres is None else np.broadcast_to(plain, (len(xy_px), 2, 2))
    return np.where(np.isfinite(steps).all(axis=(1, 2), keepdims=True), steps, plain)


# Scenes of the whole Earth have 120 UTM zones.
@lru_cache(maxsize=256)
def _to_degrees(wkt: str) -> tuple[pyproj.Transformer, float, float] | None:
    """Return the transformer to longitude and latitude, and half the equator's diameter and the squared eccentricity.

    They are WGS 84's on the Earth, and the CRS's own on other bodies; None for local grids.
    """
    for target in (pyproj.CRS("EPSG:4326"), pyproj.CRS(wkt).geodetic_crs):
        try:
            body = None if target is None else target.ellipsoid
            if body is not None:
                squared = 1 - (body.semi_minor_metre / body.semi_major_metre) ** 2
                return pyproj.Transformer.from_crs(wkt, target, always_xy=True), body.semi_major_metre, squared
        except (pyproj.exceptions.CRSError, pyproj.exceptions.ProjError):
            continue
    return None


def _steps_in(crs: CRS, transform: Affine, xy_px: _FloatArray) -> _FloatArray | None:
    """Return the steps of a column and a row in metres, NaN outside of the CRS's domain; None for local grids."""
    try:
        found = _to_degrees(crs.to_wkt())
    except pyproj.exceptions.CRSError:
        return None
    if found is None:
        return None
    to_degrees, radius, eccentricity2 = found
    points = (xy_px[:, None] + [[0.0, 0.0], [-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]]).reshape(-1, 2)
    x, y = transform @ tuple(points.T)
    try:
        longitude, latitude = np.radians(to_degrees.transform(x, y)).reshape(2, -1, 5)
    except pyproj.exceptions.ProjError:
        return np.full((len(xy_px), 2, 2), np.nan)
    with np.errstate(invalid="ignore"):
        east, north = (np.diff(side[:, 1:].reshape(-1, 2, 2))[..., 0] for side in (longitude, latitude))
        # Across the meridian of 180 degrees.
        east = (east + np.pi) % (2 * np.pi) - np.pi
        bend = 1 - eccentricity2 * np.sin(latitude[:, :1]) ** 2
        # Grids of pixel centres end half a pixel beyond the poles.
        east *= radius / np.sqrt(bend) * np.maximum(np.cos(latitude[:, :1]), 0)
        north *= radius * (1 - eccentricity2) / bend**1.5
    return np.stack([east, north], axis=-1)
