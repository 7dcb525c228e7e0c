"""Labels of objects as a COCO file: what `prepare.py` of a data set writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf_vit.data.labels.records import ImageRecord, ObjectIndex
from perf_vit.io import default_category_ids, write_text
from perf_vit.text import to_json

__all__ = ["write_coco_labels"]


def write_coco_labels(path: str | Path, index: ObjectIndex, images: str | Path) -> None:
    """Write checked boxes as COCO's JSON, which `read_object_labels` reads back; ignored objects become crowds.

    Oriented boxes and masks are left out. Ids of categories are those of the labels, if they had any, or count from 1.

    Args:
        path: the file; replaced if it is there.
        index: images and their objects.
        images: folder that the images' names in the file are relative to.
    """
    ids = index.category_ids or default_category_ids(len(index.classes))
    content: dict[str, Any] = {
        "images": [_image(number, record, images) for number, record in enumerate(index, 1)],
        "categories": [{"id": id_, "name": name} for id_, name in zip(ids, index.classes, strict=True)],
        "annotations": [item for number, record in enumerate(index, 1) for item in _annotations(number, record, ids)],
    }
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    write_text(path, to_json(content))


def _image(number: int, record: ImageRecord, images: str | Path) -> dict[str, Any]:
    name = Path(os.path.relpath(record.path, images)).as_posix()
    return {"id": number, "file_name": name, "height": record.height, "width": record.width}


def _annotations(number: int, record: ImageRecord, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    rows = zip(record.boxes_xyxy.tolist(), record.labels.tolist(), record.ignored.tolist(), strict=True)
    for (left, top, right, bottom), label, ignored in rows:
        width, height = right - left, bottom - top
        found.append(
            {
                "image_id": number,
                "category_id": category_ids[label],
                "bbox": [left, top, width, height],
                "area": width * height,
                "iscrowd": int(ignored),
            }
        )
    return found
