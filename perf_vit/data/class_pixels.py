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
    return _find_pixels(
        sources,
        num_classes + int(multilabel),
        lambda labels: _of_classes(labels, num_classes),
        seed=seed,
        max_pixels=max_pixels,
        window_px=window_px,
        on_window=on_window,
    )


def find_labelled_pixels(
    sources: Sequence[LabelledSource],
    *,
    seed: int = 0,
    max_pixels: int = 4 * _MAX_PIXELS,
    on_window: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int64]:
    """Sample pixels of any class as `find_class_pixels`; returns (source, row, column), [n, 3]."""
    return _find_pixels(
        sources, 1, _labelled, seed=seed, max_pixels=max_pixels, window_px=_WINDOW_PX, on_window=on_window
    )[0]


def _find_pixels(
    sources: Sequence[LabelledSource],
    num_groups: int,
    groups_of: Callable[[LabelArray], list[tuple[int, BoolArray]]],
    *,
    seed: int,
    max_pixels: int,
    window_px: int,
    on_window: Callable[[int, int], None] | None,
) -> list[npt.NDArray[np.int64]]:
    """Sample pixels of each group that a function finds in the labels of a window."""
    windows = [(index, window) for index, one in enumerate(sources) for window in pieces(one.region, window_px)]
    rng = np.random.default_rng(seed)
    samples = [_Sample(max_pixels, rng) for _ in range(num_groups)]
    for done, (index, window) in enumerate(windows, 1):
        for number, here in groups_of(sources[index].read_labels(window)):
            samples[number].add(index, window.row, window.col, here)
        if on_window is not None:
            on_window(done, len(windows))
    return [sample.pixels for sample in samples]


def _labelled(labels: LabelArray) -> list[tuple[int, BoolArray]]:
    here = labels != IGNORE_INDEX
    return [(0, here if here.ndim == 2 else here.any(0))]


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
