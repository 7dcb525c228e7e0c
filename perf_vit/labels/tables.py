"""Image labels from CSV tables and class folders."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError
from perf_vit.labels.image_folder import ImageFolder, warn_of_previews
from perf_vit.sources import find_images, previews_among
from perf_vit.sources.image_search import image_root
from perf_vit.types import InputPath

__all__ = [
    "CsvRow",
    "ImageTargets",
    "check_number_of_cells",
    "class_index",
    "read_class_folders",
    "read_class_table",
    "read_csv_rows",
    "read_target_table",
]


@dataclass(frozen=True, slots=True)
class CsvRow:
    """Row of a CSV file.

    Attributes:
        location: File and line, for messages.
        values: Values by column, without surrounding blanks.
    """

    location: str
    values: dict[str, str]


def read_csv_rows(path: str | Path, columns: Sequence[str]) -> list[CsvRow]:
    """Read the rows of a CSV file, which must have values in all given columns.

    Raises:
        InputError: The file can't be read, lacks a column, has no rows, or a row lacks a value or has too many.
    """
    names, rows = _read(Path(path))
    missing = [column for column in columns if column not in names]
    if missing:
        raise InputError(f"{path} has no column {missing[0]}; its columns are {', '.join(names) or 'none'}")
    if not rows:
        raise InputError(f"{path} has no rows; expected one per image below the header")
    found = []
    for line, row in rows:
        check_number_of_cells(row, f"line {line} of {path}")
        values = {column: (row[column] or "").strip() for column in columns}
        empty = [column for column, value in values.items() if not value]
        if empty:
            raise InputError(f"line {line} of {path} has no {empty[0]}; fill it in, or leave the row out")
        found.append(CsvRow(f"line {line} of {path}", values))
    return found


def check_number_of_cells(row: Mapping[Any, Any], location: str) -> None:
    """Check that a row of `csv.DictReader` has no values without a column, as a comma for a decimal point gives.

    Raises:
        InputError: It has; empty cells don't count.
    """
    if any(cell and not cell.isspace() for cell in row.get(None) or ()):
        raise InputError(f"{location} has more cells than there are columns; quote cells with commas")


def _read(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    try:
        # Spreadsheet programs write a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            return names, [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {path} as CSV: {error}") from error


@dataclass(frozen=True, slots=True)
class ImageTargets:
    """Labelled images.

    Attributes:
        paths: Paths of the images.
        targets: Class indices, [n] int64; or 0 and 1 per class (multi-label) or regression targets, [n, K] float32.
        names: Names of the K classes or targets.
    """

    paths: tuple[str, ...]
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, indices: Sequence[int]) -> ImageTargets:
        """Select images by index."""
        chosen = list(indices)
        return ImageTargets(tuple(self.paths[index] for index in chosen), self.targets[chosen], self.names)


def read_class_folders(
    images: InputPath, classes: Sequence[str] | None = None, *, allow_missing: bool = False
) -> ImageTargets:
    """Read images in folders named after their class, `folder/class/.../image.tif`, without previews of rasters.

    Args:
        images: Parent folder of the class folders, glob, or several of these.
        classes: Class names in the order of the indices; None for the folder names, sorted.
        allow_missing: Whether classes may have no images, as in a small validation set.

    Raises:
        InputError: The folder doesn't exist, images aren't in a class folder, a folder is not a class, or a class has
            no images.
    """
    given = [images] if isinstance(images, str | Path) else list(images)
    file = next((each for each in given if Path(each).is_file()), None)
    if file is not None:
        raise InputError(f"expected a folder with one subfolder per class, got the file {file}; or give labels as CSV")
    # The first folder counts if two contain an image.
    roots = {path: image_root(each) for each in reversed(given) for path in find_images([each])}
    found = find_images(given)
    previews = previews_among(found)
    warn_of_previews(previews, len(found))
    paths = [path for path in found if path not in previews]
    names = [path.relative_to(roots[path]).parts[0] for path in paths]
    loose = [path for path in paths if path.parent == roots[path]]
    if loose:
        raise InputError(
            f"{loose[0]} is not in a class folder; move it to {loose[0].parent}/CLASS/{loose[0].name}, or give "
            "labels as CSV"
        )
    classes = tuple(sorted(set(names)) if classes is None else classes)
    indices = [class_index(n, classes, f"the folder {roots[path] / n}") for n, path in zip(names, paths, strict=True)]
    empty = set(range(len(classes))) - set(indices)
    if empty and not allow_missing:
        shown = " and ".join(map(str, given))
        raise InputError(f"class {classes[min(empty)]} has no images in {shown}; check the folders' names")
    return ImageTargets(tuple(map(str, paths)), np.array(indices, np.int64), classes)


def read_class_table(
    table: str | Path,
    images: InputPath,
    classes: Sequence[str] | None = None,
    *,
    multilabel: bool = False,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageTargets:
    """Read a CSV file with the class of each image, or with a column of 0 and 1 per class (multi-label).

    Args:
        table: CSV file.
        images: Folder, glob or list in which image names are looked up.
        classes: Class names in the order of the indices; None for all that occur, sorted by name. With `multilabel`,
            columns of the file.
        multilabel: Whether an image may have any number of classes.
        image_column: Column with image names.
        label_column: Column with class names.

    Raises:
        InputError: A file, column, image or class is missing, or a multi-label value is not 0 or 1.
    """
    if multilabel:
        if not classes:
            raise InputError(f"data.classes must name the columns of {table} with 0 and 1")
        rows = read_csv_rows(table, [image_column, *classes])
        marks = np.array([_numbers(row, classes) for row in rows], np.float32)
        wrong = np.argwhere((marks != 0) & (marks != 1))
        if len(wrong):
            row, column = wrong[0]
            raise InputError(f"{rows[row].location} must have 0 or 1 as {classes[column]}, got {marks[row, column]:g}")
        return ImageTargets(_paths(rows, images, image_column), marks, tuple(classes))
    rows = read_csv_rows(table, [image_column, label_column])
    names = [row.values[label_column] for row in rows]
    classes = tuple(sorted(set(names)) if classes is None else classes)
    indices = [class_index(name, classes, row.location) for name, row in zip(names, rows, strict=True)]
    return ImageTargets(_paths(rows, images, image_column), np.array(indices, np.int64), classes)


def read_target_table(
    table: str | Path, images: InputPath, columns: Sequence[str], *, image_column: str = "image"
) -> ImageTargets:
    """Read a CSV file with one or several regression targets per image.

    Args:
        table: CSV file.
        images: Folder, glob or list in which image names are looked up.
        columns: Columns of the targets.
        image_column: Column with image names.

    Raises:
        InputError: A file, column or image is missing, or a value is not a finite number.
    """
    rows = read_csv_rows(table, [image_column, *columns])
    values = np.array([_numbers(row, columns) for row in rows], np.float32)
    return ImageTargets(_paths(rows, images, image_column), values, tuple(columns))


def class_index(name: str, classes: Sequence[str], location: str) -> int:
    """Return the index of a class name.

    Args:
        name: Class name.
        classes: Class names.
        location: Where the name was found, for errors.

    Raises:
        InputError: The class is unknown.
    """
    if name in classes:
        return list(classes).index(name)
    near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the classes are {', '.join(classes)}"
    raise InputError(f"{location} has the unknown class {name!r}; {hint}")


def _paths(rows: Iterable[CsvRow], images: InputPath, column: str) -> tuple[str, ...]:
    return tuple(_unique(rows, ImageFolder(images), column))


def _unique(rows: Iterable[CsvRow], folder: ImageFolder, column: str) -> Iterator[str]:
    seen: dict[Path, str] = {}
    for row in rows:
        path = folder.find(row.values[column], row.location)
        if path in seen:
            raise InputError(f"{row.location} names {path}, as does {seen[path]}; give each image once")
        seen[path] = row.location
        yield str(path)


def _numbers(row: CsvRow, columns: Sequence[str]) -> list[float]:
    found = []
    for column in columns:
        try:
            value = float(row.values[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{row.location} must have a number as {column}, got {row.values[column]}")
        found.append(value)
    return found
