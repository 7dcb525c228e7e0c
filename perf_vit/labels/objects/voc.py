"""Pascal VOC XML files, one per image."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from perf_vit.errors import InputError, parsing
from perf_vit.labels.image_folder import ImageFolder, label_files
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format

__all__ = ["read_voc"]


@register_label_format("voc")
def read_voc(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a folder of VOC files; `difficult` objects are ignored.

    VOC counts pixels from 1 and includes the last one: a box with xmin 1 and xmax 1 covers the first column. Images are
    found by the name of the XML file, as the name inside often refers to another copy.

    Raises:
        InputError: A file is not a VOC XML file, or has no image.
    """
    return RawLabels([_image(image, file) for image, file in label_files(labels, folder, ".xml")])


def _image(path: Path, file: Path) -> RawImage:
    with parsing(file, "XML"):
        root = ET.parse(file).getroot()
    if root.tag != "annotation":
        raise InputError(f"{file} is not a VOC file: expected <annotation>, got <{root.tag}>")
    size = (_number(root, "size/height", file, default=0), _number(root, "size/width", file, default=0))
    objects = [_object(item, file) for item in root.iter("object")]
    return RawImage(path=str(path), labels=str(file), objects=objects, size=(int(size[0]), int(size[1])))


def _object(item: ET.Element, file: Path) -> RawObject:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{file} has an object without name")
    left, top, right, bottom = (_number(item, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax"))
    difficult = _number(item, "difficult", file, default=0) > 0
    return RawObject(name=name, box=(left - 1, top - 1, right, bottom), ignored=difficult)


def _number(element: ET.Element, path: str, file: Path, default: float | None = None) -> float:
    text = element.findtext(path)
    if text is None and default is not None:
        return default
    try:
        return float(text or "")
    except ValueError:
        raise InputError(f"{file} must have a number in <{path}>, got {text!r}") from None
