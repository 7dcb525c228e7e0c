"""Image records, which all label formats are read into."""

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
    """Masks of an image's objects, read by window; can be pickled."""

    def read(self, indices: npt.NDArray[np.int64], window: Window) -> BoolArray:
        """Read masks of objects within a window of the image, [len(indices), height, width]."""

    def read_crops(self, indices: npt.NDArray[np.int64], window: Window) -> MaskCrops:
        """Read masks of objects within a window of the image, each cropped to its rectangle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """Image and its validated objects: every box lies inside the image and has an area.

    Attributes:
        path: Path or URL for `perf_vit.open`.
        height: Number of rows.
        width: Number of columns.
        labels: Class indices, [n].
        boxes_xyxy: Boxes (left, top, right, bottom) in pixels, [n, 4]; pixel (0, 0) covers 0 to 1.
        ignored: Whether objects are ignored in training and metrics, [n].
        oriented_boxes: Oriented boxes (centre x, centre y, width, height, angle), [n, 5], if the labels have them. They
            may exceed the image.
        masks: Reader of the objects' masks, if the labels have them.
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
    """Records of a set of images.

    Attributes:
        records: Image records, in the order of image names or of the label file.
        classes: Class names, in the order of the class indices.
        counts: Number of objects kept, ignored, clipped, dropped etc.
        category_ids: COCO id of each class, if the labels have ids.
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
        """Return the number of objects of each class, without ignored ones."""
        kept = [record.labels[~record.ignored] for record in self.records]
        sums = np.bincount(np.concatenate([*kept, np.zeros(0, np.int64)]), minlength=len(self.classes))
        return dict(zip(self.classes, sums.tolist(), strict=True))


@dataclass(slots=True, kw_only=True)
class RawObject:
    """Unvalidated object of a label file.

    Attributes:
        name: Class name.
        box: Left, top, right, bottom in pixels; None if given by the outline.
        ignored: Whether it is marked as crowd, difficult or similar.
        corners: Corners (x, y) of an oriented object, [n, 2].
        outline: Shapely geometry in pixels, or `Rle`.
        lost_parts: Number of parts of the outline with fewer than three points.
    """

    name: str
    box: Sequence[float] | None = None
    ignored: bool = False
    corners: npt.NDArray[np.float64] | None = None
    outline: Any = None
    lost_parts: int = 0


@dataclass(slots=True, kw_only=True)
class RawImage:
    """Unvalidated image of a label file.

    Attributes:
        path: Path of the image.
        labels: Name of the label file, for errors.
        objects: Objects, in file order.
        size: Image size (height, width) according to the label file, if given.
        masks: Reader of masks, if they aren't part of the objects.
    """

    path: str
    labels: str
    objects: list[RawObject]
    size: tuple[int, int] | None = None
    masks: MaskReader | None = None


@dataclass(frozen=True, slots=True)
class RawLabels:
    """Labels as read from a format, unvalidated.

    Attributes:
        images: Labelled images.
        classes: Class names in the order of the label files; empty if they have none.
        category_ids: COCO category ids by name; None if the labels have no numeric ids.
    """

    images: list[RawImage]
    classes: tuple[str, ...] = ()
    category_ids: dict[str, int] | None = None
