"""How many labelled pixels each class has in sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from perf_vit.data.windows import LabelledSource
from perf_vit.types import IGNORE_INDEX, Window

__all__ = ["count_class_pixels", "count_labelled_pixels", "pieces"]

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
