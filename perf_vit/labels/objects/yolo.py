"""YOLO text files, one per image, with coordinates relative to its size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from perf_vit.config import load_yaml
from perf_vit.errors import DataWarning, InputError, parsing
from perf_vit.labels.image_folder import ImageFolder, read_lines
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format
from perf_vit.sources import files_below, open_source

__all__ = ["read_yolo"]

_NAME_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")


@register_label_format("yolo")
def read_yolo(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a folder of YOLO files with lines `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...` for outlines.

    Outlines of four points also encode oriented boxes; `validate_labels` converts them if requested. Class names come
    from a data.yaml, classes.txt or .names file in the folder or up to two levels above; without one, class numbers are
    indices into `classes`. Images without a text file, or with an empty one, have no objects. Files with names of notes
    or lists, such as readme.txt and train.txt, are skipped unless an image has that name.

    Raises:
        InputError: A line has another format, a text file has no image, a class has no name, or there are no text
            files.
    """
    names, names_file = _class_names(labels)
    names = names or dict(enumerate(options.classes or ()))
    stems = {file: str(file.relative_to(labels).with_suffix("")) for file in _text_files(labels)}
    files = [file for file in stems if file not in names_file and (folder.has(stems[file]) or not _is_note(file))]
    if not files:
        raise InputError(f"no label files in {labels}; expected a folder of .txt files, one per image")
    by_image: dict[Path, Path] = {}
    for file in files:
        image = folder.find(stems[file], str(file))
        if image in by_image:
            raise InputError(f"{image} is labelled twice, by {by_image[image]} and {file}; keep the labels once")
        by_image[image] = file
    images = [path for path in folder.paths if folder.wanted(path)]
    bare = [path for path in images if path not in by_image]
    if bare:
        warnings.warn(
            f"{len(bare)} of {len(images)} images have no file in {labels} and count as images without objects, the "
            f"first {bare[0]}",
            DataWarning,
            stacklevel=4,
        )
    return RawLabels([_image(path, by_image.get(path), labels, names) for path in images], tuple(names.values()))


def _text_files(labels: Path) -> list[Path]:
    return files_below(labels, lambda name: name.lower().endswith(".txt"))


def _class_names(labels: Path) -> tuple[dict[int, str], set[Path]]:
    """Return class names by number, and the file that they come from."""
    for place in (labels, *labels.resolve().parents[:2]):
        for file in [place / name for name in _NAME_FILES] + sorted(place.glob("*.names")):
            if file.is_file():
                return _names_in(file), {file}
    return {}, set()


def _names_in(file: Path) -> dict[int, str]:
    lines = read_lines(file)
    if file.suffix not in (".yaml", ".yml"):
        return dict(enumerate(line.strip() for line in lines if line.strip()))
    content: Any
    with parsing(file, "YAML"):
        content = load_yaml("\n".join(lines))
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        raise InputError(f"{file} must have class names under the key names")
    with parsing(file, "class names by number"):
        return {int(number): str(name) for number, name in names.items()}


def _is_note(file: Path) -> bool:
    return file.stem.lower() in {"readme", "license", "classes", "train", "val", "test"}


def _image(path: Path, file: Path | None, labels: Path, names: dict[int, str]) -> RawImage:
    if file is None:
        return RawImage(path=str(path), labels=str(labels), objects=[])
    source = open_source(path)
    source.close()
    objects = [
        _object(line.split(), source.size, names, f"line {number} of {file}")
        for number, line in enumerate(read_lines(file), 1)
        if line.strip()
    ]
    return RawImage(path=str(path), labels=str(file), objects=objects)


def _object(fields: list[str], size: tuple[int, int], names: dict[int, str], where: str) -> RawObject:
    try:
        number, values = int(fields[0]), np.array(fields[1:], np.float64)
    except ValueError:
        raise InputError(f"{where} must hold numbers, got {' '.join(fields)!r}") from None
    if number not in names:
        known = ", ".join(f"{key} ({name})" for key, name in names.items()) or "none"
        raise InputError(f"{where} has class {number}; the classes are {known}")
    height, width = size
    if not np.isfinite(values).all():
        return RawObject(name=names[number], box=(np.nan,) * 4)
    if len(values) == 4:
        x, y, w, h = values * [width, height, width, height]
        return RawObject(name=names[number], box=(x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    if len(values) >= 6 and len(values) % 2 == 0:
        return RawObject(name=names[number], outline=shapely.Polygon(values.reshape(-1, 2) * [width, height]))
    raise InputError(f"{where} must hold a class and 4 numbers or an outline, got {len(values)} numbers")
