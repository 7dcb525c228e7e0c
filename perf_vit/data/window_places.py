"""Where training windows of labelled sources are cut: around pixels of each class alike, or tile by tile of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from perf_vit.tiling import grid_windows, random_window_holding
from perf_vit.types import Window

__all__ = ["SAMPLERS", "ClassPlaces", "GridPlaces", "WindowPlaces"]

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
