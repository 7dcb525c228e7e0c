"""Counts and samples of labelled pixels, and checks that there are some."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from perf_vit.data.config import SegmentationDataConfig
from perf_vit.data.samplers import ClassSampler
from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.errors import DataWarning, InputError
from perf_vit.tiling import random_window
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray, Window

__all__ = [
    "check_labelled",
    "count_class_pixels",
    "count_labelled_pixels",
    "find_class_pixels",
    "find_labelled_pixels",
    "labelled_share",
    "num_windows",
    "pieces",
    "warn_of_absent_classes",
]

# Number of windows of 512 x 512 pixels to search for classes.
_WINDOWS_CHECKED = 64

_IMAGES_CHECKED = 64

_WINDOW_PX = 512

# 260 million pixels, read in about a minute: enough to find a class with one pixel in a million.
_MAX_WINDOWS = 1000


def count_class_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    window_px: int = _WINDOW_PX,
    max_windows: int = _MAX_WINDOWS,
    on_window: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Count the pixels of each class available for training: labelled, valid and within the region.

    In large data, the labels of all windows are read, and the pixels of a fixed random subset of those with labels. The
    counts are then estimates. Classes that the subset lacks are counted in the windows that have them.

    Args:
        sources: Rasters with labels and regions.
        num_classes: Number of classes K.
        window_px: Size of the windows read, in pixels.
        max_windows: Maximum number of windows to read with their pixels, in all and of each class that these lack.
        on_window: Function called with the number of windows done and the total.

    Returns:
        Number of pixels per class; for multi-label layers, the pixels where the class is present.
    """
    windows = _windows(sources, window_px)
    if len(windows) <= max_windows:
        return _count(windows, num_classes, on_window)[0].tolist()
    present = np.zeros((num_classes + 1, len(windows)), bool)
    for index, (source, window) in enumerate(windows):
        labels = source.labels.read(window)
        present[[number for number, here in _of_classes(labels, num_classes) if here.any()], index] = True
        present[-1, index] = (labels != IGNORE_INDEX).any()
        if on_window is not None:
            on_window(index + 1, len(windows))
    counts = _estimate(windows, present[-1], num_classes, max_windows)
    for number in np.flatnonzero((counts == 0) & present[:-1].any(axis=1)).tolist():
        counts[number] = _estimate(windows, present[number], num_classes, max_windows)[number]
    return counts.tolist()


def _estimate(
    windows: Sequence[tuple[LabelledSource, Window]], chosen: BoolArray, num_classes: int, max_windows: int
) -> npt.NDArray[np.int64]:
    """Return the number of pixels per class in the chosen windows, estimated from a random subset if it is large."""
    places = np.flatnonzero(chosen)
    drawn = np.sort(np.random.default_rng(0).permutation(places)[:max_windows]).tolist()
    counts, _ = _count([windows[index] for index in drawn], num_classes)
    return np.ceil(counts * (len(places) / max(1, len(drawn)))).astype(np.int64)


def count_labelled_pixels(
    sources: Sequence[LabelledSource],
    num_classes: int,
    *,
    window_px: int = _WINDOW_PX,
    max_windows: int = _MAX_WINDOWS,
    on_window: Callable[[int, int], None] | None = None,
) -> tuple[list[int], int]:
    """Count pixels of each class and all labelled pixels, including those without any class.

    If there are more windows than `max_windows`, a fixed random subset is read, whether or not it has labels.
    """
    windows = _windows(sources, window_px)
    # Random, as equal steps through the rows of a grid may read its diagonal only.
    chosen = np.sort(np.random.default_rng(0).permutation(len(windows))[:max_windows])
    counts, num_labelled = _count([windows[index] for index in chosen.tolist()], num_classes, on_window)
    return counts.tolist(), num_labelled


def num_windows(sources: Sequence[LabelledSource]) -> int:
    """Return the number of windows that the regions of sources are counted in."""
    return len(_windows(sources, _WINDOW_PX))


def _windows(sources: Sequence[LabelledSource], window_px: int) -> list[tuple[LabelledSource, Window]]:
    return [(source, window) for source in sources for window in pieces(source.region, window_px)]


def _count(
    windows: Sequence[tuple[LabelledSource, Window]],
    num_classes: int,
    on_window: Callable[[int, int], None] | None = None,
) -> tuple[npt.NDArray[np.int64], int]:
    counts, num_labelled = np.zeros(num_classes, np.int64), 0
    for done, (source, window) in enumerate(windows, 1):
        labels = source.read_labels(window)
        labelled = labels != IGNORE_INDEX
        if labels.ndim == 3:
            counts += (labels == 1).sum((1, 2))
            labelled = labelled.any(0)
        else:
            # IGNORE_INDEX is above all class indices.
            counts += np.bincount(labels.ravel(), minlength=num_classes)[:num_classes]
        num_labelled += int(labelled.sum())
        if on_window is not None:
            on_window(done, len(windows))
    return counts, num_labelled


def pieces(region: Window, size: int) -> Iterator[Window]:
    """Yield windows that cover a region exactly once; those at the end are smaller."""
    for row in range(region.row, region.row_stop, size):
        for col in range(region.col, region.col_stop, size):
            yield Window(row, col, min(size, region.row_stop - row), min(size, region.col_stop - col))


_PIXELS_PER_PLACE = 16
_MAX_PLACES_PX = 1 << 18

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
    rng = np.random.default_rng(seed)
    return _find_pixels(
        sources,
        [_Sample(max_pixels, rng) for _ in range(num_classes + int(multilabel))],
        lambda labels: _of_classes(labels, num_classes),
        window_px=window_px,
        on_window=on_window,
    )


def find_labelled_pixels(
    sources: Sequence[LabelledSource],
    *,
    seed: int = 0,
    on_window: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int64]:
    """Sample pixels of all labelled places, as many of each, so that small ones beside large ones are drawn, too.

    A place is what a window of 512 x 512 pixels has of one class. 16 pixels of each are drawn with replacement, 262,144
    in all at most: of more than 16,384 places fewer pixels are kept, and of more than 262,144 places not all.

    Returns:
        Pixels (source, row, column), [n, 3].
    """

    def places(labels: LabelArray) -> list[tuple[int, BoolArray]]:
        return [(0, here) for _, here in _of_classes(labels, len(labels)) if here.any()]

    return _find_pixels(
        sources,
        [_PlaceSample(_MAX_PLACES_PX, np.random.default_rng(seed))],
        places,
        window_px=_WINDOW_PX,
        on_window=on_window,
    )[0]


def _find_pixels(
    sources: Sequence[LabelledSource],
    samples: Sequence[_Sample],
    groups_of: Callable[[LabelArray], list[tuple[int, BoolArray]]],
    *,
    window_px: int,
    on_window: Callable[[int, int], None] | None,
) -> list[npt.NDArray[np.int64]]:
    """Add the pixels of each group that a function finds in the labels of a window to its sample."""
    windows = [(index, window) for index, one in enumerate(sources) for window in pieces(one.region, window_px)]
    for done, (index, window) in enumerate(windows, 1):
        for number, here in groups_of(sources[index].read_labels(window)):
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
        self._pixels: npt.NDArray[np.int64] = np.zeros((0, 3), np.int64)
        self._keys: npt.NDArray[np.float64] = np.zeros(0)
        self._added: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = []
        self._num_added, self._largest = 0, 0.0
        self._size = size
        self._rng = rng

    @property
    def pixels(self) -> npt.NDArray[np.int64]:
        """Source, row and column of each pixel of the sample, [n, 3]."""
        self._select()
        return self._pixels

    def add(self, source: int, row: int, col: int, here: BoolArray) -> None:
        """Add pixels of a window [h, w] that starts at a row and column."""
        positions, keys = self._draw(np.flatnonzero(here))
        if len(self._keys) == self._size:
            low = keys < self._largest
            positions, keys = positions[low], keys[low]
        rows, cols = np.divmod(positions, here.shape[1])
        new = np.stack([np.full(len(positions), source), rows + row, cols + col], axis=1)
        self._added.append((new, keys))
        self._num_added += len(keys)
        # Not after each window: it copies the whole sample.
        if self._num_added >= self._size:
            self._select()

    def _select(self) -> None:
        """Take what was added into the sample."""
        pixels, keys = (np.concatenate(parts) for parts in zip((self._pixels, self._keys), *self._added, strict=True))
        kept = np.argpartition(keys, self._size)[: self._size] if len(keys) > self._size else slice(None)
        self._pixels, self._keys, self._added, self._num_added = pixels[kept], keys[kept], [], 0
        self._largest = self._keys.max(initial=0.0)

    def _draw(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return positions of pixels with their keys."""
        return positions, self._rng.random(len(positions))


class _PlaceSample(_Sample):
    """Sample with as many pixels of each window, however few it has; above the size, the last of each go first."""

    def _draw(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        keys = np.arange(_PIXELS_PER_PLACE) + self._rng.random(_PIXELS_PER_PLACE)
        return self._rng.choice(positions, _PIXELS_PER_PLACE), keys


def labelled_share(sources: Sequence[LabelledSource], tile_px: int, seed: int = 0) -> float:
    """Return the fraction of 64 random tiles with a labelled pixel; sources count in proportion to their area."""
    rng = np.random.default_rng(seed)
    areas = np.array([float(one.region.height * one.region.width) for one in sources])
    chosen = rng.choice(len(sources), _WINDOWS_CHECKED, p=areas / areas.sum())
    found = [sources[index].may_teach(random_window(sources[index].region, tile_px, rng)) for index in chosen.tolist()]
    return float(np.mean(found))


def check_labelled(sources: Sequence[LabelledSource], config: SegmentationDataConfig, part: str) -> None:
    """Check a sample of 64 rasters for pixels to learn from; warn if some have none.

    Raises:
        InputError: No raster has a pixel that is valid and labelled.
    """
    order = np.random.default_rng(0).permutation(len(sources)).tolist()
    chosen = [sources[index] for index in sorted(order[:_IMAGES_CHECKED])]
    bare = [one for one in chosen if not one.has_labels(config.tile_px)]
    rest = (sources[index] for index in order[_IMAGES_CHECKED:])
    if len(bare) == len(chosen) and not any(one.has_labels(config.tile_px) for one in rest):
        raise InputError(
            f"data.{part} has no pixel that is valid and labelled: {bare[0].source.path}"
            f"{f' and {len(sources) - 1} more' if len(sources) > 1 else ''}; check nodata, region and labels"
        )
    if bare:
        checked = "checked " if len(chosen) < len(sources) else ""
        warnings.warn(
            f"{len(bare)} of {len(chosen)} {checked}rasters to {part} on have no pixel that is valid and labelled, "
            f"the first {bare[0].source.path}",
            DataWarning,
            stacklevel=3,
        )


def warn_of_absent_classes(
    sources: Sequence[LabelledSource],
    config: SegmentationDataConfig,
    part: str,
    sampler: ClassSampler | None = None,
) -> None:
    """Warn about classes without pixels; in large data a sample of windows is searched.

    Args:
        sources: Labelled sources.
        config: Data config.
        part: "train" or "val", for the message.
        sampler: Sampler of the classes, which knows them all; None for another.
    """
    if sampler is not None:
        pixels, among = sampler.num_pixels[: len(config.classes)], f"all labelled ones of data.{part}"
    else:
        pixels, labelled = count_labelled_pixels(sources, len(config.classes), max_windows=_WINDOWS_CHECKED)
        # The sample may have missed sparse labels.
        if not labelled:
            return
        among = f"{labelled:,} labelled ones of data.{part} checked"
    absent = [name for name, count in zip(config.classes, pixels, strict=True) if not count]
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(pixels)} classes have no pixel among {among}: {', '.join(absent)}",
            DataWarning,
            stacklevel=3,
        )
