"""Images and categories of a COCO file of labels, for predictions that go by its ids."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from perf_vit.errors import InputError

__all__ = ["CocoImages", "category_ids_by_name", "default_category_ids", "ids_of_classes"]


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
