"""Labels of objects as a COCO file: what `prepare.py` of a data set writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from perf_vit.data.labels.records import ImageRecord, ObjectIndex
from perf_vit.io import write_text
from perf_vit.text import to_json

__all__ = ["write_coco_labels"]


def write_coco_labels(path: str | Path, index: ObjectIndex, images: str | Path) -> None:
    """Write checked boxes as COCO's JSON, which `read_object_labels` reads back; ignored objects become crowds.

    Oriented boxes and masks are left out.

    Args:
        path: the file; replaced if it is there.
        index: images and their objects.
        images: folder that the images' names in the file are relative to.
    """
    content: dict[str, Any] = {
        "images": [_image(number, record, images) for number, record in enumerate(index, 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(index.classes, 1)],
        "annotations": [item for number, record in enumerate(index, 1) for item in _annotations(number, record)],
    }
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    write_text(path, to_json(content))


def _image(number: int, record: ImageRecord, images: str | Path) -> dict[str, Any]:
    name = Path(os.path.relpath(record.path, images)).as_posix()
    return {"id": number, "file_name": name, "height": record.height, "width": record.width}


def _annotations(number: int, record: ImageRecord) -> list[dict[str, Any]]:
    found = []
    rows = zip(record.boxes_xyxy.tolist(), record.labels.tolist(), record.ignored.tolist(), strict=True)
    for (left, top, right, bottom), label, ignored in rows:
        width, height = right - left, bottom - top
        found.append(
            {
                "image_id": number,
                "category_id": label + 1,
                "bbox": [left, top, width, height],
                "area": width * height,
                "iscrowd": int(ignored),
            }
        )
    return found
