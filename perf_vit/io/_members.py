"""The files behind a file: what a VRT, a tile index or a service reads its pixels from."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import rasterio
import shapely
from affine import Affine

from perf_vit.errors import DamagedDataError, InputError
from perf_vit.io._remote import is_remote
from perf_vit.types import Window

__all__ = [
    "beside_index",
    "check_members",
    "describe_index",
    "leads_to_server",
    "members_of",
    "open_tiles",
    "opens_members",
]

_SERVICES = frozenset({"WMS", "WMTS", "WCS", "STACIT", "STACTA", "EEDAI", "DAAS", "PLMOSAIC", "HTTP"})
_INDEX_ENDINGS = (".gti", ".gti.gpkg", ".gti.fgb", ".gti.parquet")
_INDEXES = frozenset({"VRT", "GTI"})
# Where GDAL looks for the files' names in a tile index that doesn't say.
_LOCATION_FIELDS = ("location", "assets.data.href", "assets.image.href")


@dataclass(frozen=True)
class _Index:
    """The files of a tile index, and where each lies in the index's CRS."""

    files: list[str]
    tree: shapely.STRtree


def opens_members(dataset: Any) -> bool:
    """Whether reading an open dataset opens further files."""
    return dataset.driver in _INDEXES | _SERVICES


def leads_to_server(dataset: Any, path: str) -> bool:
    """Whether some pixels of an open dataset come from a server.

    Args:
        dataset: an open rasterio dataset.
        path: where it was opened from.
    """
    return dataset.driver in _SERVICES or is_remote(path) or any(map(is_remote, members_of(dataset, path)))


def members_of(dataset: Any, path: str, known: frozenset[str] = frozenset()) -> list[str]:
    """The files that an open VRT or tile index reads, those of VRTs in it as well; none for other formats.

    Args:
        dataset: an open rasterio dataset.
        path: where it was opened from.
        known: VRTs that are not looked into, as they lead here.

    Raises:
        InputError: the tile index can't be read.
    """
    known |= {path}
    if dataset.driver == "GTI":
        files = list(_indexed(path, _modified_ns(path)).files)
    else:
        files = [file for file in dataset.files if file != path] if dataset.driver == "VRT" else []
    inner = [file for file in files if file.lower().endswith(".vrt") and file not in known]
    return [*files, *(member for file in inner for member in _members_at(file, known))]


def check_members(dataset: Any, path: str, window: Window, *, reduced: bool) -> None:
    """Refuse a window that a missing file should fill, where GDAL gives 0, as if it were data.

    Args:
        dataset: an open tile index or VRT, or what warps it; others pass.
        path: of the tile index or VRT.
        window: of the dataset.
        reduced: whether it is read at lower resolution: only then GDAL passes over missing files of a VRT.

    Raises:
        DamagedDataError: a file isn't there.
    """
    if reduced and dataset.driver == "VRT":
        for file in filter(_is_gone, members_of(dataset, path)):
            raise _missing(file, path, window)
    if not _is_index(path):
        return
    for file in filter(_is_gone, _files_around(dataset, path, window)):
        raise _missing(file, path, window)


def open_tiles(dataset: Any, path: str, window: Window) -> None:
    """Open the files of a tile index that a window meets: GDAL passes over those that it can't open.

    Args:
        dataset: an open tile index; others pass.
        path: of the tile index.
        window: of the dataset.

    Raises:
        RasterioIOError: one can't be opened.
    """
    if dataset.driver == "GTI":
        for file in _files_around(dataset, path, window):
            rasterio.open(file).close()


def _files_around(dataset: Any, path: str, window: Window) -> Iterator[str]:
    """The files of a tile index from which a window of it, or of what warps it, is read."""
    index = _indexed(path, _modified_ns(path))
    if dataset.driver == "GTI":
        around = shapely.box(*_bounds(dataset.transform, window))
    else:
        # GDAL warps in large pieces, and keeps one that failed: none of them is to be trusted.
        around = shapely.box(*shapely.total_bounds(index.tree.geometries))
    for number in index.tree.query(around).tolist():
        # Tiles that only touch the window give it no pixel.
        if index.tree.geometries[number].intersection(around).area > 0:
            yield index.files[number]


def _missing(file: str, path: str, window: Window) -> DamagedDataError:
    return DamagedDataError(
        f"can't read rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of {path}: its "
        f"file {file} isn't there; bring it back, or make {path} anew"
    )


def _members_at(path: str, known: frozenset[str]) -> list[str]:
    try:
        with rasterio.open(path) as dataset:
            return members_of(dataset, path, known)
    except rasterio.errors.RasterioIOError:
        return []


def _bounds(transform: Affine, window: Window) -> tuple[float, float, float, float]:
    """The box around a window's pixels, in CRS units."""
    corners = ((col, row) for col in (window.col, window.col_stop) for row in (window.row, window.row_stop))
    xs, ys = zip(*(transform @ corner for corner in corners), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _is_gone(file: str) -> bool:
    return _is_local(file) and not os.path.exists(file)


@functools.lru_cache(maxsize=8)
def _indexed(path: str, modified_ns: int) -> _Index:
    """The files of a tile index."""
    # Only a tile index needs it.
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
    """Where GDAL looks for a file of a tile index: beside what was named; with `GTI:`, in the working directory."""
    return file if path.startswith("GTI:") else os.path.join(os.path.dirname(path), file)


def describe_index(path: str) -> tuple[str, str | None, str | None]:
    """The table of a tile index, its layer and the field with the files' names."""
    path = path.removeprefix("GTI:")
    if not path.lower().endswith(".gti"):
        return path, None, None
    root = ElementTree.parse(path).getroot()
    index = root.findtext("IndexDataset", "")
    return index, root.findtext("IndexLayer"), root.findtext("LocationField")


def _is_index(path: str) -> bool:
    return path.startswith("GTI:") or path.lower().endswith(_INDEX_ENDINGS)


def _is_local(path: str) -> bool:
    return ":" not in path and not path.startswith("/vsi")


def _modified_ns(path: str) -> int:
    path = path.removeprefix("GTI:")
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0
