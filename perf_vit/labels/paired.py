"""Label files of many images, opened when read."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perf_vit.errors import DataWarning
from perf_vit.labels.open import LabelSource, open_labels
from perf_vit.sources import RasterSource
from perf_vit.sources._gdal import PerThread, Pool
from perf_vit.sources.slides import SlideSource
from perf_vit.types import LabelArray, Window

__all__ = ["LabelFiles", "PairedLabels"]

# Open files per thread and folder of a config.
_MAX_OPEN = 16
# Number of files to check: enough to find systematic errors, read within seconds.
_NUM_CHECKED = 64


class LabelFiles:
    """Label files of images, at most 16 of them open per thread; each item is the `LabelSource` of an image.

    It can be pickled, forked and shared between threads; each opens its own files.

    Args:
        paths: Paths of the label files.
        sources: Image of each label file.
        **options: Arguments of `perf_vit.labels.open_labels`.
    """

    def __init__(
        self, paths: Sequence[str | Path], sources: Sequence[RasterSource | SlideSource], **options: Any
    ) -> None:
        self.paths = tuple(os.fspath(path) for path in paths)
        self._pairs = tuple(zip(self.paths, sources, strict=True))
        self._options = {**options, "paired": True}
        self._opened = PerThread(functools.partial(_pool, self._pairs, self._options))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> PairedLabels:
        """Return the labels of an image."""
        return PairedLabels(self, range(len(self))[index])

    def read(self, index: int, window: Window) -> LabelArray:
        """Read a window of the labels of an image, see `LabelSource.read`.

        Raises:
            InputError: The file can't be read or doesn't fit its image.
        """
        return self._opened.get().get(index).read(window)

    def close(self) -> None:
        """Close this thread's files; the next read opens them again."""
        self._opened.close()

    def spot_check(self, seed: int = 0) -> None:
        """Open up to 64 files to find systematic errors; warn once about all files with warnings.

        Raises:
            InputError: A file can't be read or doesn't fit its image.
        """
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:_NUM_CHECKED]).tolist()
        told = [message for message in map(self._oddity, chosen) if message]
        if told:
            warnings.warn(
                f"{len(told)} of {len(chosen)} label files checked have warnings, the first: {told[0]}",
                DataWarning,
                stacklevel=3,
            )

    def _oddity(self, index: int) -> str | None:
        path, source = self._pairs[index]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            open_labels(path, source, **self._options).close()
        source.close()
        return next((str(each.message) for each in caught if issubclass(each.category, DataWarning)), None)


class PairedLabels:
    """Labels of one image of `LabelFiles`."""

    def __init__(self, files: LabelFiles, index: int) -> None:
        self._files = files
        self._index = index

    def read(self, window: Window) -> LabelArray:
        """Read a window, see `LabelSource.read`."""
        return self._files.read(self._index, window)

    def close(self) -> None:
        """Do nothing, as `LabelFiles` limits the number of open files."""


def _pool(pairs: Sequence[tuple[str, RasterSource | SlideSource]], options: dict[str, Any]) -> Pool[LabelSource]:
    return Pool(functools.partial(_open, pairs, options), _MAX_OPEN)


def _open(pairs: Sequence[tuple[str, RasterSource | SlideSource]], options: dict[str, Any], index: int) -> LabelSource:
    path, source = pairs[index]
    with warnings.catch_warnings():
        # `spot_check` reports warnings; each file is opened many times.
        warnings.simplefilter("ignore", DataWarning)
        return open_labels(path, source, spot_check=False, **options)
