"""Coordinates of a slide: its file, QuPath, micrometres and the pixels that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine

from perf_vit.sources._qupath import FrameName
from perf_vit.types import BoolArray, Window

__all__ = ["SlideFrame", "inside_bounds"]


@dataclass(frozen=True, slots=True)
class SlideFrame:
    """Transforms between the coordinates of a slide; every exchange with other programs goes through it.

    Files of some scanners (MIRAX, Leica, Zeiss) hold an area in which the slide was scanned, the bounds, and QuPath
    shows this area only: its coordinates are pixels of level 0 from the upper left corner of the bounds. Slides
    without bounds have the same coordinates in QuPath and in level 0.

    Attributes:
        to_level0: Transform from pixels of the source to pixels of level 0.
        bounds: Scanned area in pixels of level 0; all of level 0 for slides without bounds.
        mpp_xy: Micrometres per pixel of level 0; None if unknown.
    """

    to_level0: Affine
    bounds: Window
    mpp_xy: tuple[float, float] | None

    @property
    def to_qupath(self) -> Affine:
        """Transform from pixels of the source to QuPath's coordinates."""
        return Affine.translation(-self.bounds.col, -self.bounds.row) @ self.to_level0

    @property
    def to_micrometres(self) -> Affine | None:
        """Transform from pixels of the source to micrometres, as QuPath shows them; None if their size is unknown."""
        return None if self.mpp_xy is None else Affine.scale(*self.mpp_xy) @ self.to_qupath

    @property
    def pixel_um_xy(self) -> tuple[float, float] | None:
        """Width and height of a pixel of the source in micrometres; None if unknown."""
        place = self.to_micrometres
        return None if place is None else (place.a, place.e)

    def transform(self, name: FrameName) -> Affine:
        """Return the transform from pixels of the source to a frame."""
        return self.to_qupath if name == "QuPath" else self.to_level0

    def size_xy(self, name: FrameName, level0: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height of a frame, from the size (height, width) of level 0."""
        return (self.bounds.width, self.bounds.height) if name == "QuPath" else (level0[1], level0[0])

    def in_source(self, geometries: npt.NDArray[Any], name: FrameName) -> npt.NDArray[Any]:
        """Return geometries of a frame in pixels of the source, [n]."""
        place = self.transform(name)
        if place.is_identity or len(geometries) == 0:
            return geometries
        scale, shift = np.array([place.a, place.e]), np.array([place.c, place.f])
        moved: npt.NDArray[Any] = shapely.transform(geometries, lambda xy: (xy - shift) / scale)
        return moved

    def described(self) -> dict[str, Any]:
        """Return the frame of exported coordinates as plain values, which outputs hold."""
        return {
            "frame": "QuPath",
            "frame_unit": "pixel of level 0",
            "frame_origin_level0_px": [self.bounds.col, self.bounds.row],
        }

    def tags(self) -> dict[str, str]:
        """Return the frame of the source's own pixels as text, which maps hold."""
        place = self.to_qupath
        return {
            "PERF_VIT_FRAME": f"QuPath: x = {place.a:.9g} * column + {place.c:.9g}, y = {place.e:.9g} * row + "
            f"{place.f:.9g}, in pixels of level 0 from ({self.bounds.col}, {self.bounds.row})"
        }


def inside_bounds(bounds: Window, downsample_yx: tuple[float, float], window: Window) -> BoolArray | None:
    """Return which pixels of a level have their centre inside the bounds of a slide, [h, w]; None if all have.

    Args:
        bounds: Bounds in pixels of level 0.
        downsample_yx: Height and width of the level's pixels, in pixels of level 0.
        window: Window of the level.
    """
    y = (np.arange(window.row, window.row_stop) + 0.5) * downsample_yx[0]
    x = (np.arange(window.col, window.col_stop) + 0.5) * downsample_yx[1]
    rows = (y >= bounds.row) & (y < bounds.row_stop)
    cols = (x >= bounds.col) & (x < bounds.col_stop)
    return None if rows.all() and cols.all() else np.logical_and.outer(rows, cols)
