"""Samplers of training windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from perf_vit.errors import ConfigError, InputError
from perf_vit.labels.objects import ImageRecord
from perf_vit.tiling import grid_windows, random_window, random_window_holding
from perf_vit.types import Window

__all__ = [
    "OBJECT_SAMPLERS",
    "SAMPLERS",
    "ClassSampler",
    "DetectionSampler",
    "GridSampler",
    "ObjectSampler",
    "RandomSampler",
    "SegmentationSampler",
    "make_sampler",
]

SAMPLERS = ("random", "balanced", "grid")


class SegmentationSampler(Protocol):
    """Sampler of windows of labelled sources; windows depend on the index and the generator only."""

    def draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Return the index of a source and a square window of it.

        Args:
            index: Sample index, which continues from epoch to epoch.
            rng: Random generator of this sample.
            size_px: Function that returns the window size in pixels, given the index of the source.
        """


class ClassSampler:
    """Sampler of windows with a random pixel of a class at a random position; classes are drawn equally often.

    Args:
        regions: Region of each source that windows stay within.
        pixels: Pixels (source, row, column) of each class, [n, 3], from `find_class_pixels`; classes without pixels are
            left out.

    Attributes:
        num_pixels: Number of pixels per class.
    """

    def __init__(self, regions: Sequence[Window], pixels: Sequence[npt.NDArray[np.int64]]) -> None:
        self.regions = tuple(regions)
        self.num_pixels = [len(group) for group in pixels]
        self.groups = [group for group in pixels if len(group)]
        assert self.groups, "labels without pixels are rejected before"

    def draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Return the index of a source and a square window, which exceeds only regions smaller than itself."""
        group = self.groups[int(rng.integers(len(self.groups)))]
        source, row, col = group[int(rng.integers(len(group)))].tolist()
        return source, random_window_holding(self.regions[source], row, col, size_px(source), rng)


class GridSampler:
    """Sampler of all tiles of a grid over all regions, once per epoch and in a new random order each.

    Windows of another size than the tiles are centred on their tile.

    Args:
        regions: Region of each source to cover.
        tile_px: Tile size in pixels, of each source.
        seed: Seed of the orders.
        keep: Function (source, tile) that says which tiles to keep if there are several; None for all.
    """

    def __init__(
        self,
        regions: Sequence[Window],
        tile_px: Sequence[int],
        seed: int,
        keep: Callable[[int, Window], bool] | None = None,
    ) -> None:
        self.regions = tuple(regions)
        self.seed = seed
        self.tiles = [
            (source, tile)
            for source, (region, size) in enumerate(zip(regions, tile_px, strict=True))
            for tile in grid_windows(region, size, overlap=0)
        ]
        if keep is not None and len(self.tiles) > 1:
            self.tiles = [(source, tile) for source, tile in self.tiles if keep(source, tile)]
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.tiles)

    def draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Return the index of a source and a square window, which exceeds only regions smaller than itself."""
        epoch, number = divmod(index, len(self.tiles))
        source, tile = self.tiles[self._order_of(epoch)[number]]
        size, region = size_px(source), self.regions[source]
        row = _centred(tile.row, tile.height, size, region.row, region.row_stop)
        col = _centred(tile.col, tile.width, size, region.col, region.col_stop)
        return source, Window(row, col, size, size)

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        known, order = self._order
        if known != epoch:
            # Seeds of samples have two numbers.
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.tiles))
            self._order = epoch, order
        return order


def _centred(first: int, length: int, size: int, start: int, stop: int) -> int:
    """Return the first pixel of a window centred on a tile, moved into [start, stop) as far as it fits."""
    return max(start, min(first + (length - size) // 2, stop - size))


OBJECT_SAMPLERS = ("random", "objects", "balanced")


class DetectionSampler(Protocol):
    """Sampler of windows of images with objects."""

    def draw(self, rng: np.random.Generator, size_px: int | Sequence[int]) -> tuple[int, Window]:
        """Return the index of an image and a square window, which exceeds only images smaller than itself.

        Args:
            rng: Random generator.
            size_px: Window size in pixels, or one per image.
        """


class RandomSampler:
    """Sampler of windows anywhere; images are drawn in proportion to the number of tiles of a grid over them.

    Args:
        records: Image records.
        tile_px: Tile size in pixels.
    """

    def __init__(self, records: Sequence[ImageRecord], tile_px: int) -> None:
        self.extents = [record.extent for record in records]
        tiles = np.array([max(1, -(-e.height // tile_px)) * max(1, -(-e.width // tile_px)) for e in self.extents])
        self.shares = tiles / tiles.sum()

    def draw(self, rng: np.random.Generator, size_px: int | Sequence[int]) -> tuple[int, Window]:
        """Return the index of an image and a square window of it."""
        image = int(rng.choice(len(self.extents), p=self.shares))
        return image, random_window(self.extents[image], _size_of(size_px, image), rng)


class ObjectSampler:
    """Sampler of windows with an object that isn't ignored at a random position, and of some windows anywhere.

    Args:
        records: Image records.
        tile_px: Tile size in pixels.
        balanced: Whether to draw a class first and then one of its objects; otherwise all objects are equally likely.
        random_share: Fraction of windows drawn anywhere, so that a model also sees the background far from objects.

    Raises:
        InputError: There is no object that isn't ignored.
    """

    def __init__(
        self, records: Sequence[ImageRecord], tile_px: int, *, balanced: bool, random_share: float = 0.25
    ) -> None:
        self.anywhere = RandomSampler(records, tile_px)
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
        """Return the index of an image and a square window of it."""
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


def make_sampler(
    sampler: str, records: Sequence[ImageRecord], tile_px: int, random_share: float = 0.25
) -> DetectionSampler:
    """Build a detection sampler by name.

    Args:
        sampler: Name: random, objects or balanced.
        records: Image records.
        tile_px: Tile size in pixels.
        random_share: Fraction of windows drawn anywhere.

    Raises:
        ConfigError: The name is unknown.
        InputError: There are no objects to cut windows around.
    """
    if sampler not in OBJECT_SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(OBJECT_SAMPLERS)}, got {sampler}")
    if sampler == "random":
        return RandomSampler(records, tile_px)
    return ObjectSampler(records, tile_px, balanced=sampler == "balanced", random_share=random_share)


def _size_of(size_px: int | Sequence[int], image: int) -> int:
    return size_px if isinstance(size_px, int) else size_px[image]


def _start(low: float, high: float, length: int, size_px: int, rng: np.random.Generator) -> int:
    """Return a random first pixel of a window that contains [low, high) along one axis, or its middle if too large."""
    first, last = int(np.ceil(high)) - size_px, int(np.floor(low))
    if first > last:
        first = last = round((low + high - size_px) / 2)
    first, last = (min(max(0, start), max(0, length - size_px)) for start in (first, last))
    return int(rng.integers(first, last + 1))
