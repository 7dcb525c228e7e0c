"""Polygons of the areas of a class map, computed by block."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio.features
import shapely
from affine import Affine
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from perf_vit.errors import InputError
from perf_vit.sources._gdal import open_dataset, read_window
from perf_vit.types import IGNORE_INDEX, LabelArray, Window

__all__ = ["polygonize_classes"]

PolygonArray = npt.NDArray[Any]
IndexArray = npt.NDArray[np.int64]


def polygonize_classes(
    path: str | Path,
    *,
    skip: Collection[int] = (),
    nodata: int = IGNORE_INDEX,
    simplify_px: float = 0,
    min_area_px: float = 0,
    block_px: int = 2048,
) -> tuple[PolygonArray, IndexArray]:
    """Convert each connected area of a class to a polygon; pixels are connected by edges, not corners.

    The map is read in blocks, and the pieces of an area are joined across seams, so that blocks leave no trace in the
    result. Memory is linear in the number of polygons, whatever the size of the map.

    Args:
        path: Class map as written by `perf-vit predict`: one uint8 band.
        skip: Classes to leave out, such as the background.
        nodata: Value of the pixels without class.
        simplify_px: Maximum displacement of simplified outlines in pixels; 0 keeps all corners. Neighbours are
            simplified separately, so they may overlap or leave gaps of that width.
        min_area_px: Minimum area to keep, in pixels.
        block_px: Block size in pixels.

    Returns:
        Polygons in map pixels, [n], from top to bottom, and their classes, [n].

    Raises:
        InputError: The file can't be read, or is not a class map.
    """
    parts = [_block_polygons(labels, window, {*skip, nodata}) for window, labels in _blocks(str(path), block_px)]
    polygons, labels = _concatenated(parts)
    polygons, labels = _joined(polygons, labels, block_px)
    kept = shapely.area(polygons) >= min_area_px
    polygons, labels = polygons[kept], labels[kept]
    if simplify_px > 0:
        polygons = shapely.simplify(polygons, simplify_px, preserve_topology=True)
    left, top, _, _ = shapely.bounds(polygons).reshape(-1, 4).T
    order = np.lexsort((labels, left, top))
    return polygons[order], labels[order]


def _blocks(path: str, block_px: int) -> Iterator[tuple[Window, LabelArray]]:
    with open_dataset(path) as dataset:
        if dataset.count != 1 or dataset.dtypes[0] != "uint8":
            raise InputError(
                f"expected a class map with one uint8 band, {path} has {dataset.count} of {dataset.dtypes[0]}"
            )
        for row in range(0, dataset.height, block_px):
            for col in range(0, dataset.width, block_px):
                window = Window(row, col, min(block_px, dataset.height - row), min(block_px, dataset.width - col))
                yield window, read_window(dataset, path, window, indexes=1)


def _block_polygons(labels: LabelArray, window: Window, left_out: set[int]) -> tuple[PolygonArray, IndexArray]:
    mask = ~np.isin(labels, list(left_out))
    if not mask.any():
        return np.zeros(0, object), np.zeros(0, np.int64)
    place = Affine.translation(window.col, window.row)
    found = list(rasterio.features.shapes(labels, mask=mask, connectivity=4, transform=place))
    polygons = np.empty(len(found), object)
    polygons[:] = [shapely.Polygon(shape["coordinates"][0], shape["coordinates"][1:]) for shape, _ in found]
    return polygons, np.array([value for _, value in found], np.int64)


def _concatenated(parts: list[tuple[PolygonArray, IndexArray]]) -> tuple[PolygonArray, IndexArray]:
    return np.concatenate([polygons for polygons, _ in parts]), np.concatenate([labels for _, labels in parts])


def _joined(polygons: PolygonArray, labels: IndexArray, block_px: int) -> tuple[PolygonArray, IndexArray]:
    """Join pieces of a class that share an edge along a seam."""
    at_seam = np.flatnonzero((shapely.bounds(polygons).reshape(-1, 4) % block_px == 0).any(axis=1))
    first, second = _touching(polygons[at_seam], labels[at_seam])
    size = len(at_seam)
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(size, size))
    groups = connected_components(links, directed=False)[1] if size else np.zeros(0, np.int64)
    order = np.argsort(groups, kind="stable")
    members = np.split(at_seam[order], np.flatnonzero(np.diff(groups[order])) + 1) if size else []
    several = [group for group in members if len(group) > 1]
    if not several:
        return polygons, labels
    whole = np.ones(len(polygons), bool)
    whole[np.concatenate(several)] = False
    united = np.empty(len(several), object)
    united[:] = [_unite(polygons[group]) for group in several]
    return (
        np.concatenate([polygons[whole], united]),
        np.concatenate([labels[whole], labels[[group[0] for group in several]]]),
    )


def _touching(polygons: PolygonArray, labels: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Return pairs of polygons of a class that share more than corners."""
    if len(polygons) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first, second = shapely.STRtree(polygons).query(polygons)
    wanted = (first < second) & (labels[first] == labels[second])
    first, second = first[wanted], second[wanted]
    shared = shapely.relate_pattern(polygons[first], polygons[second], "F***1****")
    return first[shared], second[shared]


def _unite(pieces: PolygonArray) -> Any:
    # Simplify with tolerance 0 to remove corners that seams left on straight lines.
    return shapely.simplify(shapely.union_all(pieces), 0, preserve_topology=True)
