"""Whether objects lie on pixels that are there."""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt

from perf_vit.data.labels import ImageRecord
from perf_vit.data.objects import ObjectImages, touch_valid
from perf_vit.errors import DataWarning, InputError
from perf_vit.types import BoolArray, GeoImage, Source, Window

__all__ = ["SeenObjects", "check_objects_seen"]

# Images to look at, and their longest side: a part of those that statistics are measured on.
_IMAGES = 16
_SIDE_PX = 256
# Objects of an image that are looked at again at full resolution, and as much of each.
_AGAIN = 16
_AGAIN_PX = 512


class SeenObjects:
    """A source that notes which objects have a valid pixel under them, as its windows are read.

    Args:
        source: to read from.
        boxes_xyxy: of objects, in the source's pixels, [n, 4].

    Attributes:
        seen: [n] bool, of the windows read so far.
    """

    def __init__(self, source: Source, boxes_xyxy: npt.NDArray[np.floating]) -> None:
        self._source = source
        self._starts = np.floor(boxes_xyxy[:, :2]).astype(np.int64)
        self._stops = np.ceil(boxes_xyxy[:, 2:]).astype(np.int64)
        self.seen: BoolArray = np.zeros(len(boxes_xyxy), bool)

    @property
    def extent(self) -> Window:
        """The window of all pixels."""
        return self._source.extent

    def read(self, window: Window) -> GeoImage:
        """Pixels and valid mask of a window; any thread may call it."""
        image = self._source.read(window)
        corner, size = (window.col, window.row), (window.width, window.height)
        inside = np.hstack([np.clip(xy - corner, 0, size) for xy in (self._starts, self._stops)])
        near = np.flatnonzero((inside[:, 2:] > inside[:, :2]).all(axis=1) & ~self.seen)
        # Threads only ever set what is true, so none undoes another's work.
        self.seen[near[touch_valid(inside[near], image.valid)]] = True
        return image


def check_objects_seen(images: ObjectImages, part: str, seed: int) -> None:
    """Tell about how many objects lie on no valid pixel, and refuse images of which all do; 16 images stand for more.

    Args:
        images: with their objects.
        part: training or validation, for messages.
        seed: decides which images are looked at.

    Raises:
        InputError: no object of any image has a valid pixel under it.
    """
    with_objects = [index for index, record in enumerate(images.records) if (~record.ignored).any()]
    order = np.random.default_rng(seed).permutation(len(with_objects))[:_IMAGES]
    unseen, number, first = 0, 0, ""
    for index in (with_objects[place] for place in order.tolist()):
        record, valid = images.records[index], images.read_reduced(index, _SIDE_PX).valid
        hidden = _number_hidden(images, index, valid)
        unseen, number = unseen + hidden, number + int((~record.ignored).sum())
        first = first or (record.path if hidden else "")
    if not unseen:
        return
    text = f"{unseen} of {number} objects of the {len(order)} {part} images looked at have no valid pixel under them"
    if unseen == number and len(order) == len(with_objects):
        raise InputError(f"{text}, the first in {first}; check the nodata value, NaN and the labels' place")
    warnings.warn(f"{text} and are ignored, the first in {first}", DataWarning, stacklevel=3)


def _number_hidden(images: ObjectImages, index: int, valid: BoolArray) -> int:
    """Objects of an image without a valid pixel.

    What the image at lower resolution says of some is looked at again, and the others are taken to be like these.
    """
    record = images.records[index]
    hidden = record.boxes_xyxy[~_touch_valid(record, valid) & ~record.ignored]
    some = np.random.default_rng(index).permutation(hidden)[:_AGAIN].tolist()
    seen = [_has_valid_pixel(images, index, box) for box in some]
    return round(len(hidden) * (1 - sum(seen) / len(seen))) if seen else 0


def _has_valid_pixel(images: ObjectImages, index: int, box_xyxy: list[float]) -> bool:
    left, top, right, bottom = math.floor(box_xyxy[0]), math.floor(box_xyxy[1]), *map(math.ceil, box_xyxy[2:])
    window = Window(top, left, min(bottom - top, _AGAIN_PX), min(right - left, _AGAIN_PX))
    return bool(images.read(index, window)[0].valid.any())


def _touch_valid(record: ImageRecord, valid: BoolArray) -> BoolArray:
    """Whether there is a valid pixel under each box, as far as an image at lower resolution tells, [n]."""
    scale = np.array([valid.shape[1] / record.width, valid.shape[0] / record.height])
    left_top = np.floor(record.boxes_xyxy[:, :2] * scale).astype(int)
    right_bottom = np.maximum(np.ceil(record.boxes_xyxy[:, 2:] * scale).astype(int), left_top + 1)
    return np.array(
        [valid[y0:y1, x0:x1].any() for (x0, y0), (x1, y1) in zip(left_top, right_bottom, strict=True)], bool
    )
