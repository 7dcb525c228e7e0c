"""Tile datasets of segmentation; counts and samples of the labelled pixels of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.data.augmentation import draw_log_uniform
from perf_vit.data.samplers import SegmentationSampler
from perf_vit.labels import LabelSource
from perf_vit.tiling import grid_windows, random_window
from perf_vit.transforms import Augmentation, Normalizer, StainJitter, resize_with_labels
from perf_vit.types import IGNORE_INDEX, BoolArray, GeoImage, LabelArray, Source, Window

__all__ = [
    "LabelledSource",
    "LabelledTile",
    "SegmentationGrid",
    "SegmentationTiles",
    "count_class_pixels",
    "count_labelled_pixels",
    "find_class_pixels",
    "pieces",
]

LabelledTile = tuple[Tensor, Tensor, Tensor]
"""Tile [C, h, w] float32, labels [(K,) h, w] int64, and valid pixels [h, w] bool."""


@dataclass(frozen=True, slots=True)
class LabelledSource:
    """Source with labels on the same pixel grid, and the region to use.

    Attributes:
        source: Source of the pixels.
        labels: Labels on the same grid.
        region: Region of both to use.
        keep_open: Whether to keep the source's file open after a read; False if there may be more sources than the
            limit of open files.
    """

    source: Source
    labels: LabelSource
    region: Window
    keep_open: bool = True

    def has_labels(self, tile_px: int, seed: int = 0) -> bool:
        """Return whether any pixel is valid and labelled.

        Windows are read in random order until one has such a pixel; all are read only if there is none.
        """
        windows = grid_windows(self.region, tile_px, overlap=0)
        for index in np.random.default_rng(seed).permutation(len(windows)):
            window = windows[index]
            labelled = (self.labels.read(window) != IGNORE_INDEX) & _inside(self.region, window)
            # Reading the labels is enough for most windows without any.
            if labelled.any() and (self._pixels(window).valid & labelled).any():
                return True
        return False

    def read(self, window: Window, normalizer: Normalizer) -> tuple[npt.NDArray[np.float32], LabelArray]:
        """Return standardised pixels [C, H, W] and labels [(K,) H, W], `IGNORE_INDEX` where invalid or outside."""
        image, labels = self.read_image(window)
        return normalizer(image), labels

    def read_image(self, window: Window) -> tuple[GeoImage, LabelArray]:
        """Return the source's pixels and the labels of `read`."""
        image = self._pixels(window)
        return image, self._labels_where(image.valid, window, self.labels.read(window))

    def read_labels(self, window: Window) -> LabelArray:
        """Return the labels of `read`; pixels are read only if there are labels."""
        labels = self.labels.read(window)
        if (labels == IGNORE_INDEX).all():
            return labels
        return self._labels_where(self._pixels(window).valid, window, labels)

    def read_reduced(self, max_size_px: int) -> GeoImage:
        """Read the region at lower resolution, for statistics."""
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


class SegmentationTiles(Dataset[LabelledTile]):
    """Augmented training tiles; item `i` of epoch `e` depends on (seed, e * tiles_per_epoch + i) only.

    Without a sampler, windows are random; those without labelled pixels are drawn again, up to ten times.

    Args:
        sources: Labelled sources; each gives tiles in proportion to its number of pixels.
        normalizer: Normalizer, applied before augmentation.
        augmentation: Augmentation of image and labels.
        tile_px: Tile size in pixels.
        tiles_per_epoch: Number of tiles per epoch.
        seed: Seed of windows and augmentation, whatever the number of workers.
        stain: Stain jitter, applied before the normalizer; None for none.
        resolution: Pixel size range (min, max) of tiles, in the unit of `pixel_sizes`. Larger or smaller windows are
            read and resized, so no padding is needed.
        pixel_sizes: Pixel size of each source; required with `resolution`.
        sampler: Sampler of windows; None for random windows.
    """

    def __init__(
        self,
        sources: Sequence[LabelledSource],
        normalizer: Normalizer,
        augmentation: Augmentation,
        *,
        tile_px: int,
        tiles_per_epoch: int,
        seed: int,
        stain: StainJitter | None = None,
        resolution: tuple[float, float] | None = None,
        pixel_sizes: Sequence[float] | None = None,
        sampler: SegmentationSampler | None = None,
    ) -> None:
        self.sources = tuple(sources)
        areas = [float(source.region.height * source.region.width) for source in self.sources]
        self._shares = np.cumsum(areas) / sum(areas)
        self.normalizer = normalizer
        self.augmentation = augmentation
        self.tile_px = tile_px
        self.tiles_per_epoch = tiles_per_epoch
        self.seed = seed
        self.stain = stain
        self.resolution = resolution
        self.pixel_sizes = pixel_sizes
        self.sampler = sampler

    def __len__(self) -> int:
        return self.tiles_per_epoch

    def __getitem__(self, index: int) -> LabelledTile:
        """Return tile, labels and valid pixels; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        _, _, image, labels = self._read(index, rng)
        if self.stain is not None:
            image = self.stain(image, int(rng.integers(2**31)))
        pixels, mask, labels = resize_with_labels(
            self.normalizer(image), image.mask, labels, self.tile_px, self.tile_px
        )
        pixels, labels, valid = self.augmentation(pixels, labels, seed=int(rng.integers(2**31)), mask=mask)
        return torch.from_numpy(pixels), torch.from_numpy(labels).long(), torch.from_numpy(valid)

    def describe(self, index: int) -> str:
        """Return image and window of a sample."""
        chosen, window, *_ = self._read(index, np.random.default_rng((self.seed, index)))
        return f"{self.sources[chosen].source.path}, {window}"

    def _read(self, index: int, rng: np.random.Generator) -> tuple[int, Window, GeoImage, LabelArray]:
        """Return a source, a window of it with a label, and what it holds."""
        pixel_size = None if self.resolution is None else draw_log_uniform(self.resolution, rng)
        for _ in range(10):
            chosen, window = self._draw(index, rng, pixel_size)
            image, labels = self.sources[chosen].read_image(window)
            if self.sampler is not None or (labels != IGNORE_INDEX).any():
                break
        return chosen, window, image, labels

    def _draw(self, index: int, rng: np.random.Generator, pixel_size: float | None) -> tuple[int, Window]:
        """Return the index of a source and a window of it."""
        if self.sampler is not None:
            return self.sampler.draw(index, rng, lambda source: self._window_px(source, pixel_size))
        chosen = self._choose(rng)
        return chosen, random_window(self.sources[chosen].region, self._window_px(chosen, pixel_size), rng)

    def _window_px(self, source: int, pixel_size: float | None) -> int:
        return window_px(self.tile_px, pixel_size, None if self.pixel_sizes is None else self.pixel_sizes[source])

    def _choose(self, rng: np.random.Generator) -> int:
        # A single source needs no random number.
        return 0 if len(self.sources) == 1 else int(np.searchsorted(self._shares, rng.random(), side="right"))


def window_px(tile_px: int, pixel_size: float | None, source_pixel_size: float | None) -> int:
    """Return the window size in source pixels of a tile with a given pixel size; `tile_px` if that is None."""
    if pixel_size is None:
        return tile_px
    assert source_pixel_size is not None
    return max(1, round(tile_px * pixel_size / source_pixel_size))


class SegmentationGrid(Dataset[LabelledTile]):
    """All tiles of a grid over the region, without augmentation; each pixel counts once.

    Windows at the end are shifted back to the edge; pixels already covered by an earlier window are ignored in the
    labels.

    Args:
        source: Labelled source.
        normalizer: Normalizer of the pixels.
        tile_px: Tile size in pixels.
    """

    def __init__(self, source: LabelledSource, normalizer: Normalizer, *, tile_px: int) -> None:
        self.source = source
        self.normalizer = normalizer
        self.windows = grid_windows(source.region, tile_px, overlap=0)
        self._row_stops = _previous_stops(sorted({w.row for w in self.windows}), tile_px)
        self._col_stops = _previous_stops(sorted({w.col for w in self.windows}), tile_px)

    def __len__(self) -> int:
        return len(self.windows)

    def describe(self, index: int) -> str:
        """Return image and window of a sample."""
        return f"{self.source.source.path}, {self.windows[index]}"

    def __getitem__(self, index: int) -> LabelledTile:
        """Return tile, labels and valid pixels."""
        window = self.windows[index]
        image, labels = self.source.read_image(window)
        labels[..., : max(0, self._row_stops[window.row] - window.row), :] = IGNORE_INDEX
        labels[..., : max(0, self._col_stops[window.col] - window.col)] = IGNORE_INDEX
        pixels = torch.from_numpy(self.normalizer(image))
        return pixels, torch.from_numpy(labels).long(), torch.from_numpy(image.valid)


def _previous_stops(starts: list[int], size: int) -> dict[int, int]:
    """Map each start to the end of the previous window."""
    return {start: before + size for before, start in zip([starts[0] - size, *starts], starts, strict=False)}


_WINDOW_PX = 512

# 260 million pixels, read in about a minute: enough to find a class with one pixel in a million.
_MAX_WINDOWS = 1000


def count_class_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    window_px: int = _WINDOW_PX,
    max_windows: int = _MAX_WINDOWS,
) -> list[int]:
    """Count the pixels of each class available for training: labelled, valid and within the region.

    Args:
        sources: Rasters with labels and regions.
        num_classes: Number of classes K.
        window_px: Size of the windows read, in pixels.
        max_windows: Maximum number of windows to read; if there are more, a fixed random subset is read.

    Returns:
        Number of pixels per class; for multi-label layers, the pixels where the class is present.
    """
    return count_labelled_pixels(sources, num_classes, window_px=window_px, max_windows=max_windows)[0]


def count_labelled_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    window_px: int = _WINDOW_PX,
    max_windows: int = _MAX_WINDOWS,
) -> tuple[list[int], int]:
    """Count pixels as `count_class_pixels`, and all labelled pixels read, including those without any class."""
    windows = [(source, window) for source in sources for window in pieces(source.region, window_px)]
    # Random, as equal steps through the rows of a grid may read its diagonal only.
    chosen = np.sort(np.random.default_rng(0).permutation(len(windows))[:max_windows])
    counts, num_labelled = np.zeros(num_classes, np.int64), 0
    for index in chosen.tolist():
        source, window = windows[index]
        labels = source.read_labels(window)
        labelled = labels != IGNORE_INDEX
        if labels.ndim == 3:
            counts += (labels == 1).sum((1, 2))
            labelled = labelled.any(0)
        else:
            # IGNORE_INDEX is above all class indices.
            counts += np.bincount(labels.ravel(), minlength=num_classes)[:num_classes]
        num_labelled += int(labelled.sum())
    return [int(count) for count in counts], num_labelled


def pieces(region: Window, size: int) -> Iterator[Window]:
    """Yield windows that cover a region exactly once; those at the end are smaller."""
    for row in range(region.row, region.row_stop, size):
        for col in range(region.col, region.col_stop, size):
            yield Window(row, col, min(size, region.row_stop - row), min(size, region.col_stop - col))


# Few enough to store for hundreds of classes, enough for varied tiles of common classes.
_MAX_PIXELS = 4096


def find_class_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    multilabel: bool = False,
    seed: int = 0,
    max_pixels: int = _MAX_PIXELS,
    window_px: int = _WINDOW_PX,
    on_window: Callable[[int, int], None] | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Sample pixels of each class, without replacement, from all pixels available for training; reads all windows once.

    Args:
        sources: Rasters with labels and regions.
        num_classes: Number of classes K.
        multilabel: Whether labels have a layer per class; pixels without any class then form an additional, last class.
        seed: Seed of the sample.
        max_pixels: Maximum number of pixels per class.
        window_px: Size of the windows read, in pixels.
        on_window: Function called with the number of windows done and the total.

    Returns:
        Pixels (source, row, column) of each class, [n, 3].
    """
    windows = [(index, window) for index, one in enumerate(sources) for window in pieces(one.region, window_px)]
    rng = np.random.default_rng(seed)
    samples = [_Sample(max_pixels, rng) for _ in range(num_classes + int(multilabel))]
    for done, (index, window) in enumerate(windows, 1):
        labels = sources[index].read_labels(window)
        for number, here in _of_classes(labels, num_classes):
            samples[number].add(index, window.row, window.col, here)
        if on_window is not None:
            on_window(done, len(windows))
    return [sample.pixels for sample in samples]


def _of_classes(labels: LabelArray, num_classes: int) -> list[tuple[int, BoolArray]]:
    """Return the classes of a window and their pixels [h, w]."""
    if labels.ndim == 2:
        return [(int(k), labels == k) for k in np.unique(labels) if k != IGNORE_INDEX]
    true = labels == 1
    none = (labels == 0).any(0) & ~true.any(0)
    return [*enumerate(true), (num_classes, none)]


class _Sample:
    """Uniform random sample of a stream of pixels: those with the smallest random keys."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.pixels: npt.NDArray[np.int64] = np.zeros((0, 3), np.int64)
        self._keys: npt.NDArray[np.float64] = np.zeros(0)
        self._size = size
        self._rng = rng

    def add(self, source: int, row: int, col: int, here: BoolArray) -> None:
        """Add pixels of a window [h, w] that starts at a row and column."""
        positions = np.flatnonzero(here)
        keys = self._rng.random(len(positions))
        if len(self._keys) == self._size:
            low = keys < self._keys.max()
            positions, keys = positions[low], keys[low]
        rows, cols = np.divmod(positions, here.shape[1])
        new = np.stack([np.full(len(positions), source), rows + row, cols + col], axis=1)
        pixels, keys = np.concatenate([self.pixels, new]), np.concatenate([self._keys, keys])
        kept = np.argpartition(keys, self._size)[: self._size] if len(keys) > self._size else slice(None)
        self.pixels, self._keys = pixels[kept], keys[kept]
