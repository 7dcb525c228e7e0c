"""Pixel grids of rasters, and the common grid of a mosaic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from affine import Affine

from perf_vit.errors import InputError
from perf_vit.sources._gdal import crs_name
from perf_vit.sources.pixel_size import PixelSize, unit_of
from perf_vit.types import Window

__all__ = ["Bounds", "Grid", "GridOptions", "bounds_of", "check_scale", "target_grid"]

Bounds = tuple[float, float, float, float]
"""Bounds (left, bottom, right, top) in CRS units."""

# Tolerance in pixels for rounded coordinates in files.
_SAME_PX = 0.01
# Tiles of the next UTM zone may have pixels of 9.99 m instead of 10 m, which don't count as finer.
_FINER = 0.9
# Larger ratios of requested to native pixel size are mistakes.
_ABSURD = 1000


@dataclass(frozen=True)
class Grid:
    """Pixel grid in a CRS."""

    crs: Any
    transform: Affine
    height: int
    width: int

    @property
    def extent(self) -> Window:
        """Window of all pixels."""
        return Window(0, 0, self.height, self.width)

    @property
    def bounds(self) -> Bounds:
        """Bounds (left, bottom, right, top) in CRS units; for rotated grids those of the box around them."""
        return bounds_of(self.transform, self.height, self.width)

    @property
    def resolution(self) -> tuple[float, float]:
        """Width and height of a pixel in CRS units, positive."""
        return abs(self.transform.a), abs(self.transform.e)

    def window_in(self, other: Grid) -> Window | None:
        """Return the window of another grid with exactly this grid's pixels; None if the grids aren't aligned."""
        if self.crs != other.crs:
            return None
        to_other = ~other.transform @ self.transform
        col, row = (math.floor(value + 0.5) for value in to_other @ (0, 0))
        corners = ((0, 0), (self.width, 0), (0, self.height), (self.width, self.height))
        for x, y in corners:
            placed = to_other @ (x, y)
            if abs(placed[0] - x - col) > _SAME_PX or abs(placed[1] - y - row) > _SAME_PX:
                return None
        return Window(row, col, self.height, self.width)

    def window_of(self, bounds: Bounds) -> Window:
        """Return the smallest window of whole pixels around bounds in this grid's CRS."""
        left, bottom, right, top = bounds
        xs, ys = zip(*(~self.transform @ corner for corner in ((left, top), (right, bottom))), strict=True)
        col, row = math.floor(min(xs) + _SAME_PX), math.floor(min(ys) + _SAME_PX)
        return Window(row, col, math.ceil(max(ys) - _SAME_PX) - row, math.ceil(max(xs) - _SAME_PX) - col)

    def cut(self, window: Window) -> Grid:
        """Return the grid of a window's pixels."""
        shifted = self.transform @ Affine.translation(window.col, window.row)
        return Grid(self.crs, shifted, window.height, window.width)


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Options for the grid, described in `open_source`."""

    crs: Any = None
    resolution: float | tuple[float, float] | PixelSize | None = None
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        if self.bounds is not None and not _ordered(self.bounds):
            raise InputError(f"bounds must be left < right and bottom < top in CRS units, got {self.bounds}")
        given = self.resolution.size if isinstance(self.resolution, PixelSize) else self.resolution
        if given is not None and not all(math.isfinite(r) and r > 0 for r in _pair(given)):
            raise InputError(f"resolution must be positive CRS units, or a pair of them, got {given}")


def bounds_of(transform: Affine, height: int, width: int) -> Bounds:
    """Return the bounds (left, bottom, right, top) of all pixels, in CRS units."""
    xs, ys = zip(*(transform @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def check_scale(grids: Sequence[Grid], resolution: float | tuple[float, float] | PixelSize, path: str) -> None:
    """Check that a requested pixel size is plausible, to detect wrong units.

    Args:
        grids: Grids of the tiles, in one CRS.
        resolution: Requested pixel size.
        path: Path, for errors.

    Raises:
        InputError: Pixels are a thousand times larger or smaller than the finest tile's, or the scene becomes one
            pixel.
    """
    asked, own = _pair(resolution), _finest(grids)
    factors = [one / side for one, side in zip(asked, own, strict=True)]
    left, bottom, right, top = _union([grid.bounds for grid in grids])
    width, height = (right - left) / asked[0], (top - bottom) / asked[1]
    in_one_pixel = max(width, height) <= 1 < max(factors)
    if in_one_pixel or max(factors) > _ABSURD or min(factors) < 1 / _ABSURD:
        raise InputError(
            f"resolution {asked[0]:g} x {asked[1]:g} makes {math.ceil(height):,} x {math.ceil(width):,} px of {path}, "
            f"whose pixels are {own[0]:g} x {own[1]:g}; it is in units of the CRS, here {unit_of(grids[0].crs)[0]} "
            f"({crs_name(grids[0].crs)}): give a size in these, or another crs as well"
        )


def target_grid(grids: Sequence[Grid], options: GridOptions, *, anchored: bool) -> Grid:
    """Return the grid that tiles are read on.

    Args:
        grids: Grids of the tiles, in the target CRS.
        options: Requested grid; unset options follow from the tiles: finest resolution, union of bounds.
        anchored: Whether the first grid is the first tile's own, so that pixels should be aligned with it.

    Raises:
        InputError: The grid has no pixels.
    """
    x_res, y_res = _pair(options.resolution) if options.resolution else _finest(grids)
    union = options.bounds or _union([grid.bounds for grid in grids])
    begin = grids[0].bounds if anchored else union
    if options.bounds and options.resolution:
        begin = options.bounds
    # South-up tiles keep their pixels; a chosen resolution or CRS gives a north-up grid.
    down = grids[0].transform.e > 0 and anchored and options.resolution is None
    corner = (begin[0], begin[1] if down else begin[3])
    endless = Grid(grids[0].crs, Affine(x_res, 0, corner[0], 0, y_res if down else -y_res, corner[1]), 1, 1)
    window = endless.window_of(union)
    if window.height < 1 or window.width < 1:
        raise InputError(f"bounds {union} hold no pixel of {x_res:g} x {y_res:g} CRS units")
    return endless.cut(window)


def _pair(resolution: float | tuple[float, float] | PixelSize) -> tuple[float, float]:
    if isinstance(resolution, (int, float)):
        return float(resolution), float(resolution)
    # Already converted to CRS units.
    assert not isinstance(resolution, PixelSize)
    x_res, y_res = resolution
    return float(x_res), float(y_res)


def _finest(grids: Sequence[Grid]) -> tuple[float, float]:
    chosen = grids[0].resolution
    for grid in grids[1:]:
        if math.prod(grid.resolution) < math.prod(chosen) * _FINER**2:
            chosen = grid.resolution
    return chosen


def _union(bounds: Sequence[Bounds]) -> Bounds:
    lefts, bottoms, rights, tops = zip(*bounds, strict=True)
    return min(lefts), min(bottoms), max(rights), max(tops)


def _ordered(bounds: Bounds) -> bool:
    return len(bounds) == 4 and all(map(math.isfinite, bounds)) and bounds[0] < bounds[2] and bounds[1] < bounds[3]
