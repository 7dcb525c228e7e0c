"""Polygons of a vector file as objects, in pixels of a source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.errors import InputError
from perf_vit.io._gdal import check_exists, crs_name
from perf_vit.io._label_vector import to_pixels
from perf_vit.io._placing import local_transform, place_geometries, span
from perf_vit.io._vector_file import read_features, split_layer
from perf_vit.types import Source

__all__ = ["PolygonFile"]


class PolygonFile:
    """The polygons of a vector file, placed on one source after another.

    Args:
        path: a GeoJSON, GeoPackage, shapefile, GeoParquet, ... in any CRS; of several layers `FILE|layername=LAYER`.
        attribute: column to read with them.

    Attributes:
        path: as it was given.
        numbers: those of the polygons among the file's features, from 1, [n].
        values: the attribute's, one a polygon, [n]; None without attribute.

    Raises:
        InputError: the file can't be read, or holds lines or points.
    """

    def __init__(self, path: str | Path, *, attribute: str | None = None) -> None:
        self.path = os.fspath(path)
        check_exists(split_layer(self.path)[0])
        frame = read_features(self.path, attribute)
        other = sorted(set(frame.geom_type) - {"Polygon", "MultiPolygon"})
        if other:
            raise InputError(
                f"{self.path} holds {', '.join(other)}; objects must be polygons (buffer lines and points first)"
            )
        self._geometry = frame.geometry
        self.numbers = np.asarray(frame.index.to_numpy() + 1, np.int64)
        self.values: npt.NDArray[Any] | None = None
        if attribute is not None:
            self.values = frame[attribute].to_numpy() if len(frame) else np.zeros(0, object)
        # Images of a set share their CRS, mostly: each is transformed to once.
        self._placed: dict[str, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._geometry)

    def described_place(self) -> str:
        """Bounds of all polygons in the file's own coordinates, and its CRS, in words."""
        crs = "without CRS" if self._geometry.crs is None else crs_name(self._geometry.crs)
        return f"{span(tuple(self._geometry.total_bounds))} ({crs})"

    def in_pixels_of(self, source: Source) -> npt.NDArray[Any]:
        """Polygons and multipolygons in pixels of a source, [n], also those that lie outside it.

        Where the source has no CRS, coordinates are its pixels, or those of its world file where the polygons lie on it
        there, whatever the file says. A polygon that has no place in
        the source's CRS becomes an empty one.

        Raises:
            InputError: the source has a CRS and the file none.
        """
        if source.crs is None:
            geometries: npt.NDArray[Any] = shapely.force_2d(self._geometry.to_numpy())
            place = local_transform(source, self.path, tuple(self._geometry.total_bounds))
            return geometries if place.is_identity else to_pixels(geometries, place)
        return to_pixels(self._in_crs(source), source.transform)

    def _in_crs(self, source: Source) -> npt.NDArray[Any]:
        if self._geometry.crs is None and len(self):
            raise InputError(
                f"{self.path} has no CRS and {source.path} has {crs_name(source.crs)}; assign one to {self.path}"
            )
        key = str(source.crs.to_wkt())  # type: ignore[union-attr]
        if key not in self._placed:
            self._placed[key] = (
                place_geometries(self._geometry, self.path, source) if len(self) else np.zeros(0, object)
            )
        return self._placed[key]
