"""Local files behind what a user names as input."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyogrio
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from perf_vit.io._gdal import GDAL_ERRORS
from perf_vit.io._members import beside_index, describe_index
from perf_vit.io._remote import is_remote
from perf_vit.io._vector_file import split_layer

__all__ = ["input_files"]

_TILE_INDEXES = (".gti", ".gti.gpkg", ".gti.fgb", ".gti.parquet")
_VIRTUAL = (".vrt", *_TILE_INDEXES)


def input_files(given: Iterable[str | Path]) -> Iterator[tuple[str, Path]]:
    """All local files and folders that are read when inputs are.

    What folders hold, matches of patterns, members of virtual rasters, tile indexes and STAC items, members of these,
    and the files that GDAL reads beside a raster. URLs are left out.

    Args:
        given: files, folders, patterns, GDAL paths, URLs.

    Yields:
        (input as given, file or folder that exists).
    """
    for origin in [os.fspath(each) for each in given]:
        waiting, seen = [origin], set()
        while waiting:
            path = waiting.pop()
            if path in seen or is_remote(path):
                continue
            seen.add(path)
            if os.path.exists(path):
                yield origin, Path(path)
            if os.path.isdir(path):
                for file in _files_in(path):
                    yield origin, file
                    # To open all files of a folder of images would take long.
                    waiting += [str(file)] if file.name.lower().endswith(_VIRTUAL) else []
            waiting += _named_by(path)


def _files_in(folder: str) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (file for name in names if (file := Path(parent, name)).exists())


def _named_by(path: str) -> list[str]:
    """Files that a path names: by a pattern, or in the file."""
    if os.path.isdir(path):
        return []
    if not os.path.exists(path) and glob.has_magic(path):
        return [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    file, layer = split_layer(path)
    if layer is not None:
        return [file]
    if path.lower().endswith(".json"):
        return _stac_assets(path)
    index = path.removeprefix("GTI:")
    if path != index or index.lower().endswith(_TILE_INDEXES):
        return [index, *_indexed(path)]
    return _gdal_files(path)


def _gdal_files(path: str) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as dataset:
                return list(dataset.files)
    except GDAL_ERRORS:
        return []


def _stac_assets(path: str) -> list[str]:
    """Links of all assets of STAC items, whichever is read."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    items = content.get("features", [content]) if isinstance(content, dict) else content
    found = []
    for item in items if isinstance(items, list) else []:
        assets = item.get("assets") if isinstance(item, dict) else None
        for asset in assets.values() if isinstance(assets, dict) else ():
            link = asset.get("href") if isinstance(asset, dict) else None
            found += [str(link).removeprefix("file://")] if link else []
    return _beside(path, found)


def _indexed(path: str) -> list[str]:
    """Whatever may be a path in a GDAL tile index: texts of all its columns."""
    try:
        index, layer, _ = describe_index(path)
        table: Any = pyogrio.read_dataframe(index, layer=layer, read_geometry=False)
    except (ValueError, RuntimeError, OSError, SyntaxError):
        return []
    texts = table.select_dtypes(["object", "string"])
    return [index, *(beside_index(path, text) for name in texts for text in texts[name] if isinstance(text, str))]


def _beside(path: str, names: Iterable[str]) -> list[str]:
    """Names relative to a file, as they are if absolute."""
    return [os.path.join(os.path.dirname(path), name) for name in names]
