"""Tiles of lanes of real blood smears: whether a lane begins with a white cell decides the class of its platelets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from mosaic import CLASSES as CELLS
from mosaic import Smear, cut_objects, flipped

from perf_vit.types import ObjectLabels

CLASSES = ("target", "other")
"""Platelets of lanes whose control has a white cell, and of the other lanes."""

SHRINK = 4
"""Factor by which photographs are shrunk: platelets of 40 px become 10 px."""

LANE_PX = 128
PHOTO_PX = 120
"""Height of a lane, and of the photographs in it; the rest is black."""

MARGIN_PX = 64
"""Width of the control at the left end of a lane."""

# Widths of the pieces of photographs that fill a lane.
_PIECE_PX = (40, 97)


@dataclass(frozen=True)
class Place:
    """Columns of a photograph, without a white cell, around a platelet that is whole.

    Attributes:
        photo: Index of the photograph.
        columns: First column, and the one after the last.
        platelet: First column of the platelet, and the one after its last.
    """

    photo: int
    columns: tuple[int, int]
    platelet: tuple[int, int]


class LaneMaker:
    """Maker of tiles from some photographs.

    Args:
        smears: Photographs shrunk by `SHRINK`, `PHOTO_PX` high.

    Attributes:
        white: Photographs and possible first columns (lowest, highest) of controls with a whole white cell.
        plain: The same for controls that no white cell touches.
        places: Places of platelets in lanes.

    Raises:
        ValueError: A photograph has another height, or there are no controls or platelets.
    """

    def __init__(self, smears: Sequence[Smear]) -> None:
        self.images = [smear.images[SHRINK] for smear in smears]
        heights = {image.shape[0] for image in self.images}
        if heights != {PHOTO_PX}:
            raise ValueError(f"expected photographs of {SHRINK * PHOTO_PX} rows, got {SHRINK} x {sorted(heights)}")
        self.platelets: list[npt.NDArray[np.float64]] = []
        self.white: list[tuple[int, int, int]] = []
        self.plain: list[tuple[int, int, int]] = []
        self.places: list[Place] = []
        for index, smear in enumerate(smears):
            self._add(index, smear)
        if not (self.white and self.plain and self.places):
            raise ValueError("expected white cells, columns without any and platelets in the photographs; got too few")

    def make(
        self, height: int, width: int, seed: int, target_share: float = 0.25
    ) -> tuple[npt.NDArray[np.uint8], ObjectLabels]:
        """Make a tile; platelets in its controls are ignored.

        Args:
            height: Height of the tile, a multiple of `LANE_PX`.
            width: Width of the tile, at least `MARGIN_PX`.
            seed: Seed of everything.
            target_share: Probability that a control has a white cell.

        Returns:
            [height, width, 3] uint8, and its platelets.
        """
        if height % LANE_PX or width < MARGIN_PX:
            raise ValueError(f"expected n x {LANE_PX} rows, {MARGIN_PX} or more columns, got {height} x {width}")
        rng = np.random.default_rng(seed)
        canvas = np.zeros((height, width, 3), np.uint8)
        labels = [
            self._fill(canvas[top : top + PHOTO_PX], top, bool(rng.random() < target_share), rng)
            for top in range(0, height, LANE_PX)
        ]
        return canvas, ObjectLabels(
            labels=np.concatenate([each.labels for each in labels]),
            boxes_xyxy=np.concatenate([each.boxes_xyxy for each in labels]),
            ignored=np.concatenate([each.ignored for each in labels]),
        )

    def _add(self, index: int, smear: Smear) -> None:
        """Find the controls and the platelets of a photograph."""
        width = self.images[index].shape[1]
        boxes = smear.boxes_xyxy * np.array([width, PHOTO_PX] * 2)
        columns = np.stack([np.floor(boxes[:, 0]), np.ceil(boxes[:, 2])], axis=1).astype(int)
        white, platelets = (smear.labels == CELLS.index(name) for name in ("WBC", "Platelets"))
        self.platelets.append(boxes[platelets])
        for left, right in columns[white]:
            if right - left <= MARGIN_PX:
                self.white.append((index, max(0, right - MARGIN_PX), min(left, width - MARGIN_PX)))
        for left, right in gaps(columns[white], width):
            if right - left >= MARGIN_PX:
                self.plain.append((index, left, right - MARGIN_PX))
            self.places += [
                Place(index, (left, right), (int(first), int(last)))
                for first, last in columns[platelets]
                if left <= first and last <= right
            ]

    def _fill(self, lane: npt.NDArray[np.uint8], top: int, is_target: bool, rng: np.random.Generator) -> ObjectLabels:
        """Write the photographs of one lane, [PHOTO_PX, width, 3], and return its platelets."""
        options = self.white if is_target else self.plain
        photo, low, high = options[rng.integers(len(options))]
        parts = [self._piece(photo, int(rng.integers(low, high + 1)), MARGIN_PX, 0, rng)]
        left = MARGIN_PX
        while left < lane.shape[1]:
            place = self.places[rng.integers(len(self.places))]
            size, first = _chosen(place, rng)
            parts.append(self._piece(place.photo, first, size, left, rng))
            left += size
        for image, boxes, limits in parts:
            start, stop = int(limits[0]), min(int(limits[2]), lane.shape[1])
            lane[:, start:stop] = image[:, : stop - start]
            limits[2], limits[[1, 3]] = stop, (top, top + PHOTO_PX)
            boxes += np.array([0, top, 0, top])
        boxes, limits = (
            np.concatenate(each)
            for each in (
                [boxes for _, boxes, _ in parts],
                [np.tile(limits, (len(boxes), 1)) for _, boxes, limits in parts],
            )
        )
        labels = np.full(len(boxes), CLASSES.index("target" if is_target else "other"))
        cut = cut_objects(boxes, labels, limits)
        return ObjectLabels(
            labels=cut.labels,
            boxes_xyxy=cut.boxes_xyxy,
            ignored=cut.ignored | (distances(cut.boxes_xyxy) < 0),
        )

    def _piece(
        self, photo: int, first: int, width: int, left: int, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return columns of a photograph, flipped at random, their platelets and their limits at a place of a lane."""
        size = np.array([width, PHOTO_PX] * 2)
        shares = (self.platelets[photo] - np.array([first, 0, first, 0])) / size
        image, shares = flipped(self.images[photo][:, first : first + width], shares, rng.random(2) < 0.5)
        limits = np.array([left, 0, left + width, PHOTO_PX], float)
        return image, shares * size + np.array([left, 0, left, 0]), limits


def gaps(columns: npt.NDArray[np.int_], width: int) -> list[tuple[int, int]]:
    """Return the ranges of columns [first, stop) that none of some ranges, [n, 2], touches, within a width."""
    found, left = [], 0
    for first, stop in [*sorted(map(tuple, columns.tolist())), (width, width)]:
        if first > left:
            found.append((left, first))
        left = max(left, stop)
    return found


def distances(boxes_xyxy: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the distances of the boxes' centres from the controls; negative within them."""
    centers: npt.NDArray[np.float32] = boxes_xyxy[:, [0, 2]].mean(axis=1) - MARGIN_PX
    return centers


def _chosen(place: Place, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the width and the first column of a piece that holds a platelet whole."""
    (low, high), (first, last) = place.columns, place.platelet
    width = min(max(int(rng.integers(*_PIECE_PX)), last - first), high - low)
    return width, int(rng.integers(max(low, last - width), min(first, high - width) + 1))
