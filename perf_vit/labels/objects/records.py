"""Image records, which all label formats are read into, and the registry of formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from perf_vit.errors import ConfigError
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.registry import Registry
from perf_vit.sources.slides import SlideSource
from perf_vit.types import BoolArray, MaskCrops, Source, Window

__all__ = [
    "LABEL_FORMATS",
    "ImageRecord",
    "LabelFormat",
    "LabelOptions",
    "MaskReader",
    "ObjectIndex",
    "RawImage",
    "RawLabels",
    "RawObject",
    "register_label_format",
]


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

    def labelled(self, source: Source) -> Source:
        """Return the source on whose pixels the objects lie: of a slide, all of it or the part inside its bounds.

        Args:
            source: The opened image.
        """
        if not isinstance(source, SlideSource) or source.size == self.extent.shape:
            return source
        return source.whole if source.whole.size == self.extent.shape else source.within_bounds()

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


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Options of formats whose files don't hold all that labels need.

    Attributes:
        classes: Class names in the order of their indices, None for those of the files.
        attribute: Column of polygons that holds class names, None for one class.
    """

    classes: Sequence[str] | None = None
    attribute: str | None = None

    @property
    def first_class(self) -> str:
        """Name of the class of objects that have no class of their own."""
        return self.classes[0] if self.classes else "object"

    def require_one_class(self, labels: str, hint: str = "") -> None:
        """Check that there is one class, as the files don't distinguish classes.

        Args:
            labels: Name of the labels, for the error.
            hint: Advice for the error.

        Raises:
            ConfigError: There are several classes.
        """
        if self.classes and len(self.classes) > 1:
            raise ConfigError(f"{labels} are of one class, got {len(self.classes)} classes{hint}")


ReadLabels = Callable[[Path, ImageFolder, LabelOptions], RawLabels]


@dataclass(frozen=True)
class LabelFormat:
    """A reader of labels.

    Attributes:
        read: Called with the path of the labels, the folder of images and the options.
        one_file: Whether one file holds the labels of all images, by their names.
    """

    read: ReadLabels
    one_file: bool


LABEL_FORMATS: Registry[LabelFormat] = Registry("format of labels", ConfigError)
"""Formats by name."""


def register_label_format(name: str, *, one_file: bool = False) -> Callable[[ReadLabels], ReadLabels]:
    """Decorate a function (path of labels, folder of images, options) -> `RawLabels` to read a format.

    Args:
        name: Name of the format.
        one_file: Whether one file holds the labels of all images, by their names, rather than a folder of one each.

    Raises:
        ValueError: The name is taken.
    """

    def register(read: ReadLabels) -> ReadLabels:
        LABEL_FORMATS.add(name, LabelFormat(read, one_file))
        return read

    return register
