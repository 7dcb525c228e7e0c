"""COCO files: objects of many images in one JSON file, and the ids of images and categories."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.errors import InputError, parsing
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.labels.objects.masks import Rle
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format

__all__ = ["CocoImages", "category_ids_by_name", "default_category_ids", "ids_of_classes", "read_coco"]


class CocoImages:
    """Ids of images and categories in a COCO file of labels.

    Args:
        path: JSON file with `images` and usually `categories`.

    Attributes:
        path: Path as given.
        ids: Ids of all images.

    Raises:
        InputError: The file can't be read, or isn't a COCO file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        with parsing(path, "a COCO file"):
            content = json.loads(Path(path).read_bytes())
            self._images = {
                PurePath(image["file_name"]): (_whole(image["id"]), (image.get("height"), image.get("width")))
                for image in content["images"]
            }
            self._categories = category_ids_by_name(content)
        self.ids = frozenset(number for number, _ in self._images.values())
        if not self._images:
            raise InputError(f"{path} lists no images; give a COCO file of labels, or of images alone")
        number = len(content["images"])
        if not number == len(self._images) == len(self.ids):
            raise InputError(f"{path} lists {number} images, some of one name or id; give each once, with its own id")

    def image_id(self, image: str, size: tuple[int, int] | None = None) -> int:
        """Return the id of an image, by the longest file name that its path ends with, with or without suffix.

        Args:
            image: Path of the image.
            size: Height and width, to compare with those in the file.

        Raises:
            InputError: There is no image of this name, or it has another size.
        """
        name = self._listed_name(PurePath(image))
        if name is None:
            example = next(iter(self._images))
            raise InputError(
                f"{self.path} doesn't list {image}, but images such as {example}; give a COCO file of the inputs"
            )
        number, listed = self._images[name]
        if size is not None and None not in listed and listed != size:
            raise InputError(
                f"{self.path} describes {name} as {listed[0]} x {listed[1]} px, {image} has {size[0]} x {size[1]}; "
                "use the labelled image at its original size"
            )
        return number

    def size_of(self, image: str) -> tuple[int, int] | None:
        """Return the size (height, width) of an image in the file; None if it isn't listed, or without a size."""
        name = self._listed_name(PurePath(image))
        height, width = (None, None) if name is None else self._images[name][1]
        return None if height is None or width is None else (height, width)

    def _listed_name(self, image: PurePath) -> PurePath | None:
        """Return the longest name in the file that a path ends with."""
        paths = (image, image.with_suffix(""))
        ends = (PurePath(*path.parts[first:]) for first in range(len(image.parts)) for path in paths)
        return next((end for end in ends if end in self._images), None)

    def check(self, images: Iterable[str]) -> None:
        """Check that the file lists all images, each under its own id.

        Raises:
            InputError: An image isn't listed, or two images have the same id.
        """
        seen: dict[int, str] = {}
        for image in images:
            number = self.image_id(image)
            if number in seen:
                raise InputError(f"{seen[number]} and {image} are the same image of {self.path}, id {number}; give one")
            seen[number] = image

    def category_ids(self, classes: Sequence[str]) -> list[int]:
        """Return the file's ids of classes; classes that it lacks get new ids above."""
        return ids_of_classes(self._categories, classes)


def category_ids_by_name(content: Any) -> dict[str, int]:
    """Return category ids by name from the content of a COCO file; for duplicate names, the id with more annotations.

    Raises:
        ValueError: An id is not an integer, which results require.
    """
    used = Counter(each["category_id"] for each in content.get("annotations", ()))
    categories = sorted(content.get("categories", ()), key=lambda each: used[each["id"]])
    return {str(each["name"]): _whole(each["id"]) for each in categories}


def ids_of_classes(ids: Mapping[str, int], classes: Sequence[str]) -> list[int]:
    """Return the ids of classes; classes without id get new ids above the others."""
    beyond = max([0, *ids.values()])
    others = [name for name in classes if name not in ids]
    new = {name: beyond + rank for rank, name in enumerate(others, 1)}
    return [ids[name] if name in ids else new[name] for name in classes]


def _whole(number: Any) -> int:
    if not isinstance(number, int | float) or number != int(number):
        raise ValueError(f"expected integer ids, got {number!r}")
    return int(number)


def default_category_ids(num_classes: int) -> list[int]:
    """Return COCO ids of classes whose labels have none: 1, 2, ... in class order."""
    return list(range(1, num_classes + 1))


# Coordinates of a ring of three points.
_LEAST_NUMBERS = 6


@register_label_format("coco", one_file=True)
def read_coco(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a COCO file; `iscrowd` objects are ignored, and images without annotations have no objects.

    Raises:
        InputError: The file isn't a COCO file, or an annotation has an unknown image or category.
    """
    content = _load(labels)
    with parsing(labels, "a COCO file"):
        categories = _categories(content, labels)
        return RawLabels(
            _images(content, categories, labels, folder),
            tuple(dict.fromkeys(categories.values())),
            _numbered(content),
        )


def _load(labels: Path) -> Any:
    with parsing(labels, "JSON"):
        content = json.loads(labels.read_bytes())
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise InputError(f"{labels} is not a COCO file: expected an object with images, annotations and categories")
    return content


def _categories(content: Any, labels: Path) -> dict[Any, str]:
    """Return category names by id; ids with the same name are one class, as supercategories may share a name.

    Raises:
        InputError: An id occurs twice, so it is ambiguous.
    """
    counts = Counter(item["id"] for item in content["categories"])
    twice = next((value for value, number in counts.items() if number > 1), None)
    if twice is not None:
        raise InputError(f"{labels} lists {counts[twice]} categories of id {twice}; give each its own id")
    return {item["id"]: str(item["name"]) for item in content["categories"]}


def _numbered(content: Any) -> dict[str, int] | None:
    try:
        return category_ids_by_name(content)
    # Ids may also be text.
    except ValueError:
        return None


def _images(content: Any, categories: dict[Any, str], labels: Path, folder: ImageFolder) -> list[RawImage]:
    by_image: dict[Any, list[Any]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    _check_unique(content["images"], labels)
    stray = set(by_image) - {image["id"] for image in content["images"]}
    if stray:
        raise InputError(f"{labels} has annotations of {len(stray)} images that it doesn't list, such as {stray.pop()}")
    found = []
    for image in content["images"]:
        path = folder.find(image["file_name"], str(labels))
        if not folder.wanted(path):
            continue
        objects = [_object(annotation, categories, labels) for annotation in by_image[image["id"]]]
        size = (int(image.get("height") or 0), int(image.get("width") or 0))
        found.append(RawImage(path=str(path), labels=str(labels), objects=objects, size=size))
    return found


def _check_unique(images: Any, labels: Path) -> None:
    """Check that the ids and names of images are unique, as annotations would be ambiguous otherwise."""
    for key in ("id", "file_name"):
        value, number = Counter(image[key] for image in images).most_common(1)[0] if images else (None, 0)
        if number > 1:
            raise InputError(f"{labels} lists {number} images of {key} {value}; give each image once, with its own id")


def _object(annotation: Any, categories: dict[Any, str], labels: Path) -> RawObject:
    name = categories.get(annotation["category_id"])
    if name is None:
        known = ", ".join(f"{key} ({value})" for key, value in categories.items())
        raise InputError(
            f"{labels} has an annotation of category {annotation['category_id']}; the categories are {known}"
        )
    box = annotation.get("bbox")
    if box is not None:
        left, top, width, height = (float(value) for value in box)
        box = (left, top, left + width, top + height)
    segmentation = annotation.get("segmentation")
    # Some files have a single ring without COCO's outer list.
    if isinstance(segmentation, list) and segmentation and all(isinstance(one, int | float) for one in segmentation):
        segmentation = [segmentation]
    outline = _outline(segmentation, labels)
    if box is None and outline is None:
        raise InputError(f"{labels} has an annotation without bbox and segmentation: {str(annotation)[:200]}")
    lost = 0 if isinstance(segmentation, dict) else sum(len(ring) < _LEAST_NUMBERS for ring in segmentation or ())
    return RawObject(name=name, box=box, ignored=bool(annotation.get("iscrowd", 0)), outline=outline, lost_parts=lost)


def _ring(numbers: Any, labels: Path) -> npt.NDArray[np.float64]:
    if len(numbers) % 2:
        raise InputError(
            f"{labels} has an outline of {len(numbers)} numbers, {str(numbers)[:80]}; expected x and y in turn"
        )
    return np.asarray(numbers, np.float64).reshape(-1, 2)


def _outline(segmentation: Any, labels: Path) -> Any:
    if isinstance(segmentation, dict):
        return Rle.make(segmentation, str(labels))
    rings = [_ring(ring, labels) for ring in segmentation or () if len(ring)]
    if not rings:
        return None
    if not all(np.isfinite(ring).all() for ring in rings):
        return shapely.Point(np.inf, np.inf)
    # Rings of fewer than three points have no area; an object without other rings is dropped later.
    polygons = [shapely.Polygon(ring) for ring in rings if ring.size >= _LEAST_NUMBERS] or [
        shapely.LineString(rings[0][[0, -1]])
    ]
    if len(polygons) == 1:
        return polygons[0]
    return shapely.union_all(shapely.make_valid(polygons, method="structure", keep_collapsed=False))
