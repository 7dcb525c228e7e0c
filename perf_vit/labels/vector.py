"""Labels from polygons, burnt by window."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from rasterio.features import rasterize

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels._placement import (
    check_both_have_crs,
    check_on_pixels,
    check_on_slide,
    check_overlap,
    local_transform,
    transform_geometries,
)
from perf_vit.labels.classes import LabelClasses
from perf_vit.sources import RasterSource
from perf_vit.sources._qupath import FrameName
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.vector_file import read_features, slide_frame
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray, Window

__all__ = ["VectorLabels", "contain_pixel_centre", "to_pixels", "warn_of_polygons"]

# Half the diagonal of a pixel: a wider shape contains a pixel centre in any position.
_WIDEST = 0.7072

_CENTRES_AT_ONCE = 1_000_000

# Polygons with more pixel centres in their bounds are burnt: a river across a scene has millions.
_MANY_CENTRES = 1000

_BURNT_PX = 1 << 22


def contain_pixel_centre(polygons: npt.NDArray[Any]) -> BoolArray:
    """Return whether each polygon contains at least one pixel centre, [n].

    Args:
        polygons: Polygons in pixels, [n]; empty ones contain none.
    """
    left, top, right, bottom = shapely.bounds(polygons).reshape(-1, 4).T
    empty = shapely.is_empty(polygons)
    corners = np.where(empty, 0, np.ceil([left - 0.5, top - 0.5])).astype(np.int64)
    counts = np.where(empty, 0, np.floor([right - 0.5, bottom - 0.5]) - corners + 1).astype(np.int64).clip(0)
    numbers = counts.prod(axis=0)
    # The area of a shape is at most its perimeter times its inradius.
    thin = shapely.area(polygons) < _WIDEST * shapely.length(polygons)
    held = (numbers > 0) & ~thin
    unsure = np.flatnonzero((numbers > 0) & thin & (numbers <= _MANY_CENTRES))
    for part in np.array_split(unsure, max(1, -(-int(numbers[unsure].sum()) // _CENTRES_AT_ONCE))):
        held[part] = _hold_any(polygons[part], corners[:, part], counts[:, part])
    for index in np.flatnonzero(thin & (numbers > _MANY_CENTRES)).tolist():
        held[index] = _burns_any(polygons[index], corners[:, index].tolist(), counts[:, index].tolist())
    return held


def _hold_any(polygons: npt.NDArray[Any], corners: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> BoolArray:
    """Return whether polygons contain one of the centres in their bounds, [n]."""
    numbers = counts.prod(axis=0)
    owners = np.repeat(np.arange(len(polygons)), numbers)
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    x = corners[0, owners] + rank % counts[0, owners] + 0.5
    y = corners[1, owners] + rank // counts[0, owners] + 0.5
    inside = shapely.intersects_xy(polygons[owners], x, y)
    return np.bincount(owners[inside], minlength=len(polygons)) > 0


def _burns_any(polygon: Any, corner: list[int], count: list[int]) -> bool:
    """Return whether a polygon is burnt to any pixel, tested in strips of rows."""
    rows = max(1, _BURNT_PX // count[0])
    for row in range(corner[1], corner[1] + count[1], rows):
        shape = min(rows, corner[1] + count[1] - row), count[0]
        if rasterize([polygon], out_shape=shape, transform=Affine.translation(corner[0], row), dtype="uint8").any():
            return True
    return False


_STEPS_PER_PX = 256

_BLOCK_PX = 512


class VectorLabels:
    """Class indices from a file of polygons, built by `open_labels`.

    Polygons are kept in pixel coordinates rounded to 1/256 pixel. Shifts by whole pixels are then exact, and a pixel
    gets the same label whatever the window.

    Args:
        path: Vector file.
        source: Source with the grid to burn on.
        classes: Mapping of attribute values to class indices.
        attribute: Column with class names or values; None if all polygons are the one of two classes that isn't the
            background.
        background: Class index outside of polygons; None for `IGNORE_INDEX`.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose centre they contain.
        paired: Whether coordinates are pixels if the source has no CRS.

    Attributes:
        path: Vector file.
        is_on_source: Whether each feature with a geometry reaches into the source, [n].
        numbers: Numbers of these features in the file, from 1, [n].

    Raises:
        InputError: The file can't be read, or doesn't fit the source or the classes.
    """

    def __init__(
        self,
        path: str,
        source: RasterSource | SlideSource,
        classes: LabelClasses,
        attribute: str | None,
        background: int | None,
        *,
        all_touched: bool = False,
        paired: bool = False,
    ) -> None:
        in_pixels = paired and not isinstance(source, SlideSource) and source.crs is None
        options = {"required": background is None, "in_pixels": in_pixels}
        frame = _read_polygons(path, source, attribute, classes.skip_classes, **options)
        self._classes = classes
        self._num_classes = len(classes.values)
        if attribute is None:
            codes = np.full(len(frame), self._code_without_attribute(path, background), np.uint8)
        else:
            codes = _codes(path, frame, classes, attribute)
        # Parts of multipolygons are looked up separately, so distant parts are not burnt.
        parts, owners = shapely.get_parts(_mended(frame.geometry.to_numpy()), return_index=True)
        bounds = tuple(frame.total_bounds)
        place = local_transform(source, path, bounds) if in_pixels else _to_coordinates(source, slide_frame(frame))
        self._polygons = to_pixels(parts, place)
        self._codes = codes[owners]
        self._tree = shapely.STRtree(self._polygons)
        self._extent = source.extent
        self._fill = IGNORE_INDEX if background is None else background
        self.path = path
        self.is_on_source = np.zeros(len(frame), bool)
        self.is_on_source[owners[_reach_into(self._polygons, self._extent)]] = True
        self.numbers = _numbers(frame)
        self._all_touched = all_touched
        if not all_touched:
            self._warn_of_tiny(owners)
        self._warn_of_covered(owners)

    def read(self, window: Window) -> LabelArray:
        """Read class indices of a window of the source, [height, width]; `IGNORE_INDEX` for pixels without label.

        A pixel belongs to the polygon that contains its centre (or touches it, if `all_touched`); if there are several,
        to the last one in the file.
        """
        indices = np.full(window.shape, IGNORE_INDEX, np.uint8)
        shared = window.intersect(self._extent)
        if shared is not None:
            indices[shared.slices_in(window)] = self._burn(shared)
        return indices

    def close(self) -> None:
        """Do nothing, as the polygons are in memory."""

    def _burn(self, window: Window) -> LabelArray:
        hits = self._hits(window)
        return self._burnt(window, hits, self._codes[hits], fill=self._fill)

    def _hits(self, window: Window) -> npt.NDArray[np.int64]:
        """Return the indices of polygons that may reach into a window, in file order."""
        area = shapely.box(window.col, window.row, window.col_stop, window.row_stop)
        hits: npt.NDArray[np.int64] = np.sort(self._tree.query(area))
        return hits

    def _burnt(
        self, window: Window, hits: npt.NDArray[np.int64], values: int | npt.NDArray[np.uint8], *, fill: int
    ) -> LabelArray:
        if len(hits) == 0:
            return np.full(window.shape, fill, np.uint8)
        shapes = list(zip(self._polygons[hits], np.broadcast_to(values, len(hits)).tolist(), strict=True))
        if not self._all_touched:
            return _burn(shapes, window, fill)
        burnt = np.empty(window.shape, np.uint8)
        for block in _blocks_around(window):
            shared = block.intersect(window)
            assert shared is not None
            touched = _burn(shapes, block, fill, all_touched=True)
            burnt[shared.slices_in(window)] = touched[shared.slices_in(block)]
        return burnt

    def _warn_of_tiny(self, owners: npt.NDArray[np.int64]) -> None:
        """Warn about polygons on the source that label no pixel."""
        near = np.flatnonzero(_reach_into(self._polygons, self._extent))
        labelled = np.zeros(len(self.numbers), bool)
        labelled[owners[near[contain_pixel_centre(self._polygons[near])]]] = True
        what = "contain no pixel centre and label nothing (all_touched labels all pixels that polygons touch)"
        warn_of_polygons(what, self.is_on_source & ~labelled, self.numbers, self.path)

    def _warn_of_covered(self, owners: npt.NDArray[np.int64]) -> None:
        """Warn about polygons on the source that lie wholly under a later one of another class."""
        if len(np.unique(self._codes)) < 2:
            return
        # Of the two, the tree prepares the geometries that it is asked about, which are to be the larger ones.
        above, below = self._tree.query(self._polygons, predicate="covers")
        over = (owners[above] > owners[below]) & (self._codes[above] != self._codes[below])
        covered = np.zeros(len(self._polygons), bool)
        covered[below[over]] = True
        seen = np.zeros(len(self.numbers), bool)
        seen[owners[~covered]] = True
        what = "lie wholly under a later polygon of another class and label nothing (save larger areas first)"
        warn_of_polygons(what, self.is_on_source & ~seen, self.numbers, self.path)

    def _code_without_attribute(self, path: str, background: int | None) -> int:
        if not self._classes.explicit:
            return 1
        if self._num_classes != 2 or background is None:
            said = f"{self._num_classes} classes" if self._num_classes != 2 else "no background"
            raise InputError(
                f"polygons without attribute are the one of two classes that is not background, got {said}; set "
                f"attribute to the column of {path} with the class, or set the background"
            )
        return 1 - background


def _burn(shapes: Sequence[tuple[Any, int]], window: Window, fill: int, *, all_touched: bool = False) -> LabelArray:
    place = Affine.translation(window.col, window.row)
    burnt: LabelArray = rasterize(
        shapes, out_shape=window.shape, fill=fill, transform=place, all_touched=all_touched, dtype="uint8"
    )
    return burnt


def _blocks_around(window: Window) -> Iterator[Window]:
    """Yield blocks of a fixed grid that cover a window.

    Whether an edge through a pixel corner touches the pixel depends on GDAL's rounding errors and the origin of its
    canvas; on a fixed grid the result is the same for all windows.
    """
    for row in range(window.row // _BLOCK_PX, -(-window.row_stop // _BLOCK_PX)):
        for col in range(window.col // _BLOCK_PX, -(-window.col_stop // _BLOCK_PX)):
            yield Window(row * _BLOCK_PX, col * _BLOCK_PX, _BLOCK_PX, _BLOCK_PX)


def _to_coordinates(source: RasterSource | SlideSource, frame: FrameName) -> Affine:
    """Return the transform from a source's pixels to the coordinates of its polygons, of which slides have a frame."""
    return source.frame.transform(frame) if isinstance(source, SlideSource) else source.transform


def _read_polygons(
    path: str,
    source: RasterSource | SlideSource,
    attribute: str | None,
    skip_classes: Sequence[Any] = (),
    *,
    required: bool,
    in_pixels: bool,
) -> Any:
    """Read polygons and their attribute, in the source's CRS or in the frame of a slide that the file is in."""
    frame = _without_skipped(read_features(path, attribute), attribute, skip_classes)
    if not isinstance(source, SlideSource) and not in_pixels:
        check_both_have_crs(source, path, frame.crs)
    other = sorted(set(frame.geom_type) - {"Polygon", "MultiPolygon"})
    if other:
        raise InputError(f"{path} holds {', '.join(other)}; labels must be polygons (buffer lines and points first)")
    if frame.empty:
        if required:
            raise InputError(f"{path} holds no polygons; without a background class that leaves no label at all")
        warnings.warn(f"{path} holds no polygons: all of {source.path} is background", DataWarning, stacklevel=5)
        return frame
    _warn_of_flat(frame, path)
    if isinstance(source, SlideSource):
        check_on_slide(source, path, tuple(frame.total_bounds), slide_frame(frame))
        return frame
    if in_pixels:
        check_on_pixels(source, path, tuple(frame.total_bounds))
        return frame
    placed = transform_geometries(frame.geometry, path, source)
    check_overlap(source, path, tuple(shapely.total_bounds(placed)), tuple(frame.total_bounds), frame.crs)
    return frame.set_geometry(placed, crs=source.crs.to_wkt())


def _without_skipped(frame: Any, attribute: str | None, skip_classes: Sequence[Any]) -> Any:
    if not skip_classes or attribute is None or attribute not in frame:
        return frame
    column = frame[attribute]
    skipped = column.isin([name for name in skip_classes if name is not None])
    return frame[~(skipped | column.isna())] if None in skip_classes else frame[~skipped]


def _warn_of_flat(frame: Any, path: str) -> None:
    """Warn about polygons without area and about self-intersecting ones."""
    shapes = frame.geometry.to_numpy()
    flat = shapely.area(shapely.make_valid(shapes)) == 0
    crossed = ~shapely.is_valid(shapes) & ~flat
    warn_of_polygons("have no area and label nothing", flat, _numbers(frame), path)
    warn_of_polygons("intersect themselves; everything they enclose is labelled", crossed, _numbers(frame), path)


def _numbers(frame: Any) -> npt.NDArray[np.int64]:
    """Return the feature numbers in the file, of which some may be left out of the frame."""
    return np.asarray(frame.index.to_numpy() + 1, np.int64)


def warn_of_polygons(what: str, polygons: npt.NDArray[np.bool_], numbers: npt.NDArray[np.int64], path: str) -> None:
    """Warn about some polygons of a file, if any.

    Args:
        what: End of a sentence about them.
        polygons: True for these, [n].
        numbers: Numbers of all polygons in the file, [n].
        path: File.
    """
    if polygons.any():
        warnings.warn(
            f"{polygons.sum()} of {len(polygons)} polygons of {path} {what}; the first is number "
            f"{numbers[int(np.argmax(polygons))]}",
            DataWarning,
            stacklevel=7,
        )


def _mended(polygons: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Repair self-intersecting polygons to everything they enclose."""
    crossed = ~shapely.is_valid(polygons)
    mended = polygons.copy()
    mended[crossed] = shapely.make_valid(polygons[crossed], method="structure", keep_collapsed=False)
    return mended


def _reach_into(polygons: npt.NDArray[np.object_], extent: Window) -> npt.NDArray[np.bool_]:
    """Return which polygons (in pixels) reach into a window, by their bounds, [n]."""
    left, top, right, bottom = shapely.bounds(polygons).reshape(-1, 4).T
    rows, columns = (top < extent.row_stop) & (bottom > extent.row), (left < extent.col_stop) & (right > extent.col)
    return np.asarray(rows & columns)


def _codes(path: str, frame: Any, classes: LabelClasses, attribute: str) -> npt.NDArray[np.uint8]:
    """Return the class index of each feature."""
    if frame.empty:
        return np.zeros(0, np.uint8)
    column = frame[attribute]
    codes = {value: classes.index_of(value) for value in column.dropna().unique().tolist()}
    unknown = [value for value, code in codes.items() if code is None]
    nulls = column.isna().to_numpy()
    if nulls.any() and classes.index_of(None) is None:
        unknown.append(None)
    if unknown:
        raise InputError(_unknown_message(path, attribute, unknown, classes))
    found = np.full(len(column), IGNORE_INDEX, np.uint8)
    found[~nulls] = column[~nulls].map(codes).to_numpy(np.uint8)
    return found


def _unknown_message(path: str, attribute: str, unknown: Sequence[Any], classes: LabelClasses) -> str:
    shown = ", ".join("null" if value is None else str(value) or '""' for value in unknown[:8])
    names = f"{', '.join(classes.names)}, " if classes.names else ""
    return (
        f"{attribute} of {path} holds {shown}; the classes are {names}{classes.described_values()}: "
        f"add it to classes, values or ignore_values (ignore_values=[{shown}]), or leave it out with skip_classes"
    )


def to_pixels(polygons: npt.NDArray[Any], transform: Affine) -> npt.NDArray[Any]:
    """Transform polygons from CRS coordinates to pixels, rounded to 1/256 pixel."""
    inverse = ~transform

    def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        matrix = np.array([[inverse.a, inverse.d], [inverse.b, inverse.e]])
        pixels = xy @ matrix + (inverse.c, inverse.f)
        return np.asarray(np.round(pixels * _STEPS_PER_PX) / _STEPS_PER_PX)

    placed: npt.NDArray[Any] = shapely.transform(shapely.force_2d(polygons), place)
    return placed
