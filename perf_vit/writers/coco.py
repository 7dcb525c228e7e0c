"""COCO JSON files: data sets, results and object labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.files import write_text
from perf_vit.labels.objects import ImageRecord, ObjectIndex, default_category_ids
from perf_vit.sources.slides.frame import SlideFrame
from perf_vit.text import to_json
from perf_vit.writers._objects import ObjectTable

__all__ = ["write_coco", "write_coco_labels", "write_coco_results"]

_DECIMALS = 3


def write_coco(
    path: Path,
    table: ObjectTable,
    category_ids: Sequence[int],
    *,
    name: str,
    height: int,
    width: int,
    frame: SlideFrame | None = None,
) -> None:
    """Write objects as a COCO data set of one image.

    Segmentations are lists of polygons without holes, as COCO doesn't support holes; objects with holes are cut there.

    Args:
        path: Output file.
        table: Objects.
        category_ids: COCO id of each class.
        name: Name of the image.
        height: Image height in pixels.
        width: Image width in pixels.
        frame: Coordinates of a slide; the image then holds the factors and shifts from its pixels to QuPath.
    """
    image: dict[str, Any] = {"id": 1, "file_name": name, "height": height, "width": width}
    if frame is not None:
        place = frame.to_qupath
        image["to_qupath"] = {"scale_xy": [place.a, place.e], "shift_xy": [place.c, place.f]}
    categories = [{"id": id_, "name": name} for id_, name in zip(category_ids, table.class_names, strict=True)]
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"images": [{to_json(image)}],\n"categories": {to_json(categories)},\n"annotations": [')
        for index in range(len(table)):
            file.write(",\n" if index else "\n")
            # Ids start at 1, as 0 means "no annotation" in pycocotools.
            annotation = {"id": index + 1, **_annotation(table, index, 1, category_ids), "iscrowd": 0}
            file.write(to_json(annotation))
        file.write("\n]}\n")


def write_coco_results(path: Path, table: ObjectTable, category_ids: Sequence[int], *, image_id: int) -> None:
    """Write objects as COCO results: a list of annotations with scores, as `COCO.loadRes` reads it.

    Args:
        path: Output file.
        table: Objects.
        category_ids: COCO id of each class.
        image_id: Id of the image in the COCO file of labels.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for index in range(len(table)):
            file.write(",\n" if index else "\n")
            file.write(to_json(_annotation(table, index, image_id, category_ids)))
        file.write("\n]\n")


def _annotation(table: ObjectTable, index: int, image_id: int, category_ids: Sequence[int]) -> dict[str, Any]:
    polygon = table.polygons[index]
    left, top, right, bottom = polygon.bounds
    return {
        "image_id": image_id,
        "category_id": int(category_ids[table.labels[index]]),
        "bbox": _rounded(np.array([left, top, right - left, bottom - top])),
        "area": round(polygon.area, _DECIMALS),
        "segmentation": [_rounded(shapely.get_coordinates(part.exterior)[:-1].ravel()) for part in _solid(polygon)],
        **table.measurements_of(index),
    }


def _solid(geometry: Any) -> Iterator[Any]:
    """Yield polygons without holes that cover a geometry, cut through holes until none is left."""
    for polygon in shapely.get_parts(geometry):
        if polygon.geom_type != "Polygon" or polygon.is_empty:
            continue
        if not polygon.interiors:
            yield polygon
            continue
        for half in _halves(polygon):
            yield from _solid(shapely.clip_by_rect(polygon, *half))


def _halves(polygon: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the bounds of two halves of a polygon that meet in the middle of its middle hole."""
    holes = shapely.bounds(shapely.get_rings(polygon)[1:]).reshape(-1, 4)
    middles = (holes[:, :2] + holes[:, 2:]) / 2
    axis = int(np.ptp(middles[:, 1]) > np.ptp(middles[:, 0]))
    cut = np.sort(middles[:, axis])[len(middles) // 2]
    first, second = np.array(polygon.bounds), np.array(polygon.bounds)
    first[axis + 2] = second[axis] = cut
    return first, second


def _rounded(values: Any) -> list[float]:
    rounded: list[float] = np.round(values, _DECIMALS).tolist()
    return rounded


def write_coco_labels(path: str | Path, index: ObjectIndex, images: str | Path) -> None:
    """Write validated boxes as a COCO file that `read_object_labels` can read; ignored objects become crowds.

    Oriented boxes and masks are left out. Category ids are those of the labels if they had any, else 1, 2, ...

    Args:
        path: Output file; an existing one is replaced.
        index: Images and their objects.
        images: Folder that image names in the file are relative to.
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
