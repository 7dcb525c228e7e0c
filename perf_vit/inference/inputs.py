"""What to map, and where each map goes: files, folders, globs and lists."""

from __future__ import annotations

import csv
import glob
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from perf_vit.errors import DataWarning, InputError, OutputError, reason_line
from perf_vit.labels.tables import check_number_of_cells
from perf_vit.sources import (
    GEOTIFF_SUFFIXES,
    PARQUET_SUFFIXES,
    PICTURE_SUFFIXES,
    find_reader,
    image_name,
    images_at,
    is_image_folder,
)
from perf_vit.sources.image_search import image_root
from perf_vit.writers import check_outputs

__all__ = ["MapInput", "find_inputs", "find_paths", "is_one_file", "resolve_one", "scene_files"]

_LISTS = PARQUET_SUFFIXES | {".csv"}

_OUTPUT_COLUMN = "output"

_NOWHERE = Path(os.devnull)
"""In place of an output folder where there is none: no image lies below a file."""
_QUICKLOOK = ".png"
"""Suffix of the picture beside a map."""


@dataclass(frozen=True, slots=True)
class MapInput:
    """One input of many.

    Attributes:
        path: a file, a URL or a GDAL path.
        output: the map that it becomes.
    """

    path: str
    output: Path


def resolve_one(given: Sequence[str], output: Path) -> list[str]:
    """Inputs, but for a glob that finds one file, that file, if the output is a file too."""
    if len(given) != 1 or not _is_glob(given[0]) or not output.suffix or output.is_dir():
        return list(given)
    with suppress(InputError):
        found = images_at(Path(given[0]))
        return [str(found[0])] if len(found) == 1 else list(given)
    return list(given)


def is_one_file(given: Sequence[str | Path]) -> bool:
    """Whether inputs are a single image, not a folder, a glob or a list, however many images that may hold."""
    if len(given) != 1:
        return False
    path = Path(given[0])
    is_folder = path.is_dir() and not is_image_folder(path)
    return not (is_folder or _is_glob(os.fspath(given[0])) or path.suffix.lower() in _LISTS)


def find_inputs(given: Sequence[str | Path], folder: str | Path, *, path_column: str = "path") -> list[MapInput]:
    """All inputs and their maps in a folder.

    A folder is searched with its sub-folders, and the maps keep this structure: `scenes/a/1.tif` of `scenes` becomes
    `a/1.tif`. Likewise a glob, where `**` stands for any folders: below its part without wildcards. What lies in the
    output's folder is no input. A list is a CSV file or a (Geo)Parquet file with a column of paths, relative to the
    list's folder; a column `output` may name the maps, relative to the output's folder.

    Args:
        given: files, URLs, folders, globs and lists.
        folder: where maps go.
        path_column: of lists.

    Returns:
        Inputs in the order given, those of a folder or glob by name.

    Raises:
        InputError: nothing is there, or a list has no such column.
        OutputError: two maps would have one name, or a map would replace an input.
    """
    folder = Path(folder)
    found: dict[MapInput, None] = {}
    for item in given:
        for each in _expand(os.fspath(item), folder, path_column):
            _check_inside(each.output, folder, f"the map of {each.path}")
            found[each] = None
    _check_names(list(found))
    return list(found)


def scene_files(given: str) -> str:
    """What of an input that is read as one scene may not be replaced: of a folder, the files in it, as a pattern.

    Sub-folders are not read, so outputs may lie there.
    """
    is_folder = os.path.isdir(given) and not is_image_folder(given)
    return os.path.join(glob.escape(given), "*") if is_folder else given


def find_paths(
    given: Sequence[str | Path], *, path_column: str = "path", outputs: str | Path | None = None
) -> list[str]:
    """All inputs of what makes no maps, each once; see `find_inputs`.

    Args:
        given: files, URLs, folders, globs and lists.
        path_column: of lists.
        outputs: a folder whose files are left out of folders and globs that hold it.

    Raises:
        InputError: nothing is there, or a list has no such column.
    """
    found: dict[str, None] = {}
    for item in [os.fspath(each) for each in given]:
        paths = [each.path for each in _expand(item, _NOWHERE, path_column)]
        if outputs is not None and (os.path.isdir(item) or _is_glob(item)):
            mine = Path(outputs).resolve()
            paths = [path for path in paths if not Path(path).resolve().is_relative_to(mine)]
            if not paths:
                raise InputError(f"found no image in {item} but those in {outputs}, where outputs go")
        found.update(dict.fromkeys(paths))
    return list(found)


def _expand(item: str, folder: Path, path_column: str) -> Iterator[MapInput]:
    path = Path(item)
    if path.suffix.lower() in _LISTS:
        yield from _listed(path, folder, path_column)
    elif _is_glob(item):
        yield from _below(image_root(path), images_at(path), folder, item)
    elif path.is_dir() and not is_image_folder(path):
        yield from _below(path, images_at(path), folder, item)
    else:
        yield MapInput(item, folder / _map_name(item))


def _below(root: Path, images: Sequence[Path], folder: Path, given: str) -> Iterator[MapInput]:
    """Images and their maps, whose folders are those below a root."""
    mine = folder.resolve()
    inside = mine != root.resolve() and mine.is_relative_to(root.resolve())
    images = [image for image in images if not (inside and image.resolve().is_relative_to(mine))]
    if not images:
        raise InputError(f"no image in {given} but those in {folder}, where outputs go")
    for image in sorted(images) if folder == _NOWHERE else _without_previews(images):
        yield MapInput(str(image), folder / image.relative_to(root).with_name(_map_name(image)))


def _without_previews(images: Sequence[Path]) -> list[Path]:
    """Images but for pictures beside a raster or slide of the same name: both would become one map."""
    pictures = {image for image in images if image.suffix.lower() in PICTURE_SUFFIXES}
    names = {image.with_name(image_name(image)) for image in set(images) - pictures}
    previews = {image for image in pictures if image.with_name(image_name(image)) in names}
    if previews:
        warnings.warn(
            f"{len(previews)} of {len(images)} images are taken as previews of the rasters beside them and left out, "
            f"the first {min(previews)}; name one itself to map it",
            DataWarning,
            stacklevel=4,
        )
    return sorted(set(images) - previews)


def _listed(path: Path, folder: Path, path_column: str) -> Iterator[MapInput]:
    rows = _read_list(path, path_column)
    if not rows:
        raise InputError(f"expected paths in the list {path}, got no row")
    for number, (image, output) in enumerate(rows, 1):
        if not image:
            raise InputError(f"{path}: row {number} has no {path_column}")
        if "\0" in image + output:
            raise InputError(f"{path}: row {number} has a null byte in {image + output!r}; no file has such a name")
        image = _beside(path.parent, image)
        name = output or _map_name(image)
        place = folder / (name if Path(name).suffix else f"{name}.tif")
        if folder != _NOWHERE:
            _check_inside(place, folder, f"{path}: {_OUTPUT_COLUMN} of row {number}, {name},")
        yield MapInput(image, place)


def _beside(folder: Path, name: str) -> str:
    """What a list in a folder names: a path, a URL, or a dataset such as NETCDF:file.nc:variable."""
    if _is_remote(name) or ":" not in name or Path(name).is_absolute() or (folder / name).exists():
        return name if _is_remote(name) else str(folder / name)
    parts = name.split(":")
    for index, part in enumerate(parts):
        bare = part.strip('"')
        if index and bare and (folder / bare).exists():
            parts[index] = part.replace(bare, str(folder / bare))
            break
    return ":".join(parts)


def _read_list(path: Path, path_column: str) -> list[tuple[str, str]]:
    """(path, output) of each row, "" where there is none."""
    try:
        if path.suffix.lower() in PARQUET_SUFFIXES:
            names = pyarrow.parquet.read_schema(path).names
            wanted = [name for name in (path_column, _OUTPUT_COLUMN) if name in names]
            rows = pyarrow.parquet.read_table(path, columns=wanted).to_pylist()
        else:
            # Spreadsheets write a byte-order mark.
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                names, rows = list(reader.fieldnames or ()), []
                for row in reader:
                    check_number_of_cells(row, f"line {reader.line_num} of {path}")
                    rows.append(row)
    except FileNotFoundError as error:
        raise InputError(f"no such list: {path}") from error
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"can't read the list {path}: {reason_line(error)}") from error
    if path_column not in names:
        raise InputError(
            f"{path} has no column {path_column}, but {', '.join(names)}; name the one with paths with `path_column`"
        )
    return [(str(row[path_column] or ""), str(row.get(_OUTPUT_COLUMN) or "")) for row in rows]


def _check_inside(output: Path, folder: Path, what: str) -> None:
    """Refuse an output outside its folder, by dots, links or an absolute path.

    Raises:
        OutputError: names it.
    """
    # A link in the output's place would be replaced, not followed.
    if not output.parent.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{what} would lie outside the output folder {folder}, at {output}; give a name inside it")


def _check_names(inputs: Sequence[MapInput]) -> None:
    taken: dict[Path, str] = {}
    for item in inputs:
        if item.output.suffix.lower() not in GEOTIFF_SUFFIXES:
            raise OutputError(f"the map of {item.path} is a GeoTIFF: its name must end in .tif, got {item.output}")
        if (other := taken.setdefault(item.output, item.path)) != item.path:
            raise OutputError(
                f"{other} and {item.path} would both become {item.output}; name the maps in the column "
                f"{_OUTPUT_COLUMN} of a list, or give a folder or a glob, whose sub-folders are kept"
            )
    written = [path for item in inputs for path in (item.output, item.output.with_suffix(_QUICKLOOK))]
    check_outputs(written, [item.path for item in inputs], overwrite=True)


def _map_name(image: str | Path) -> str:
    return f"{image_name(image)}{'.tif' if find_reader(os.fspath(image)) is None else '.ome.tif'}"


def _is_remote(path: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", path) is not None or path.startswith("/vsi")


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not _is_remote(path) and not Path(path).exists()
