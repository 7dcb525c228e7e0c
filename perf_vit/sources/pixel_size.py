"""Pixel sizes with units, so that a model reads its training resolution in any CRS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
from rasterio.errors import CRSError
from rasterio.warp import transform

from perf_vit.errors import InputError
from perf_vit.sources._gdal import crs_name
from perf_vit.types import Source

__all__ = ["PixelSize", "Unit", "common_unit", "pixel_areas", "unit_of"]

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
            return self.size * own_metres / metres
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
    (longitude,), (latitude,) = transform(crs, "EPSG:4326", [place_xy[0]], [place_xy[1]])[:2]
    if not (math.isfinite(longitude) and math.isfinite(latitude)):
        return "EPSG:CODE"
    zone = math.floor((longitude + 180) / 6) % 60 + 1
    return f"EPSG:{(32600 if latitude >= 0 else 32700) + zone}"


_FloatArray = npt.NDArray[np.float64]

# Of WGS 84: half the equator's diameter in metres, and the square of the eccentricity.
_RADIUS, _ECCENTRICITY2 = 6378137.0, 0.00669437999014


def pixel_areas(source: Source, xy_px: _FloatArray) -> tuple[_FloatArray, str]:
    """Return the area of a pixel at each of some places, and its unit.

    - "m2" of rasters with a CRS: on the ellipsoid, so that maps in degrees or Web Mercator have true areas too;
    - "um2" of slides whose pixel size is known;
    - "px" of all others: 1.

    Args:
        source: Raster, mosaic or slide.
        xy_px: Places in pixels, [n, 2].
    """
    if source.mpp is not None:
        return np.full(len(xy_px), source.mpp**2), "um2"
    if source.crs is None:
        return np.ones(len(xy_px)), "px"
    areas = _areas_on_ellipsoid(source, xy_px)
    if not np.isfinite(areas).all():
        # Local grids have no place on the Earth.
        metres = unit_of(source.crs)[1] or 1.0
        areas = np.full(len(xy_px), abs(source.transform.determinant) * metres**2)
    return areas, "m2"


def _areas_on_ellipsoid(source: Source, xy_px: _FloatArray) -> _FloatArray:
    assert source.crs is not None
    steps = np.array([[0.0, 0.0], [-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]])
    points = (xy_px[:, None] + steps).reshape(-1, 2)
    x, y = source.transform @ tuple(points.T)
    try:
        to_degrees = pyproj.Transformer.from_crs(source.crs.to_wkt(), "EPSG:4326", always_xy=True)
        longitude, latitude = np.radians(to_degrees.transform(x, y)).reshape(2, -1, 5)
    except (pyproj.exceptions.CRSError, pyproj.exceptions.ProjError):
        return np.full(len(xy_px), np.nan)
    east, north = np.diff(longitude[:, 1:].reshape(-1, 2, 2)), np.diff(latitude[:, 1:].reshape(-1, 2, 2))
    bend = 1 - _ECCENTRICITY2 * np.sin(latitude[:, 0]) ** 2
    along_meridian = _RADIUS * (1 - _ECCENTRICITY2) / bend**1.5
    along_parallel = _RADIUS / np.sqrt(bend) * np.cos(latitude[:, 0])
    cross = east[:, 0, 0] * north[:, 1, 0] - east[:, 1, 0] * north[:, 0, 0]
    found: _FloatArray = np.abs(cross) * along_meridian * along_parallel
    return found
