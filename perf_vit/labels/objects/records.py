"""What every label format is read into: one record an image, with its objects in pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from perf_vit.types import BoolArray, MaskCrops, Window

__all__ = ["ImageRecord", "MaskReader", "ObjectIndex", "RawImage", "RawLabels", "RawObject"]


class MaskReader(Protocol):
    """The outlines of an image's objects, burnt when a window asks for them; may be pickled."""

    def read(self, indices: npt.NDArray[np.int64], window: Window) -> BoolArray:
        """Masks of some objects inside a window of the image, [len(indices), height, width]."""

    def read_crops(self, indices: npt.NDArray[np.int64], window: Window) -> MaskCrops:
        """The same masks, each inside its own rectangle only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """An image and its objects, checked: every box lies inside the image and has an area.

    Attributes:
        path: what `perf_vit.open_source` opens.
        height: rows.
        width: columns.
        labels: class indices, [n].
        boxes_xyxy: left, top, right, bottom in pixels, [n, 4]; pixel (0, 0) covers 0 to 1.
        ignored: objects that count neither as found nor as missed, [n].
        oriented_boxes: centre x, centre y, width, height, angle, [n, 5], where the labels have them. They may reach
            past the image.
        masks: burns the objects' outlines, where the labels have them.
    """

    path: str
    height: int
    width: int
    labels: npt.NDArray[np.int64]
    boxes_xyxy: npt.NDArray[np.float64]
    ignored: BoolArray
    oriented_boxes: npt.NDArray[np.float64] | None = None
    masks: MaskReader | None = None

    @property
    def extent(self) -> Window:
        """Window of all pixels."""
        return Window(0, 0, self.height, self.width)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ObjectIndex:
    """The records of a set of images.

    Attributes:
        records: one an image, in the order of their names or of the label file.
        classes: names, in the order of the class indices.
        counts: how many objects were kept, ignored, clipped and dropped, by what happened to them.
        category_ids: COCO's id of each class, where the labels have ids.
    """

    records: tuple[ImageRecord, ...]
    classes: tuple[str, ...]
    counts: Counter[str] = field(default_factory=Counter)
    category_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.records)

    def class_counts(self) -> dict[str, int]:
        """Objects of each class that are not ignored."""
        kept = [record.labels[~record.ignored] for record in self.records]
        sums = np.bincount(np.concatenate([*kept, np.zeros(0, np.int64)]), minlength=len(self.classes))
        return dict(zip(self.classes, sums.tolist(), strict=True))


@dataclass(slots=True, kw_only=True)
class RawObject:
    """An object as a label file says it, unchecked.

    Attributes:
        name: of its class.
        box: left, top, right, bottom in pixels; None where the outline gives it.
        ignored: crowd, difficult and the like.
        corners: of an oriented object, [n, 2] x and y.
        outline: a shapely geometry in pixels, or an `Rle`.
        lost_parts: parts of its outline that had fewer than three points.
    """

    name: str
    box: Sequence[float] | None = None
    ignored: bool = False
    corners: npt.NDArray[np.float64] | None = None
    outline: Any = None
    lost_parts: int = 0


@dataclass(slots=True, kw_only=True)
class RawImage:
    """An image as a label file says it, unchecked.

    Attributes:
        path: of the image.
        labels: the label file's name, for errors.
        objects: in the file's order.
        size: (height, width) that the labels were made for, where the file says so.
        masks: burns the outlines, where they are not part of the objects.
    """

    path: str
    labels: str
    objects: list[RawObject]
    size: tuple[int, int] | None = None
    masks: MaskReader | None = None


@dataclass(frozen=True, slots=True)
class RawLabels:
    """What a format's reader gives.

    Attributes:
        images: those with labels.
        classes: names in the label files' own order, empty where they have none.
        category_ids: COCO's ids of categories by name; None where the labels have none that are numbers.
    """

    images: list[RawImage]
    classes: tuple[str, ...] = ()
    category_ids: dict[str, int] | None = None
