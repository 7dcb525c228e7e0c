"""Whether objects lie on pixels that are there."""

from __future__ import annotations

import math
import warnings

import numpy as np

from perf_vit.data.labels import ImageRecord
from perf_vit.data.objects import ObjectImages
from perf_vit.errors import DataWarning, InputError
from perf_vit.types import BoolArray, Window

__all__ = ["check_objects_seen"]

# Images to look at, and their longest side: read in a few seconds.
_IMAGES = 64
_SIDE_PX = 256
_LOOKED_AT_AGAIN = 16


def check_objects_seen(images: ObjectImages, part: str, seed: int) -> None:
    """Tell how many objects lie on no valid pixel, and refuse images of which all do; some images stand for all.

    Args:
        images: with their objects.
        part: training or validation, for messages.
        seed: decides which images are looked at.

    Raises:
        InputError: no image has a valid pixel, or no object has one under it.
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
    if unseen == number:
        raise InputError(f"{text}, the first in {first}; check the nodata value, NaN and the labels' place")
    warnings.warn(f"{text} and are ignored, the first in {first}", DataWarning, stacklevel=3)


def _number_hidden(images: ObjectImages, index: int, valid: BoolArray) -> int:
    """Objects of an image without a valid pixel; what the image at lower resolution says of some is looked at again."""
    record = images.records[index]
    hidden = record.boxes_xyxy[~_touch_valid(record, valid) & ~record.ignored]
    again = [_has_valid_pixel(images, index, box) for box in hidden[:_LOOKED_AT_AGAIN].tolist()]
    return len(again) - sum(again) if any(again) else len(hidden)


def _has_valid_pixel(images: ObjectImages, index: int, box_xyxy: list[float]) -> bool:
    left, top, right, bottom = math.floor(box_xyxy[0]), math.floor(box_xyxy[1]), *map(math.ceil, box_xyxy[2:])
    return bool(images.read(index, Window(top, left, bottom - top, right - left))[0].valid.any())


def _touch_valid(record: ImageRecord, valid: BoolArray) -> BoolArray:
    """Whether there is a valid pixel under each box, as far as an image at lower resolution tells, [n]."""
    scale = np.array([valid.shape[1] / record.width, valid.shape[0] / record.height])
    left_top = np.floor(record.boxes_xyxy[:, :2] * scale).astype(int)
    right_bottom = np.maximum(np.ceil(record.boxes_xyxy[:, 2:] * scale).astype(int), left_top + 1)
    return np.array(
        [valid[y0:y1, x0:x1].any() for (x0, y0), (x1, y1) in zip(left_top, right_bottom, strict=True)], bool
    )
