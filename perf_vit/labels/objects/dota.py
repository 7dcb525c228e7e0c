"""DOTA labelTxt files: four corners per object, one file per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perf_vit.errors import InputError
from perf_vit.labels.image_folder import ImageFolder, label_files, read_lines
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format

__all__ = ["read_dota"]


@register_label_format("dota")
def read_dota(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a folder of labelTxt files with lines `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`.

    Lines such as `imagesource:GoogleEarth` and `gsd:0.146` are skipped. Objects are ignored if the last number isn't 0.
    An empty file is an image without objects.

    Raises:
        InputError: A line has another format, or a file has no image.
    """
    return RawLabels([_image(image, file) for image, file in label_files(labels, folder, ".txt")])


def _image(path: Path, file: Path) -> RawImage:
    objects = [
        _object(line.split(), f"line {number} of {file}")
        for number, line in enumerate(read_lines(file), 1)
        if line.strip() and not line.lower().startswith(("imagesource:", "gsd:"))
    ]
    return RawImage(path=str(path), labels=str(file), objects=objects)


def _object(fields: list[str], where: str) -> RawObject:
    if len(fields) not in (9, 10):
        raise InputError(
            f"{where} must have 8 coordinates, a class and a difficult flag, got {len(fields)} fields; "
            "is this a labelTxt file?"
        )
    try:
        corners = np.array(fields[:8], np.float64).reshape(4, 2)
        difficult = len(fields) == 10 and int(fields[9]) != 0
    except ValueError:
        raise InputError(f"{where} must begin with 8 coordinates, got {' '.join(fields)!r}") from None
    return RawObject(name=fields[8], corners=corners, ignored=difficult)
