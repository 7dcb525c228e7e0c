"""Pyramids of any file format: their levels, and which one to read for a pixel size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from perf_vit.types import BoolArray, Window

__all__ = ["Level", "LevelGrid", "PyramidReader", "finest_enough", "grid_at", "grid_of_level", "true_downsample"]

# Scanners give 0.4990 or 0.2527 where people say 0.5 and 0.25: within this share a level is read as it is.
_SAME_SIZE = 0.01


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a pyramid.

    Attributes:
        height: rows.
        width: columns.
        downsample_yx: height and width of its pixels, in pixels of level 0.
    """

    height: int
    width: int
    downsample_yx: tuple[float, float]


class PyramidReader(Protocol):
    """What a file format must give, so that a `SlideSource` can be made of it.

    Attributes:
        levels: finest first; level 0 has downsample (1, 1).
        mpp_yx: micrometres per pixel of level 0, None where the file doesn't tell.
        dtype: of the pixels.
        band_names: one a band.
        alpha: index of a band of opacity, None without; it is read only if it is asked for.
        fill: value of pixels that don't exist.
        format: its name, such as "aperio".
    """

    levels: tuple[Level, ...]
    mpp_yx: tuple[float, float] | None
    dtype: np.dtype[Any]
    band_names: tuple[str, ...]
    alpha: int | None
    fill: int
    format: str

    def read(self, level: int, window: Window) -> tuple[npt.NDArray[Any], BoolArray]:
        """Pixels [C, h, w] of a window inside the level, and which hold data, [C or 1, h, w]; from any thread."""

    def close(self) -> None:
        """Close this thread's handle."""


@dataclass(frozen=True, slots=True)
class LevelGrid:
    """A grid of pixels laid over a level.

    Attributes:
        level: index of the level that is read.
        height: rows of the grid.
        width: columns of the grid.
        step_yx: height and width of a grid pixel, in pixels of the level.
        start_yx: the grid's upper left corner, in pixels of the level.
    """

    level: int
    height: int
    width: int
    step_yx: tuple[float, float] = (1.0, 1.0)
    start_yx: tuple[float, float] = (0.0, 0.0)

    @property
    def is_level(self) -> bool:
        """Whether the grid's pixels are the level's own."""
        return self.step_yx == (1.0, 1.0) and self.start_yx == (0.0, 0.0)


def true_downsample(full: int, reduced: int) -> float:
    """Pixels of level 0 to a pixel of a level, from their lengths.

    Writers drop or add a part of a pixel at the end, so 1001 to 250 is 4, not 4.004; and 60,000 to 235 is 256, not 255,
    as most pyramids halve.
    """
    ratio = full / reduced
    for whole in (2 ** round(math.log2(ratio)), round(ratio)) if not ratio.is_integer() else ():
        if whole >= 1 and abs(reduced - full / whole) < 1:
            return float(whole)
    return ratio


def grid_of_level(levels: Sequence[Level], level: int) -> LevelGrid:
    """The level's own pixels."""
    return LevelGrid(level, levels[level].height, levels[level].width)


def grid_at(levels: Sequence[Level], factor_yx: tuple[float, float]) -> LevelGrid:
    """A grid of pixels `factor_yx` times as large as those of level 0, over the best level.

    That is a level whose pixels have this size within 1 %, which is then taken as it is, or the coarsest one that is
    at least as fine, or else level 0, enlarged.
    """
    for index, level in enumerate(levels):
        if all(abs(f / d - 1) <= _SAME_SIZE for f, d in zip(factor_yx, level.downsample_yx, strict=True)):
            return grid_of_level(levels, index)
    index = finest_enough(levels, factor_yx)
    step_y, step_x = (f / d for f, d in zip(factor_yx, levels[index].downsample_yx, strict=True))
    height = max(1, math.floor(levels[0].height / factor_yx[0] + 0.5))
    width = max(1, math.floor(levels[0].width / factor_yx[1] + 0.5))
    return LevelGrid(index, height, width, (step_y, step_x))


def finest_enough(levels: Sequence[Level], factor_yx: tuple[float, float]) -> int:
    """Index of the coarsest level with pixels no larger than `factor_yx` pixels of level 0; 0 where there is none."""
    fitting = [
        index
        for index, level in enumerate(levels)
        if all(d <= f for d, f in zip(level.downsample_yx, factor_yx, strict=True))
    ]
    return max(fitting, key=lambda index: levels[index].downsample_yx, default=0)
