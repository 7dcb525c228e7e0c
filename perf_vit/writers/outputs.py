"""Outputs checked against inputs and existing files before anything is written."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyogrio
import rasterio
from rasterio.errors import NotGeoreferencedWarning

from perf_vit.errors import OutputError
from perf_vit.sources import split_layer
from perf_vit.sources._gdal import GDAL_ERRORS
from perf_vit.sources._members import beside_index, describe_index
from perf_vit.sources._remote import is_remote
from perf_vit.sources.files import TILE_INDEX_SUFFIXES

__all__ = ["check_outputs", "existing_error", "existing_outputs", "input_files"]

_VIRTUAL = (".vrt", *TILE_INDEX_SUFFIXES)


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
    if path != index or index.lower().endswith(TILE_INDEX_SUFFIXES):
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


def check_outputs(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path | None], *, overwrite: bool = False
) -> None:
    """Refuse outputs that would destroy a file of the user; called before anything is computed.

    Args:
        outputs: all files of a job.
        inputs: all that the job reads: files, folders, patterns and lists, with their members; None and URLs are
            passed over. No file of an input folder may be replaced.
        overwrite: allow outputs that exist and are no inputs.

    Raises:
        OutputError: an output is an input or part of one, is a folder, is named twice, lies where nothing can be
            written, or exists without `overwrite`.
    """
    paths = [Path(path) for path in outputs]
    existing = existing_outputs(paths)
    _refuse_inputs(existing, [each for each in inputs if each is not None])
    _refuse_twice(paths)
    for path in paths:
        _check_place(path)
    if existing and not overwrite:
        raise existing_error(existing[0])


def existing_outputs(outputs: Iterable[Path]) -> list[Path]:
    """Those of some paths where a file, a folder or a link is."""
    return [path for path in outputs if os.path.lexists(_plain(path))]


def existing_error(path: Path, reason: str = "") -> OutputError:
    """The error that says that an output exists and what to do.

    Args:
        path: the output.
        reason: why it is not what would be written, as in ", but of another model".
    """
    return OutputError(f"{path} exists already{reason}; choose another output, or replace it with `overwrite=True`")


def _refuse_inputs(existing: Sequence[Path], inputs: Sequence[str | Path]) -> None:
    # A file that doesn't exist is no input, so members need not be looked for in most cases.
    by_identity = {_identity(_plain(path)): path for path in existing if _plain(path).exists()}
    if not by_identity:
        return
    for origin, file in input_files(inputs):
        path = by_identity.get(_identity(file))
        if path is not None:
            whole = os.path.exists(origin) and os.path.samefile(origin, file)
            raise OutputError(
                f"{path} would replace {'' if whole else 'a part of '}the input {origin}; choose another output"
            )


def _plain(path: Path) -> Path:
    """A path whose folders are made as it is written, without dots: `new/../a.tif` becomes `a.tif`."""
    return path if path.parent.exists() else Path(os.path.normpath(path))


def _identity(path: Path) -> tuple[int, int]:
    """The same for all names of a file, by links of both kinds."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _refuse_twice(paths: Sequence[Path]) -> None:
    taken: set[str] = set()
    for path in paths:
        name = os.path.abspath(path)
        if name in taken:
            raise OutputError(f"{path} would be written twice by one command; choose another output or its suffix")
        taken.add(name)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"can't write {path}: it is a folder; choose a file in it")
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise OutputError(f"can't write {path}: a parent is not a folder; choose another output")
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"can't write {path}: permission denied; choose another output")
