"""Where training windows of labelled sources are cut: around pixels of each class alike, or tile by tile of a grid."""

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
    "ClassPlaces",
    "GridPlaces",
    "ObjectPlaces",
    "Places",
    "RandomPlaces",
    "WindowPlaces",
    "make_places",
]

SAMPLERS = ("random", "balanced", "grid")


class WindowPlaces(Protocol):
    """Decides places of windows, each a function of the index and the generator."""

    def draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Index of a source and a square window of it.

        Args:
            index: counts samples from epoch to epoch.
            rng: of this sample alone.
            size_px: side of the window by the index of its source.
        """


class ClassPlaces:
    """Windows that hold a pixel of a class, at a random place in them; every class comes as often as the others.

    Args:
        regions: the part of each source to stay inside.
        pixels: of each class (source, row, column), [n, 3], as `find_class_pixels` gives them; a class without any is
            left out.

    Attributes:
        num_pixels: of each class.
    """

    def __init__(self, regions: Sequence[Window], pixels: Sequence[npt.NDArray[np.int64]]) -> None:
        self.regions = tuple(regions)
        self.num_pixels = [len(group) for group in pixels]
        self.groups = [group for group in pixels if len(group)]
        assert self.groups, "labels without a single pixel are refused before"

    def draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Index of a source and a square window of it, which reaches past the edge only of smaller regions."""
        group = self.groups[int(rng.integers(len(self.groups)))]
        source, row, col = group[int(rng.integers(len(group)))].tolist()
        return source, random_window_holding(self.regions[source], row, col, size_px(source), rng)


class GridPlaces:
    """Every tile of a grid over all regions once an epoch, each epoch in an order of its own.

    A window of another size than the grid's tiles lies around the middle of its tile.

    Args:
        regions: the part of each source to cover.
        tile_px: side of a tile of the grid, of each source.
        seed: decides the orders.
    """

    def __init__(self, regions: Sequence[Window], tile_px: Sequence[int], seed: int) -> None:
        self.regions = tuple(regions)
        self.seed = seed
        self.tiles = [
            (source, tile)
            for source, (region, size) in enumerate(zip(regions, tile_px, strict=True))
            for tile in grid_windows(region, size, overlap=0)
        ]
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.tiles)

    def draw(self, index: int, rng: np.random.Generator, size_px: Callable[[int], int]) -> tuple[int, Window]:
        """Index of a source and a square window of it, which reaches past the edge only of smaller regions."""
        epoch, number = divmod(index, len(self.tiles))
        source, tile = self.tiles[self._order_of(epoch)[number]]
        size, region = size_px(source), self.regions[source]
        row = _centred(tile.row, tile.height, size, region.row, region.row_stop)
        col = _centred(tile.col, tile.width, size, region.col, region.col_stop)
        return source, Window(row, col, size, size)

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        known, order = self._order
        if known != epoch:
            # The samples' own generators begin with two numbers.
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.tiles))
            self._order = epoch, order
        return order


def _centred(first: int, length: int, size: int, start: int, stop: int) -> int:
    """First pixel of a window around the middle of a tile, inside [start, stop) as far as it fits."""
    return max(start, min(first + (length - size) // 2, stop - size))


OBJECT_SAMPLERS = ("random", "objects", "balanced")


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
    if sampler not in OBJECT_SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(OBJECT_SAMPLERS)}, got {sampler}")
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
