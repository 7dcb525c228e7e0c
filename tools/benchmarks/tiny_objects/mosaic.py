"""Large tiles of tiny real objects: blood smears, shrunk and laid side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from perf_vit.labels.objects import ImageRecord, read_object_labels
from perf_vit.types import ObjectLabels

CLASSES = ("RBC", "WBC", "Platelets")

# Platelets of about 40 px become 4 to 8 px, red cells of about 100 px 10 to 20 px, white cells of about 200 px 20 to
# 40 px.
_SHRINK = (5, 6, 7, 8, 10)
# Of an object that a tile's border cuts, so much of the area must be left for it to count.
_LEAST_VISIBLE = 0.5


@dataclass(frozen=True)
class Smear:
    """A photograph and its cells.

    Attributes:
        images: [H / factor, W / factor, 3] uint8, one a factor.
        boxes_xyxy: [n, 4], as shares of width and height.
        labels: indices of `CLASSES`, [n].
    """

    images: dict[int, npt.NDArray[np.uint8]]
    boxes_xyxy: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]


def read_smears(folder: Path, factors: Sequence[int] = _SHRINK) -> tuple[list[Smear], list[Smear]]:
    """The photographs for training, and the last fifth by name, of other slides as far as names tell, for the test.

    Args:
        folder: BCCD's folder, with JPEGImages and Annotations.
        factors: Factors by which photographs are shrunk.
    """
    index = read_object_labels(folder / "Annotations", folder / "JPEGImages", label_format="voc", classes=CLASSES)
    smears = [_smear(record, factors) for record in sorted(index, key=lambda record: record.path)]
    num_train = len(smears) - len(smears) // 5
    return smears[:num_train], smears[num_train:]


def make_mosaic(smears: Sequence[Smear], side_px: int, seed: int) -> tuple[npt.NDArray[np.uint8], ObjectLabels]:
    """A square tile: rows of photographs, each row shrunk by a factor of its own, each photograph flipped at random.

    What the right and the lower border cut off is lost; cut objects
    of which less than half is left are marked as ignored.

    Args:
        smears: to choose from.
        side_px: of the tile.
        seed: decides everything.

    Returns:
        [side, side, 3] uint8, and its objects.
    """
    rng = np.random.default_rng(seed)
    order = iter(np.concatenate([rng.permutation(len(smears)) for _ in range(1 + 1000 // len(smears))]))
    canvas = np.zeros((side_px, side_px, 3), np.uint8)
    boxes, labels = [], []
    top = 0
    while top < side_px:
        factor, left, height = rng.choice(_SHRINK), 0, 1
        while left < side_px:
            smear = smears[next(order)]
            image, shares = flipped(smear.images[factor], smear.boxes_xyxy, rng.random(2) < 0.5)
            height, width = image.shape[:2]
            part = image[: side_px - top, : side_px - left]
            canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
            boxes.append(shares * np.array([width, height] * 2) + np.array([left, top] * 2))
            labels.append(smear.labels)
            left += width
        top += height
    return canvas, cut_objects(np.concatenate(boxes), np.concatenate(labels), np.array([0, 0, side_px, side_px]))


def shrunk(
    image: npt.NDArray[np.uint8], labels: ObjectLabels, factor: int
) -> tuple[npt.NDArray[np.uint8], ObjectLabels]:
    """The tile and its objects at a whole fraction of its size, pixels averaged."""
    size = (image.shape[1] // factor, image.shape[0] // factor)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return small, ObjectLabels(
        labels=labels.labels, boxes_xyxy=labels.boxes_xyxy / np.float32(factor), ignored=labels.ignored
    )


def _smear(record: ImageRecord, factors: Sequence[int]) -> Smear:
    image = cv2.cvtColor(cv2.imread(record.path), cv2.COLOR_BGR2RGB)
    height, width = image.shape[:2]
    images = {
        # Pixels are averaged over the area that they cover.
        factor: cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
        for factor in factors
    }
    return Smear(images, record.boxes_xyxy / np.array([width, height] * 2), record.labels)


def flipped(
    image: npt.NDArray[np.uint8], boxes_xyxy: npt.NDArray[np.float64], flips: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Mirror an image and its boxes, given as shares of width and height, along (x, y)."""
    left, top, right, bottom = boxes_xyxy.T
    if flips[0]:
        image, left, right = image[:, ::-1], 1 - right, 1 - left
    if flips[1]:
        image, top, bottom = image[::-1], 1 - bottom, 1 - top
    return image, np.stack([left, top, right, bottom], axis=1)


def cut_objects(
    boxes_xyxy: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], limits_xyxy: npt.NDArray[Any]
) -> ObjectLabels:
    """Cut boxes to limits, [4] or one row for each, [n, 4]; objects of which less than half is left are ignored."""
    cut = boxes_xyxy.clip(limits_xyxy[..., [0, 1, 0, 1]], limits_xyxy[..., [2, 3, 2, 3]])
    area, left = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (boxes_xyxy, cut))
    kept = left > 0
    return ObjectLabels(
        labels=labels[kept], boxes_xyxy=cut[kept].astype(np.float32), ignored=left[kept] < _LEAST_VISIBLE * area[kept]
    )
