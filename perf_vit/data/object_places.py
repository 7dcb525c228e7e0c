"""Where training windows of objects are cut: anywhere, around objects, or around objects of each class alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from perf_vit.data.labels.records import ImageRecord
from perf_vit.errors import ConfigError, InputError
from perf_vit.tiling import random_window
from perf_vit.types import Window

__all__ = ["SAMPLERS", "ObjectPlaces", "Places", "RandomPlaces", "make_places"]

SAMPLERS = ("random", "objects", "balanced")


class Places(Protocol):
    """Draws places for windows."""

    def draw(self, rng: np.random.Generator, size_px: int | Sequence[int]) -> tuple[int, Window]:
        """Index of an image and a square window of it, which reaches past the edge only of smaller images.

        Args:
            rng: decides.
            size_px: side of the window, or one for each image.
        """


class RandomPlaces:
    """Places anywhere; an image is drawn as often as a grid of tiles would have tiles on it.

    Args:
        records: the images.
        tile_px: side of a tile.
    """

    def __init__(self, records: Sequence[ImageRecord], tile_px: int) -> None:
        self.extents = [record.extent for record in records]
        tiles = np.array([max(1, -(-e.height // tile_px)) * max(1, -(-e.width // tile_px)) for e in self.extents])
        self.shares = tiles / tiles.sum()

    def draw(self, rng: np.random.Generator, size_px: int | Sequence[int]) -> tuple[int, Window]:
        """Index of an image and a square window of it."""
        image = int(rng.choice(len(self.extents), p=self.shares))
        return image, random_window(self.extents[image], _size_of(size_px, image), rng)


class ObjectPlaces:
    """Places around an object that is not ignored, which lies anywhere in its window, and some places anywhere.

    Args:
        records: the images.
        tile_px: side of a tile.
        balanced: draw a class first and then one of its objects; otherwise every object is drawn alike.
        random_share: share of windows drawn anywhere, so that a model sees what lies far from objects.

    Raises:
        InputError: there is no object that is not ignored.
    """

    def __init__(
        self, records: Sequence[ImageRecord], tile_px: int, *, balanced: bool, random_share: float = 0.25
    ) -> None:
        self.anywhere = RandomPlaces(records, tile_px)
        self.random_share = random_share
        kept = [np.flatnonzero(~record.ignored) for record in records]
        self.images = np.repeat(np.arange(len(records)), [len(indices) for indices in kept])
        if len(self.images) == 0:
            raise InputError(
                f"expected objects to cut windows around, got none in {len(records)} images; check the labels, "
                "or use the sampler random"
            )
        self.boxes = np.concatenate([r.boxes_xyxy[indices] for r, indices in zip(records, kept, strict=True)])
        labels = np.concatenate([r.labels[indices] for r, indices in zip(records, kept, strict=True)])
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.groups = groups if balanced else [np.arange(len(labels))]

    def draw(self, rng: np.random.Generator, size_px: int | Sequence[int]) -> tuple[int, Window]:
        """Index of an image and a square window of it."""
        if rng.random() < self.random_share:
            return self.anywhere.draw(rng, size_px)
        group = self.groups[int(rng.integers(len(self.groups)))]
        index = int(rng.choice(group))
        image = int(self.images[index])
        left, top, right, bottom = self.boxes[index].tolist()
        extent = self.anywhere.extents[image]
        side = _size_of(size_px, image)
        row = _start(top, bottom, extent.height, side, rng)
        col = _start(left, right, extent.width, side, rng)
        return image, Window(row, col, side, side)


def make_places(sampler: str, records: Sequence[ImageRecord], tile_px: int, random_share: float = 0.25) -> Places:
    """The places of a sampler's name.

    Raises:
        ConfigError: no such sampler.
        InputError: no object to cut windows around.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler}")
    if sampler == "random":
        return RandomPlaces(records, tile_px)
    return ObjectPlaces(records, tile_px, balanced=sampler == "balanced", random_share=random_share)


def _size_of(size_px: int | Sequence[int], image: int) -> int:
    return size_px if isinstance(size_px, int) else size_px[image]


def _start(low: float, high: float, length: int, size_px: int, rng: np.random.Generator) -> int:
    """First pixel of a window along one axis: it holds [low, high), or its middle where that is too large."""
    first, last = int(np.ceil(high)) - size_px, int(np.floor(low))
    if first > last:
        first = last = round((low + high - size_px) / 2)
    first, last = (min(max(0, start), max(0, length - size_px)) for start in (first, last))
    return int(rng.integers(first, last + 1))
