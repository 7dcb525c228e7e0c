"""Counts and samples of the labelled pixels of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray, Window

__all__ = ["count_class_pixels", "count_labelled_pixels", "find_class_pixels", "pieces"]

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
