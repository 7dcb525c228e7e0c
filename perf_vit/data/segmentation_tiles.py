"""Datasets that cut tiles from a labelled source, with the window code that prediction uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.data.augmentation import draw_log_uniform
from perf_vit.data.samplers import WindowPlaces
from perf_vit.labels import LabelSource
from perf_vit.tiling import grid_windows, random_window
from perf_vit.transforms import Augmentation, Normalizer, StainJitter, resize_with_labels
from perf_vit.types import IGNORE_INDEX, BoolArray, GeoImage, LabelArray, Source, Window

__all__ = ["GridWindows", "LabelledSource", "LabelledTile", "RandomWindows"]

LabelledTile = tuple[Tensor, Tensor, Tensor]
"""Tile [C, h, w] float32, labels [(K,) h, w] int64, and valid pixels [h, w] bool."""


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """A source, its labels on the same pixel grid, and the part of both that may be used.

    Attributes:
        source: the pixels.
        labels: on the same grid.
        region: the part of both.
        keep_open: leave the source's file open after a read; there may be more sources than a process may hold open.
    """

    source: Source
    labels: LabelSource
    region: Window
    keep_open: bool = True

    def has_labels(self, tile_px: int, seed: int = 0) -> bool:
        """Whether any pixel is valid and labelled.

        Looks at windows in random order until one has such a pixel, so only where there is none it looks at all.
        """
        windows = grid_windows(self.region, tile_px, overlap=0)
        for index in np.random.default_rng(seed).permutation(len(windows)):
            window = windows[index]
            labelled = (self.labels.read(window) != IGNORE_INDEX) & _inside(self.region, window)
            # Most windows without labels are known from the labels alone.
            if labelled.any() and (self._pixels(window).valid & labelled).any():
                return True
        return False

    def read(self, window: Window, normalizer: Normalizer) -> tuple[npt.NDArray[np.float32], LabelArray]:
        """Pixels [C, H, W], standardised, and labels [H, W] or [K, H, W]; `IGNORE_INDEX` where invalid or outside."""
        image, labels = self.read_image(window)
        return normalizer(image), labels

    def read_image(self, window: Window) -> tuple[GeoImage, LabelArray]:
        """As `read`, with the pixels as the source has them."""
        image = self._pixels(window)
        return image, self._labels_where(image.valid, window, self.labels.read(window))

    def read_labels(self, window: Window) -> LabelArray:
        """The labels of `read`; where there are none, the pixels are not looked at."""
        labels = self.labels.read(window)
        if (labels == IGNORE_INDEX).all():
            return labels
        return self._labels_where(self._pixels(window).valid, window, labels)

    def read_reduced(self, max_size_px: int) -> GeoImage:
        """Pixels of the region at lower resolution, for statistics."""
        image = self.source.read_reduced(max_size_px, self.region)
        self._release()
        return image

    def _pixels(self, window: Window) -> GeoImage:
        image = self.source.read(window)
        self._release()
        return image

    def _release(self) -> None:
        if not self.keep_open:
            self.source.close()

    def _labels_where(self, valid: BoolArray, window: Window, labels: LabelArray) -> LabelArray:
        usable = valid & _inside(self.region, window)
        return np.where(usable, labels, np.uint8(IGNORE_INDEX))


def _inside(region: Window, window: Window) -> npt.NDArray[np.bool_]:
    inside = np.zeros(window.shape, bool)
    shared = region.intersect(window)
    if shared is not None:
        inside[shared.slices_in(window)] = True
    return inside


class RandomWindows(Dataset[LabelledTile]):
    """Tiles at random places, or where `places` says; item `i` of epoch `e` is a function of (seed, e * length + i).

    A random window without a single labelled pixel is drawn anew, up to ten times.

    Args:
        sources: where tiles come from, each in proportion to its pixels.
        normalizer: applied before augmentation.
        augmentation: applied to image and labels together.
        tile_px: side of a tile, in pixels.
        length: tiles an epoch.
        seed: decides places and augmentation, whatever the number of workers.
        stain: applied before the normalizer; None for none.
        resolution: (smallest, largest) pixel size of a tile, in the unit of `pixel_sizes`. A window of another size
            than a tile is read then and resized, so it uncovers nothing.
        pixel_sizes: pixel size of each source; needed with `resolution`.
        places: of the windows; anywhere if None.
    """

    def __init__(
        self,
        sources: Sequence[LabelledSource],
        normalizer: Normalizer,
        augmentation: Augmentation,
        *,
        tile_px: int,
        length: int,
        seed: int,
        stain: StainJitter | None = None,
        resolution: tuple[float, float] | None = None,
        pixel_sizes: Sequence[float] | None = None,
        places: WindowPlaces | None = None,
    ) -> None:
        self.sources = tuple(sources)
        areas = [float(source.region.height * source.region.width) for source in self.sources]
        self._shares = np.cumsum(areas) / sum(areas)
        self.normalizer = normalizer
        self.augmentation = augmentation
        self.tile_px = tile_px
        self.length = length
        self.seed = seed
        self.stain = stain
        self.resolution = resolution
        self.pixel_sizes = pixel_sizes
        self.places = places

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> LabelledTile:
        """Tile, labels and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        side = None if self.resolution is None else draw_log_uniform(self.resolution, rng)
        for _ in range(10):
            chosen, window = self._draw(index, rng, side)
            image, labels = self.sources[chosen].read_image(window)
            if self.places is not None or (labels != IGNORE_INDEX).any():
                break
        if self.stain is not None:
            image = self.stain(image, int(rng.integers(2**31)))
        pixels, mask, labels = resize_with_labels(
            self.normalizer(image), image.mask, labels, self.tile_px, self.tile_px
        )
        pixels, labels, valid = self.augmentation(pixels, labels, seed=int(rng.integers(2**31)), mask=mask)
        return torch.from_numpy(pixels), torch.from_numpy(labels).long(), torch.from_numpy(valid)

    def _draw(self, index: int, rng: np.random.Generator, side: float | None) -> tuple[int, Window]:
        """Index of a source and a window of it."""
        if self.places is not None:
            return self.places.draw(index, rng, lambda source: self._window_px(source, side))
        chosen = self._choose(rng)
        return chosen, random_window(self.sources[chosen].region, self._window_px(chosen, side), rng)

    def _window_px(self, source: int, side: float | None) -> int:
        return window_px(self.tile_px, side, None if self.pixel_sizes is None else self.pixel_sizes[source])

    def _choose(self, rng: np.random.Generator) -> int:
        # One source takes no draw, so its windows are the same as ever.
        return 0 if len(self.sources) == 1 else int(np.searchsorted(self._shares, rng.random(), side="right"))


def window_px(tile_px: int, side: float | None, pixel_size: float | None) -> int:
    """How many pixels of a source a tile takes whose pixels have this side; None for the source's own."""
    if side is None:
        return tile_px
    assert pixel_size is not None
    return max(1, round(tile_px * side / pixel_size))


class GridWindows(Dataset[LabelledTile]):
    """Every tile of a grid over the region, each pixel once as nearly as the grid allows; nothing is augmented.

    Where the last row or column of windows is shifted back to end at the edge, the pixels that an earlier window
    already holds are ignored in the labels, so a metric counts each pixel once.
    """

    def __init__(self, source: LabelledSource, normalizer: Normalizer, *, tile_px: int) -> None:
        self.source = source
        self.normalizer = normalizer
        self.windows = grid_windows(source.region, tile_px, overlap=0)
        self._row_stops = _previous_stops(sorted({w.row for w in self.windows}), tile_px)
        self._col_stops = _previous_stops(sorted({w.col for w in self.windows}), tile_px)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> LabelledTile:
        """Tile, labels and valid pixels."""
        window = self.windows[index]
        image, labels = self.source.read_image(window)
        labels[..., : max(0, self._row_stops[window.row] - window.row), :] = IGNORE_INDEX
        labels[..., : max(0, self._col_stops[window.col] - window.col)] = IGNORE_INDEX
        pixels = torch.from_numpy(self.normalizer(image))
        return pixels, torch.from_numpy(labels).long(), torch.from_numpy(image.valid)


def _previous_stops(starts: list[int], size: int) -> dict[int, int]:
    """For each start, where the window before it ended."""
    return {start: before + size for before, start in zip([starts[0] - size, *starts], starts, strict=False)}
