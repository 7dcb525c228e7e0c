"""What to map, and where each map goes: files, folders, globs and lists."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.parquet

from perf_vit.errors import InputError, OutputError, reason_line
from perf_vit.io import check_outputs

__all__ = ["MapInput", "find_inputs", "find_paths", "is_one_file"]

_SLIDES = frozenset({".svs", ".ndpi", ".mrxs", ".scn", ".svslide", ".bif", ".vms", ".vmu", ".dcm"})

_SUFFIXES = frozenset({".tif", ".tiff", ".vrt", ".jp2", ".img", ".png", ".jpg", ".jpeg", ".zarr"} | _SLIDES)
"""Of the files that a folder is searched for."""

_FOLDERS = frozenset({".zarr"})
"""Of folders that are one image each."""

_PARQUET = frozenset({".parquet", ".geoparquet"})
_LISTS = _PARQUET | {".csv"}

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


def is_one_file(given: Sequence[str | Path]) -> bool:
    """Whether inputs are a single image, not a folder, a glob or a list, however many images that may hold."""
    if len(given) != 1:
        return False
    path = Path(given[0])
    is_folder = path.is_dir() and path.suffix.lower() not in _FOLDERS
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


def find_paths(given: Sequence[str | Path], *, path_column: str = "path") -> list[str]:
    """All inputs of what makes no maps, each once; see `find_inputs`.

    Args:
        given: files, URLs, folders, globs and lists.
        path_column: of lists.

    Raises:
        InputError: nothing is there, or a list has no such column.
    """
    found = [each.path for item in given for each in _expand(os.fspath(item), _NOWHERE, path_column)]
    return list(dict.fromkeys(found))


def _expand(item: str, folder: Path, path_column: str) -> Iterator[MapInput]:
    path = Path(item)
    if path.suffix.lower() in _LISTS:
        yield from _listed(path, folder, path_column)
    elif _is_glob(item):
        root = _fixed_part(path)
        matches = [Path(match) for match in glob.glob(item, recursive=True)]
        images = [match for match in matches if match.is_file() or match.suffix.lower() in _FOLDERS]
        yield from _below(root, images, folder, item)
    elif path.is_dir() and path.suffix.lower() not in _FOLDERS:
        yield from _below(path, _images_in(path), folder, item)
    else:
        yield MapInput(item, folder / _map_name(PurePosixPath(item.split("?")[0]).name))


def _below(root: Path, images: Sequence[Path], folder: Path, given: str) -> Iterator[MapInput]:
    """Images and their maps, whose folders are those below a root."""
    mine = folder.resolve()
    inside = mine != root.resolve() and mine.is_relative_to(root.resolve())
    images = [image for image in images if not (inside and image.resolve().is_relative_to(mine))]
    if not images:
        raise InputError(f"found no image in {given}; expected {' '.join(sorted(_SUFFIXES))}")
    for image in sorted(images):
        yield MapInput(str(image), folder / image.relative_to(root).with_name(_map_name(image.name)))


def _images_in(root: Path) -> list[Path]:
    images = []
    for parent, folders, files in os.walk(root):
        images += [Path(parent, name) for name in folders if Path(name).suffix.lower() in _FOLDERS]
        images += [Path(parent, name) for name in files if Path(name).suffix.lower() in _SUFFIXES and name[0] != "."]
        folders[:] = [name for name in folders if name[0] != "." and Path(name).suffix not in {".partial", *_FOLDERS}]
    return images


def _listed(path: Path, folder: Path, path_column: str) -> Iterator[MapInput]:
    rows = _read_list(path, path_column)
    if not rows:
        raise InputError(f"expected paths in the list {path}, got no row")
    for number, (image, output) in enumerate(rows, 1):
        if not image:
            raise InputError(f"{path}: row {number} has no {path_column}")
        if "\0" in image + output:
            raise InputError(f"{path}: row {number} has a null byte in {image + output!r}; no file has such a name")
        if not _is_remote(image):
            image = str(path.parent / image)
        name = output or _map_name(PurePosixPath(image.split("?")[0]).name)
        place = folder / (name if Path(name).suffix else f"{name}.tif")
        if folder != _NOWHERE:
            _check_inside(place, folder, f"{path}: {_OUTPUT_COLUMN} of row {number}, {name},")
        yield MapInput(image, place)


def _read_list(path: Path, path_column: str) -> list[tuple[str, str]]:
    """(path, output) of each row, "" where there is none."""
    try:
        if path.suffix.lower() in _PARQUET:
            names = pyarrow.parquet.read_schema(path).names
            wanted = [name for name in (path_column, _OUTPUT_COLUMN) if name in names]
            rows = pyarrow.parquet.read_table(path, columns=wanted).to_pylist()
        else:
            # Spreadsheets write a byte-order mark.
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                names, rows = list(reader.fieldnames or ()), list(reader)
    except FileNotFoundError as error:
        raise InputError(f"no such list: {path}") from error
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"can't read the list {path}: {reason_line(error)}") from error
    if path_column not in names:
        raise InputError(
            f"{path} has no column {path_column}, but {', '.join(names)}; name the one with paths with --path-column"
        )
    return [(str(row[path_column] or ""), str(row.get(_OUTPUT_COLUMN) or "")) for row in rows]


def _check_inside(output: Path, folder: Path, what: str) -> None:
    """Refuse an output outside its folder, by dots, links or an absolute path.

    Raises:
        OutputError: names it.
    """
    if not output.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{what} would lie outside the output folder {folder}, at {output}; give a name inside it")


def _check_names(inputs: Sequence[MapInput]) -> None:
    taken: dict[Path, str] = {}
    for item in inputs:
        if item.output.suffix.lower() not in {".tif", ".tiff"}:
            raise OutputError(f"the map of {item.path} is a GeoTIFF: its name must end in .tif, got {item.output}")
        if (other := taken.setdefault(item.output, item.path)) != item.path:
            raise OutputError(
                f"{other} and {item.path} would both become {item.output}; name the maps in the column "
                f"{_OUTPUT_COLUMN} of a list, or give a folder or a glob, whose sub-folders are kept"
            )
    written = [path for item in inputs for path in (item.output, item.output.with_suffix(_QUICKLOOK))]
    check_outputs(written, [item.path for item in inputs], overwrite=True)


def _map_name(name: str) -> str:
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix.lower()
    return f"{stem}.ome.tif" if suffix in _SLIDES else f"{stem}.tif"


def _is_remote(path: str) -> bool:
    return "://" in path or path.startswith("/vsi")


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not _is_remote(path) and not Path(path).exists()


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?[]", part))
    return Path(*parts[:first])
