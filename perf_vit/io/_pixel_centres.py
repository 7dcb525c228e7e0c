"""Which polygons hold the centre of a pixel, and so label one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import rasterize

from perf_vit.types import BoolArray

__all__ = ["hold_pixel_centre"]

# Half the diagonal of a pixel: a wider shape holds a centre wherever it lies.
_WIDEST = 0.7072
_CENTRES_AT_ONCE = 1_000_000
# Of more centres, a polygon is burnt: a river across a scene has millions in its bounds.
_MANY_CENTRES = 1000
_BURNT_PX = 1 << 22


def hold_pixel_centre(polygons: npt.NDArray[Any]) -> BoolArray:
    """Whether each polygon holds the centre of at least one pixel, [n].

    Args:
        polygons: in pixels, [n]; empty ones hold none.
    """
    left, top, right, bottom = shapely.bounds(polygons).reshape(-1, 4).T
    empty = shapely.is_empty(polygons)
    corners = np.where(empty, 0, np.ceil([left - 0.5, top - 0.5])).astype(np.int64)
    counts = np.where(empty, 0, np.floor([right - 0.5, bottom - 0.5]) - corners + 1).astype(np.int64).clip(0)
    numbers = counts.prod(axis=0)
    # The area of a shape is at most its perimeter times the radius of the largest circle inside.
    thin = shapely.area(polygons) < _WIDEST * shapely.length(polygons)
    held = (numbers > 0) & ~thin
    unsure = np.flatnonzero((numbers > 0) & thin & (numbers <= _MANY_CENTRES))
    for part in np.array_split(unsure, max(1, -(-int(numbers[unsure].sum()) // _CENTRES_AT_ONCE))):
        held[part] = _hold_any(polygons[part], corners[:, part], counts[:, part])
    for index in np.flatnonzero(thin & (numbers > _MANY_CENTRES)).tolist():
        held[index] = _burns_any(polygons[index], corners[:, index].tolist(), counts[:, index].tolist())
    return held


def _hold_any(polygons: npt.NDArray[Any], corners: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> BoolArray:
    """Whether polygons hold one of the centres in their bounds, [n]."""
    numbers = counts.prod(axis=0)
    owners = np.repeat(np.arange(len(polygons)), numbers)
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    x = corners[0, owners] + rank % counts[0, owners] + 0.5
    y = corners[1, owners] + rank // counts[0, owners] + 0.5
    inside = shapely.intersects_xy(polygons[owners], x, y)
    return np.bincount(owners[inside], minlength=len(polygons)) > 0


def _burns_any(polygon: Any, corner: list[int], count: list[int]) -> bool:
    """Whether a polygon is burnt to a pixel, strip of rows by strip until one is."""
    rows = max(1, _BURNT_PX // count[0])
    for row in range(corner[1], corner[1] + count[1], rows):
        shape = min(rows, corner[1] + count[1] - row), count[0]
        if rasterize([polygon], out_shape=shape, transform=Affine.translation(corner[0], row), dtype="uint8").any():
            return True
    return False
