"""Members of virtual datasets (VRTs and tile indexes), and checks that they are readable."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary
from xml.etree import ElementTree

import rasterio
import rasterio.windows
import shapely
from affine import Affine
from rasterio.errors import RasterioIOError

from perf_vit.errors import DamagedDataError, InputError
from perf_vit.sources._remote import is_remote
from perf_vit.sources.files import TILE_INDEX_SUFFIXES
from perf_vit.types import Window

__all__ = [
    "MASK",
    "MEMBER_DRIVERS",
    "beside_index",
    "check_members",
    "check_sources",
    "describe_index",
    "leads_to_server",
    "members_of",
    "open_tiles",
]

_SERVICES = frozenset({"WMS", "WMTS", "WCS", "STACIT", "STACTA", "EEDAI", "DAAS", "PLMOSAIC", "HTTP"})

MEMBER_DRIVERS = _SERVICES | {"VRT", "GTI"}
"""GDAL's drivers whose datasets open further files when they are read."""

# Default fields in which GDAL looks for file names in a tile index.
_LOCATION_FIELDS = ("location", "assets.data.href", "assets.image.href")


@dataclass(frozen=True)
class _Index:
    """Files of a tile index, and their extents in its CRS."""

    files: list[str]
    tree: shapely.STRtree


def leads_to_server(dataset: Any, path: str) -> bool:
    """Return whether some pixels of an open dataset come from a server.

    Args:
        dataset: Open rasterio dataset.
        path: Path that it was opened from.
    """
    return dataset.driver in _SERVICES or is_remote(path) or any(map(is_remote, members_of(dataset, path)))


def members_of(dataset: Any, path: str, known: frozenset[str] = frozenset()) -> list[str]:
    """Return the files of an open VRT or tile index, including those of nested VRTs; none for other formats.

    Args:
        dataset: Open rasterio dataset.
        path: Path that it was opened from.
        known: VRTs that are already being searched.

    Raises:
        InputError: The tile index can't be read.
    """
    known |= {path}
    if dataset.driver == "GTI":
        files = list(_indexed(path, _modified_ns(path)).files)
    else:
        files = [file for file in dataset.files if file != path] if dataset.driver == "VRT" else []
    inner = [file for file in files if file.lower().endswith(".vrt") and file not in known]
    return [*files, *(member for file in inner for member in _members_at(file, known))]


def check_members(dataset: Any, path: str, window: Window, *, reduced: bool) -> None:
    """Check that the files of a window exist, as GDAL would return 0 as data for missing ones.

    Args:
        dataset: Open tile index or VRT, or a dataset that warps it; other datasets pass.
        path: Path of the tile index or VRT.
        window: Window of the dataset.
        reduced: Whether it is read at lower resolution; only then GDAL skips missing files of a VRT.

    Raises:
        DamagedDataError: A file is missing.
    """
    if reduced and dataset.driver == "VRT":
        for file in filter(_is_gone, members_of(dataset, path)):
            raise _missing(file, path, window)
    if not _is_index(path):
        return
    for file in filter(_is_gone, _files_around(dataset, path, window)):
        raise _missing(file, path, window)


def open_tiles(dataset: Any, path: str, window: Window) -> None:
    """Open the files of a tile index in a window, as GDAL skips those that it can't open.

    Args:
        dataset: Open tile index; other datasets pass.
        path: Path of the tile index.
        window: Window of the dataset.

    Raises:
        RasterioIOError: A file can't be opened.
    """
    if dataset.driver == "GTI":
        for file in _files_around(dataset, path, window):
            rasterio.open(file).close()


def _files_around(dataset: Any, path: str, window: Window) -> Iterator[str]:
    """Yield the files of a tile index that a window of it, or of a dataset that warps it, is read from."""
    index = _indexed(path, _modified_ns(path))
    if dataset.driver == "GTI":
        around = shapely.box(*_bounds(dataset.transform, window))
    else:
        # GDAL warps in large pieces and caches failed ones, so check all files.
        around = shapely.box(*shapely.total_bounds(index.tree.geometries))
    for number in index.tree.query(around).tolist():
        # Tiles that only touch the window contribute no pixels.
        if index.tree.geometries[number].intersection(around).area > 0:
            yield index.files[number]


def _missing(file: str, path: str, window: Window) -> DamagedDataError:
    return DamagedDataError(
        f"can't read rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of {path}: its "
        f"file {file} isn't there; restore it, or rebuild {path}"
    )


def _members_at(path: str, known: frozenset[str]) -> list[str]:
    try:
        with rasterio.open(path) as dataset:
            return members_of(dataset, path, known)
    except rasterio.errors.RasterioIOError:
        return []


def _bounds(transform: Affine, window: Window) -> tuple[float, float, float, float]:
    """Return the bounding box of a window's pixels, in CRS units."""
    corners = ((col, row) for col in (window.col, window.col_stop) for row in (window.row, window.row_stop))
    xs, ys = zip(*(transform @ corner for corner in corners), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _is_gone(file: str) -> bool:
    return _is_local(file) and not os.path.exists(file)


@functools.lru_cache(maxsize=8)
def _indexed(path: str, modified_ns: int) -> _Index:
    """Read the files of a tile index."""
    # Imported here, as only tile indexes need it.
    import pyogrio

    index, layer, field = describe_index(path)
    try:
        fields = pyogrio.read_info(index, layer=layer)["fields"].tolist()
        field = field or next(name for name in _LOCATION_FIELDS if name in fields)
        table = pyogrio.read_dataframe(index, layer=layer, columns=[field])
    except (StopIteration, OSError, ValueError, pyogrio.errors.DataSourceError) as error:
        raise InputError(f"can't list the files of the tile index {path}: {error or 'no field location'}") from error
    files = [beside_index(path, file) if _is_local(file) else file for file in table[field].tolist()]
    return _Index(files, shapely.STRtree(table.geometry.tolist()))


def beside_index(path: str, file: str) -> str:
    """Resolve a file of a tile index as GDAL does: relative to the index; with `GTI:`, to the working directory."""
    return file if path.startswith("GTI:") else os.path.join(os.path.dirname(path), file)


def describe_index(path: str) -> tuple[str, str | None, str | None]:
    """Return the table of a tile index, its layer and the field with the file names."""
    path = path.removeprefix("GTI:")
    if not path.lower().endswith(".gti"):
        return path, None, None
    root = ElementTree.parse(path).getroot()
    index = root.findtext("IndexDataset", "")
    return index, root.findtext("IndexLayer"), root.findtext("LocationField")


def _is_index(path: str) -> bool:
    return path.startswith("GTI:") or path.lower().endswith(TILE_INDEX_SUFFIXES)


def _is_local(path: str) -> bool:
    return ":" not in path and not path.startswith("/vsi")


def _modified_ns(path: str) -> int:
    path = path.removeprefix("GTI:")
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


MASK = 0


@dataclass(frozen=True)
class _Sources:
    """Files of each band of a VRT, and their extents in its pixels."""

    bands: list[int]
    files: list[str]
    tree: shapely.STRtree


_known: WeakKeyDictionary[Any, _Sources] = WeakKeyDictionary()


def check_sources(dataset: Any, window: Window, bands: Iterable[int], *, reduced: bool) -> None:
    """Check that all files of a VRT gave pixels for a window.

    Args:
        dataset: Open dataset; formats other than VRT pass.
        window: Window that was read.
        bands: Bands that were read, with `MASK` if masks were.
        reduced: Whether it was read at lower resolution, where GDAL doesn't report failures.

    Raises:
        RasterioIOError: A file can't be read.
    """
    if dataset.driver != "VRT" or (reduced and dataset.overviews(1)):
        return
    if dataset not in _known:
        _known[dataset] = _sources_of(dataset)
    sources, checked, wanted = _known[dataset], set(), set(bands)
    area = shapely.box(window.col, window.row, window.col_stop, window.row_stop)
    for number in sorted(sources.tree.query(area).tolist()):
        file, band = sources.files[number], sources.bands[number]
        part = sources.tree.geometries[number].intersection(area)
        whole = _has_files(file) and not reduced
        # A file that can't be opened gives no pixels; a nested VRT may give some.
        if part.area > 0 and band in wanted and (whole or file not in checked):
            checked.add(file)
            if band == MASK:
                _open_mask(file)
            else:
                _sum(dataset, band, file, part.bounds, window, whole=whole)


def _open_mask(file: str) -> None:
    """Read a mask instead of its checksum, which rasterio doesn't compute."""
    rasterio.open(file).close()


def _sum(dataset: Any, band: int, file: str, bounds: tuple[float, ...], window: Window, *, whole: bool) -> None:
    left, top, right, bottom = bounds
    if not whole:
        left, top = (left + right) / 2, (top + bottom) / 2
    col, row = min(int(left), window.col_stop - 1), min(int(top), window.row_stop - 1)
    width, height = (max(1, int(right) - col), max(1, int(bottom) - row)) if whole else (1, 1)
    try:
        dataset.checksum(band, rasterio.windows.Window(col, row, width, height))
    except RasterioIOError as error:
        raise RasterioIOError(f"its file {file} can't be read") from error.__cause__


def _sources_of(dataset: Any) -> _Sources:
    """Return the files of a VRT's bands; none for a warped VRT, for which GDAL reports all failures."""
    root = ElementTree.fromstring(dataset.tags(ns="xml:VRT")["xml:VRT"])
    found = list(itertools.chain.from_iterable(map(_sources_in, root.findall("VRTRasterBand"))))
    for band in root.findall(".//MaskBand/VRTRasterBand"):
        for source in band.findall("*/SourceFilename[@relativeToVRT='1']"):
            source.text = os.path.join(os.path.dirname(dataset.name), source.text or "")
        found.extend((MASK, file, rect) for _, file, rect in _sources_in(band))
    boxes = [_box(rect, dataset) for _, _, rect in found]
    return _Sources([band for band, _, _ in found], [file for _, file, _ in found], shapely.STRtree(boxes))


def _sources_in(band: ElementTree.Element) -> Iterator[tuple[int, str, ElementTree.Element | None]]:
    """Yield (band, file, extent) of each file of a band."""
    for source in band:
        file = source.findtext("SourceFilename")
        if file is not None:
            yield int(band.get("band", "1")), file, source.find("DstRect")


def _box(rect: ElementTree.Element | None, dataset: Any) -> Any:
    """Return a rectangle of a VRT's pixels; all of them by default."""
    if rect is None:
        return shapely.box(0, 0, dataset.width, dataset.height)
    left, top, width, height = (float(rect.get(name, "0")) for name in ("xOff", "yOff", "xSize", "ySize"))
    return shapely.box(left, top, left + width, top + height)


def _has_files(file: str) -> bool:
    return file.lower().endswith(".vrt") or file.startswith(("<VRT", "vrt://"))
