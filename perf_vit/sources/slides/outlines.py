"""Tissue outlines of a slide, drawn in QuPath or ASAP and burnt by window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import rasterize

from perf_vit.errors import InputError
from perf_vit.sources._qupath import is_ignored_class
from perf_vit.sources.vector_file import read_features, slide_frame
from perf_vit.types import BoolArray, Window

__all__ = ["PolygonMask", "read_outlines"]

_STEPS_PER_PX = 256


class PolygonMask:
    """Polygons in pixels of level 0, burnt by window.

    Args:
        polygons: Shapely polygons, [n].
        excluded: Whether a polygon is cut out of the others, [n]; None for none.
    """

    def __init__(self, polygons: npt.NDArray[Any], excluded: BoolArray | None = None) -> None:
        # Later polygons are burnt over earlier ones.
        order = slice(None) if excluded is None else np.argsort(excluded, kind="stable")
        self._polygons = polygons[order]
        self._values = np.ones(len(polygons), np.uint8) if excluded is None else (~excluded[order]).astype(np.uint8)
        self._tree = shapely.STRtree(self._polygons)

    def read(
        self, window: Window, downsample_xy: tuple[float, float], start_xy: tuple[float, float] = (0.0, 0.0)
    ) -> BoolArray:
        """Return which pixel centres lie in a polygon, [height, width]; see `TissueMask`."""
        scale, start = np.array(downsample_xy), np.array(start_xy)
        low = start + scale * (window.col, window.row)
        high = start + scale * (window.col_stop, window.row_stop)
        hits = np.sort(self._tree.query(shapely.box(*low, *high)))
        if len(hits) == 0:
            return np.zeros(window.shape, bool)

        # Shifts by whole pixels are exact for coordinates in 1/256 pixel, so the result doesn't depend on the window.
        def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.asarray(np.round((xy - start) / scale * _STEPS_PER_PX) / _STEPS_PER_PX)

        shapes = zip(shapely.transform(self._polygons[hits], place), self._values[hits].tolist(), strict=True)
        shift = Affine.translation(window.col, window.row)
        return np.asarray(rasterize(shapes, out_shape=window.shape, transform=shift, fill=0, dtype="uint8"), bool)


def read_outlines(path: str, bounds: Window | None) -> PolygonMask:
    """Read outlines from GeoJSON of QuPath, XML of ASAP or any file of polygons; areas of `Ignore*` are cut out.

    Args:
        path: File; in QuPath's coordinates, unless it names another frame.
        bounds: Scanned area in pixels of level 0, from whose corner QuPath counts; None for all of level 0.

    Raises:
        InputError: The file can't be read, or has no polygons.
    """
    if not Path(path).exists():
        raise InputError(f"can't open {path}: no such file or directory; tissue must be auto, otsu or a file")
    frame = read_features(path, "classification", required=False)
    parts, owners = shapely.get_parts(shapely.force_2d(frame.geometry.to_numpy()), return_index=True)
    areas = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
    excluded = frame["classification"].map(is_ignored_class).to_numpy(bool)[owners[areas]]
    if excluded.all():
        raise InputError(f"{path} holds no polygons; draw the tissue's outlines, in pixels of level 0")
    polygons = parts[areas]
    if bounds is not None and slide_frame(frame) == "QuPath":
        polygons = shapely.transform(polygons, lambda xy: np.add(xy, (bounds.col, bounds.row)))
    return PolygonMask(np.asarray(polygons), excluded)
