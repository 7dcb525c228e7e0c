"""CSV tables of boxes, one object per row."""

from __future__ import annotations

import csv
from pathlib import Path

from perf_vit.errors import InputError
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format
from perf_vit.labels.tables import check_number_of_cells

__all__ = ["read_table"]

_IMAGE_COLUMNS = ("image", "image_path", "filename", "path")
_LABEL_COLUMNS = ("label", "class", "name")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


@register_label_format("csv", one_file=True)
def read_table(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a CSV file with the columns image, xmin, ymin, xmax, ymax and label, in pixels from the image corner.

    The first column may also be called image_path, filename or path, and the last one class or name. A row with empty
    box coordinates is an image without objects.

    Raises:
        InputError: A column is missing, a coordinate is not a number, or an image doesn't exist.
    """
    try:
        with labels.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            image_column, label_column = _columns(reader.fieldnames or (), labels)
            images: dict[str, RawImage] = {}
            for row in reader:
                _add(row, images, folder, labels, (image_column, label_column), reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {labels} as CSV: {error}") from error
    return RawLabels(list(images.values()))


def _columns(names: object, labels: Path) -> tuple[str, str]:
    known = list(names) if isinstance(names, list | tuple) else []
    image = next((name for name in _IMAGE_COLUMNS if name in known), None)
    label = next((name for name in _LABEL_COLUMNS if name in known), None)
    if image is None or label is None or not set(_SIDES) <= set(known):
        raise InputError(
            f"{labels} must have the columns image, {', '.join(_SIDES)} and label, got {', '.join(known) or 'none'}"
        )
    return image, label


def _add(
    row: dict[str, str],
    images: dict[str, RawImage],
    folder: ImageFolder,
    labels: Path,
    columns: tuple[str, str],
    line: int,
) -> None:
    check_number_of_cells(row, f"line {line} of {labels}")
    path = folder.find(row[columns[0]] or "", f"line {line} of {labels}")
    if not folder.wanted(path):
        return
    image = images.setdefault(str(path), RawImage(path=str(path), labels=str(labels), objects=[]))
    sides = [(row[side] or "").strip() for side in _SIDES]
    if not any(sides):
        return
    try:
        box = [float(side) for side in sides]
    except ValueError:
        raise InputError(f"line {line} of {labels} must have numbers as coordinates, got {', '.join(sides)}") from None
    image.objects.append(RawObject(name=row[columns[1]] or "", box=box))
