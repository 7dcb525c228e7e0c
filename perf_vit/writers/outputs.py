"""Checks of outputs against inputs and existing files, before anything is written."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyogrio
import rasterio

from perf_vit.errors import OutputError
from perf_vit.files import read_json_or_none
from perf_vit.sources import GEOTIFF_SUFFIXES, split_layer
from perf_vit.sources._gdal import GDAL_ERRORS, plain_images_allowed
from perf_vit.sources._members import beside_index, describe_index
from perf_vit.sources._remote import is_remote
from perf_vit.sources.files import TILE_INDEX_SUFFIXES, is_image_name, is_own
from perf_vit.sources.slide_files import SLIDES_OF_SEVERAL_FILES, is_dicom_folder, slide_members

__all__ = [
    "category_names_path",
    "check_map_name",
    "check_outputs",
    "existing_error",
    "existing_outputs",
    "input_files",
]

_VIRTUAL = (".vrt", *TILE_INDEX_SUFFIXES)


def check_map_name(out: Path) -> None:
    """Refuse a map whose name doesn't say that it is a GeoTIFF.

    Raises:
        OutputError: it doesn't end in .tif or .tiff.
    """
    if out.suffix.lower() not in GEOTIFF_SUFFIXES:
        raise OutputError(f"the map is a GeoTIFF: its name must end in .tif, got {out}; try {out.with_suffix('.tif')}")


def category_names_path(map_path: Path) -> Path:
    """Return the path of GDAL's metadata next to a raster, which holds the names of its values."""
    return map_path.with_name(f"{map_path.name}.aux.xml")


def input_files(
    given: Iterable[str | Path], opened: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Iterator[tuple[str, Path]]:
    """Yield all local files and folders that reading the inputs involves.

    These are the contents of folders, matches of globs, members of virtual rasters, tile indexes and STAC items (and
    members of these), and side-car files that GDAL reads with a raster. URLs are left out.

    Args:
        given: Files, folders, globs, GDAL paths, URLs.
        opened: Files that GDAL reads, of rasters that are open.

    Yields:
        (input as given, existing file or folder).
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
                for file in _files_in_slide(path) if is_dicom_folder(path) else _files_in(path):
                    yield origin, file
                    # Opening all files of an image folder would take long.
                    waiting += [str(file)] if file.name.lower().endswith(_VIRTUAL) else []
            waiting += _named_by(path, opened)


def _files_in(folder: str) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (file for name in names if (file := Path(parent, name)).exists())


def _files_in_slide(folder: str) -> Iterator[Path]:
    """Yield the DICOM files of a slide and the photos beside them, without outputs of earlier calls."""
    return (file for file in _files_in(folder) if is_image_name(file.name) and not is_own(file))


def _named_by(path: str, opened: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the files that a path refers to, by a glob or in the file."""
    if os.path.isdir(path):
        return []
    if not os.path.exists(path) and glob.has_magic(path):
        return [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    file, layer = split_layer(path)
    if layer is not None:
        return [file]
    if path.lower().endswith(".json"):
        return _stac_assets(path)
    if path.lower().endswith(SLIDES_OF_SEVERAL_FILES):
        return [str(member) for member in slide_members(path)]
    index = path.removeprefix("GTI:")
    if path != index or index.lower().endswith(TILE_INDEX_SUFFIXES):
        return [index, *_indexed(path)]
    return opened[path] if path in opened else _gdal_files(path)


def _gdal_files(path: str) -> list[str]:
    try:
        with plain_images_allowed(), rasterio.open(path) as dataset:
            return list(dataset.files)
    except GDAL_ERRORS:
        return []


def _stac_assets(path: str) -> list[str]:
    """Return the links of all assets of STAC items."""
    content = read_json_or_none(path)
    items = content.get("features", [content]) if isinstance(content, dict) else content
    found = []
    for item in items if isinstance(items, list) else []:
        assets = item.get("assets") if isinstance(item, dict) else None
        for asset in assets.values() if isinstance(assets, dict) else ():
            link = asset.get("href") if isinstance(asset, dict) else None
            found += [str(link).removeprefix("file://")] if link else []
    return _beside(path, found)


def _indexed(path: str) -> list[str]:
    """Return all possible paths in a GDAL tile index, i.e. the text of all columns."""
    try:
        index, layer, _ = describe_index(path)
        table: Any = pyogrio.read_dataframe(index, layer=layer, read_geometry=False)
    except (ValueError, RuntimeError, OSError, SyntaxError):
        return []
    texts = table.select_dtypes(["object", "string"])
    return [index, *(beside_index(path, text) for name in texts for text in texts[name] if isinstance(text, str))]


def _beside(path: str, names: Iterable[str]) -> list[str]:
    """Resolve names relative to a file's folder; absolute ones stay."""
    return [os.path.join(os.path.dirname(path), name) for name in names]


def check_outputs(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path | None], *, overwrite: bool = False
) -> None:
    """Check that outputs don't replace files of the user; called before anything is computed.

    Args:
        outputs: All output files of a job.
        inputs: All inputs of the job: files, folders, globs and lists, with their members; None and URLs are skipped.
            No file in an input folder may be replaced; in that of a DICOM slide, no DICOM file and no photo.
        overwrite: Whether outputs that exist and aren't inputs may be replaced.

    Raises:
        OutputError: An output is an input or part of one, is a folder, occurs twice, can't be written, or exists
            without `overwrite`.
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
    """Return the paths at which a file, folder or link exists."""
    return [path for path in outputs if os.path.lexists(_plain(path))]


def existing_error(path: Path, reason: str = "") -> OutputError:
    """Build the error for an existing output.

    Args:
        path: Output file.
        reason: How it differs from the file to write, such as ", but of another model".
    """
    return OutputError(f"{path} exists already{reason}; choose another output, or replace it with `overwrite=True`")


def _refuse_inputs(existing: Sequence[Path], inputs: Sequence[str | Path]) -> None:
    # Missing files can't be inputs, so members rarely have to be searched.
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
    """Normalise a path whose folders don't exist yet: `new/../a.tif` becomes `a.tif`."""
    return path if path.parent.exists() else Path(os.path.normpath(path))


def _identity(path: Path) -> tuple[int, int]:
    """Return the identity of a file, equal for all its names and links."""
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
