"""The files behind a file: what a VRT, a tile index or a service reads its pixels from."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import rasterio
from affine import Affine

from perf_vit.errors import DamagedDataError, InputError
from perf_vit.io._remote import is_remote
from perf_vit.types import Window

__all__ = ["check_members", "leads_to_server", "members_of", "opens_members"]

_SERVICES = frozenset({"WMS", "WMTS", "WCS", "STACIT", "STACTA", "EEDAI", "DAAS", "PLMOSAIC", "HTTP"})
_INDEXES = frozenset({"VRT", "GTI"})
# Where GDAL looks for the files' names in a tile index that doesn't say.
_LOCATION_FIELDS = ("location", "assets.data.href", "assets.image.href")


@dataclass(frozen=True)
class _Indexed:
    """A file of a tile index, and the box around it in the index's CRS."""

    path: str
    bounds: tuple[float, float, float, float]


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


def members_of(dataset: Any, path: str) -> list[str]:
    """The files that an open VRT or tile index reads, those of VRTs in it as well; none for other formats.

    Args:
        dataset: an open rasterio dataset.
        path: where it was opened from.

    Raises:
        InputError: the tile index can't be read.
    """
    if dataset.driver == "GTI":
        files = [file.path for file in _indexed(path, _modified_ns(path))]
    else:
        files = [file for file in dataset.files if file != path] if dataset.driver == "VRT" else []
    return [*files, *(inner for file in files if file.lower().endswith(".vrt") for inner in _members_at(file))]


def check_members(dataset: Any, path: str, window: Window) -> None:
    """Refuse a window of a tile index that a missing file should fill: GDAL gives 0 there, as if it were data.

    Raises:
        DamagedDataError: a file of the index isn't there.
    """
    missing = _missing(path, _modified_ns(path)) if dataset.driver == "GTI" else ()
    for file in missing:
        if _window_of(file, dataset.transform).intersect(window):
            raise DamagedDataError(
                f"can't read rows {window.row} to {window.row_stop}, columns {window.col} to {window.col_stop} of "
                f"{path}: {file.path} isn't there ({len(missing)} of its files are missing); bring it back, or make "
                "the index anew"
            )


def _members_at(path: str) -> list[str]:
    try:
        with rasterio.open(path) as dataset:
            return members_of(dataset, path)
    except rasterio.errors.RasterioIOError:
        return []


def _window_of(file: _Indexed, transform: Affine) -> Window:
    left, bottom, right, top = file.bounds
    cols, rows = zip(*(~transform @ corner for corner in ((left, top), (right, bottom))), strict=True)
    row, col = round(min(rows)), round(min(cols))
    return Window(row, col, round(max(rows)) - row, round(max(cols)) - col)


@functools.lru_cache(maxsize=8)
def _missing(path: str, modified_ns: int) -> tuple[_Indexed, ...]:
    files = _indexed(path, modified_ns)
    return tuple(file for file in files if _is_local(file.path) and not os.path.exists(file.path))


@functools.lru_cache(maxsize=8)
def _indexed(path: str, modified_ns: int) -> tuple[_Indexed, ...]:
    """The files of a tile index."""
    # Only a tile index needs it.
    import pyogrio

    index, layer, field = _describe(path)
    try:
        fields = pyogrio.read_info(index, layer=layer)["fields"].tolist()
        field = field or next(name for name in _LOCATION_FIELDS if name in fields)
        table = pyogrio.read_dataframe(index, layer=layer, columns=[field])
    except (StopIteration, OSError, ValueError, pyogrio.errors.DataSourceError) as error:
        raise InputError(f"can't list the files of the tile index {path}: {error or 'no field location'}") from error
    folder = os.path.dirname(index)
    bounds = table.geometry.bounds.to_numpy().tolist()
    return tuple(
        _Indexed(os.path.join(folder, file) if _is_local(file) else file, tuple(box))
        for file, box in zip(table[field].tolist(), bounds, strict=True)
    )


def _describe(path: str) -> tuple[str, str | None, str | None]:
    """The table of a tile index, its layer and the field with the files' names."""
    path = path.removeprefix("GTI:")
    if not path.lower().endswith(".gti"):
        return path, None, None
    root = ElementTree.parse(path).getroot()
    index = root.findtext("IndexDataset", "")
    return os.path.join(os.path.dirname(path), index), root.findtext("IndexLayer"), root.findtext("LocationField")


def _is_local(path: str) -> bool:
    return ":" not in path and not path.startswith("/vsi")


def _modified_ns(path: str) -> int:
    path = path.removeprefix("GTI:")
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0
