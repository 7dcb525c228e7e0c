"""Where the pixels of each class lie in labelled sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from perf_vit.data.class_pixels import pieces
from perf_vit.data.windows import LabelledSource
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray

__all__ = ["find_class_pixels"]

_WINDOW_PX = 512
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
