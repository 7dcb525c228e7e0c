"""How many labelled pixels each class has in sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray, Window

__all__ = ["count_class_pixels", "count_labelled_pixels", "find_class_pixels", "pieces"]

_WINDOW_PX = 512

# 260 million pixels, read in about a minute: enough for a class of a millionth of them.
_MAX_WINDOWS = 1000


def count_class_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    window_px: int = _WINDOW_PX,
    max_windows: int = _MAX_WINDOWS,
) -> list[int]:
    """Count the pixels of each class that training can see: labelled, valid in the image and inside the region.

    Args:
        sources: rasters with their labels and regions.
        num_classes: K.
        window_px: side of the windows read, in pixels.
        max_windows: of more than that, as many are read, the same ones each time.

    Returns:
        One count a class; of labels with a layer a class, the pixels where it is true.
    """
    return count_labelled_pixels(sources, num_classes, window_px=window_px, max_windows=max_windows)[0]


def count_labelled_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    window_px: int = _WINDOW_PX,
    max_windows: int = _MAX_WINDOWS,
) -> tuple[list[int], int]:
    """`count_class_pixels`, and how many pixels were looked at that carry a label, be it that no class is true."""
    places = [(source, window) for source in sources for window in pieces(source.region, window_px)]
    # At random: equal steps through the rows of a grid may read its diagonal alone.
    chosen = np.sort(np.random.default_rng(0).permutation(len(places))[:max_windows])
    counts, num_labelled = np.zeros(num_classes, np.int64), 0
    for index in chosen.tolist():
        source, window = places[index]
        labels = source.read_labels(window)
        labelled = labels != IGNORE_INDEX
        if labels.ndim == 3:
            counts += (labels == 1).sum((1, 2))
            labelled = labelled.any(0)
        else:
            # Ignored pixels have an index above all classes.
            counts += np.bincount(labels.ravel(), minlength=num_classes)[:num_classes]
        num_labelled += int(labelled.sum())
    return [int(count) for count in counts], num_labelled


def pieces(region: Window, size: int) -> Iterator[Window]:
    """Windows that cover a region once; those at its end are smaller."""
    for row in range(region.row, region.row_stop, size):
        for col in range(region.col, region.col_stop, size):
            yield Window(row, col, min(size, region.row_stop - row), min(size, region.col_stop - col))


# Few enough to keep for hundreds of classes, enough that tiles of a common class are not the same ones.
_MAX_PLACES = 4096


def find_class_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    multilabel: bool = False,
    seed: int = 0,
    max_places: int = _MAX_PLACES,
    window_px: int = _WINDOW_PX,
    on_window: Callable[[int, int], None] | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Draw pixels of each class, without replacement, from all that training can see; all windows are read once.

    Args:
        sources: rasters with their labels and regions.
        num_classes: K.
        multilabel: labels have a layer a class. Pixels of a class are those where it is true, and those where none is
            are one more class, the last.
        seed: decides the draw.
        max_places: pixels of a class at most.
        window_px: side of the windows read, in pixels.
        on_window: called with windows done and all of them.

    Returns:
        Of each class (source, row, column), [n, 3].
    """
    windows = [(index, window) for index, one in enumerate(sources) for window in pieces(one.region, window_px)]
    rng = np.random.default_rng(seed)
    samples = [_Sample(max_places, rng) for _ in range(num_classes + int(multilabel))]
    for done, (index, window) in enumerate(windows, 1):
        labels = sources[index].read_labels(window)
        for number, here in _of_classes(labels, num_classes):
            samples[number].add(index, window.row, window.col, here)
        if on_window is not None:
            on_window(done, len(windows))
    return [sample.pixels for sample in samples]


def _of_classes(labels: LabelArray, num_classes: int) -> list[tuple[int, BoolArray]]:
    """The classes of a window, each with its pixels [h, w]."""
    if labels.ndim == 2:
        return [(int(k), labels == k) for k in np.unique(labels) if k != IGNORE_INDEX]
    true = labels == 1
    none = (labels == 0).any(0) & ~true.any(0)
    return [*enumerate(true), (num_classes, none)]


class _Sample:
    """A uniform sample of pixels that come by: of random keys the smallest."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.pixels: npt.NDArray[np.int64] = np.zeros((0, 3), np.int64)
        self._keys: npt.NDArray[np.float64] = np.zeros(0)
        self._size = size
        self._rng = rng

    def add(self, source: int, row: int, col: int, here: BoolArray) -> None:
        """Take up pixels of a window [h, w] that begins at a row and column."""
        places = np.flatnonzero(here)
        keys = self._rng.random(len(places))
        if len(self._keys) == self._size:
            low = keys < self._keys.max()
            places, keys = places[low], keys[low]
        rows, cols = np.divmod(places, here.shape[1])
        new = np.stack([np.full(len(places), source), rows + row, cols + col], axis=1)
        pixels, keys = np.concatenate([self.pixels, new]), np.concatenate([self._keys, keys])
        kept = np.argpartition(keys, self._size)[: self._size] if len(keys) > self._size else slice(None)
        self.pixels, self._keys = pixels[kept], keys[kept]
