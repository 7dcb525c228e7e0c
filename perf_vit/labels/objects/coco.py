"""COCO labels: boxes, polygons and run lengths; ids of images and categories."""

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
from perf_vit.labels.objects.records import RawImage, RawLabels, RawObject
from perf_vit.labels.objects.registry import LabelOptions, register_label_format

__all__ = ["CocoImages", "category_ids_by_name", "default_category_ids", "ids_of_classes", "read_coco"]


class CocoImages:
    """Ids of images and categories in a COCO file of labels.

    Args:
        path: a JSON with `images` and, as a rule, `categories`.

    Attributes:
        path: as it was given.
        ids: of all images.

    Raises:
        InputError: the file can't be read, or isn't one of COCO.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.fspath(path)
        try:
            content = json.loads(Path(path).read_bytes())
            self._images = {
                PurePath(image["file_name"]): (_whole(image["id"]), (image.get("height"), image.get("width")))
                for image in content["images"]
            }
            self._categories = category_ids_by_name(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"can't read {path} as a COCO file: {type(error).__name__} {error}") from error
        self.ids = frozenset(number for number, _ in self._images.values())
        if not self._images:
            raise InputError(f"{path} lists no images; give a COCO file of labels, or of images alone")
        number = len(content["images"])
        if not number == len(self._images) == len(self.ids):
            raise InputError(f"{path} lists {number} images, some of one name or id; give each once, with its own id")

    def image_id(self, image: str, size: tuple[int, int] | None = None) -> int:
        """The id of an image, by the longest file name that its path ends with, with or without the ending.

        Args:
            image: path.
            size: height and width, which are compared with those in the file.

        Raises:
            InputError: no image of this name, or one of another size.
        """
        name = self._listed_name(PurePath(image))
        if name is None:
            example = next(iter(self._images))
            raise InputError(
                f"{self.path} doesn't list {image}, but such as {example}; give a file of the images that are searched"
            )
        number, listed = self._images[name]
        if size is not None and None not in listed and listed != size:
            raise InputError(
                f"{self.path} describes {name} as {listed[0]} x {listed[1]} px, {image} has {size[0]} x {size[1]}; "
                "search the image that was labelled, at its own size"
            )
        return number

    def _listed_name(self, image: PurePath) -> PurePath | None:
        """The longest name in the file that a path ends with."""
        paths = (image, image.with_suffix(""))
        ends = (PurePath(*path.parts[first:]) for first in range(len(image.parts)) for path in paths)
        return next((end for end in ends if end in self._images), None)

    def check(self, images: Iterable[str]) -> None:
        """Refuse images that the file doesn't list, or two for one.

        Raises:
            InputError: names them.
        """
        seen: dict[int, str] = {}
        for image in images:
            number = self.image_id(image)
            if number in seen:
                raise InputError(f"{seen[number]} and {image} are one image of {self.path}, id {number}; give one")
            seen[number] = image

    def category_ids(self, classes: Sequence[str]) -> list[int]:
        """The file's ids of some classes; classes that it doesn't have get ids beyond."""
        return ids_of_classes(self._categories, classes)


def category_ids_by_name(content: Any) -> dict[str, int]:
    """Ids by name in the content of a COCO file; of a name that is there twice, the id with more annotations.

    Raises:
        ValueError: an id that is no whole number, which no result can have.
    """
    used = Counter(each["category_id"] for each in content.get("annotations", ()))
    categories = sorted(content.get("categories", ()), key=lambda each: used[each["id"]])
    return {str(each["name"]): _whole(each["id"]) for each in categories}


def ids_of_classes(ids: Mapping[str, int], classes: Sequence[str]) -> list[int]:
    """Ids of some classes; those without one get ids beyond."""
    beyond = max([0, *ids.values()])
    others = [name for name in classes if name not in ids]
    new = {name: beyond + rank for rank, name in enumerate(others, 1)}
    return [ids[name] if name in ids else new[name] for name in classes]


def _whole(number: Any) -> int:
    if not isinstance(number, int | float) or number != int(number):
        raise ValueError(f"expected ids that are whole numbers, got {number!r}")
    return int(number)


def default_category_ids(num_classes: int) -> list[int]:
    """COCO ids of classes whose labels had none: from 1, in their order."""
    return list(range(1, num_classes + 1))


# Of a ring of three points.
_LEAST_NUMBERS = 6


@register_label_format("coco", one_file=True)
def read_coco(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a COCO file; `iscrowd` objects are ignored ones, and images without annotations have no objects.

    Raises:
        InputError: not a COCO file, or an annotation of an unknown image or category.
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
    """Names by id; ids of one name are one class, as a supercategory may have its category's name.

    Raises:
        InputError: an id that is there twice: nobody knows which is meant.
    """
    counts = Counter(item["id"] for item in content["categories"])
    twice = next((value for value, number in counts.items() if number > 1), None)
    if twice is not None:
        raise InputError(f"{labels} lists {counts[twice]} categories of id {twice}; give each its own id")
    return {item["id"]: str(item["name"]) for item in content["categories"]}


def _numbered(content: Any) -> dict[str, int] | None:
    try:
        return category_ids_by_name(content)
    # Text identifies categories in the file as well as numbers do.
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
    """Refuse two images of one id or one name: nobody knows whose the annotations are."""
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
    # Fewer than three points have no area: where there is nothing else, the object is dropped as such.
    polygons = [shapely.Polygon(ring) for ring in rings if ring.size >= _LEAST_NUMBERS] or [
        shapely.LineString(rings[0][[0, -1]])
    ]
    if len(polygons) == 1:
        return polygons[0]
    return shapely.union_all(shapely.make_valid(polygons, method="structure", keep_collapsed=False))
