"""Bands of training images, and warnings about inputs that differ from them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import DataWarning, InputError
from perf_vit.transforms.normalize import band_labels, band_values
from perf_vit.types import GeoImage, Source, Window

__all__ = ["InputBands", "InputCheck", "bands_fit", "common_names", "with_bands"]


def bands_fit(num_bands: int, expected: int) -> bool:
    """Whether images of so many bands are taken where others are expected: grey ones are for three."""
    return num_bands == expected or (num_bands, expected) == (1, 3)


def with_bands(image: GeoImage, num_bands: int) -> GeoImage:
    """A grey image among images of three bands, as three equal ones; others as they are."""
    if len(image.pixels) == 1 and num_bands == 3:
        # Of a single band, `band_valid` is None.
        image.pixels = np.repeat(image.pixels, num_bands, axis=0)
    return image


FloatArray = npt.NDArray[np.float64]


_PERCENTILES = (2, 98)


# Snow is brighter than this times less, and water is dark in some bands only; other units, other bit depths and values
# stretched to [0, 1] are another size in most bands. Another dtype makes another bit depth likely.
_LARGER, _LARGER_OF_OTHER_DTYPE = 10.0, 4.0


_BELOW_LOW, _SMALLER_OF_OTHER_DTYPE = 3.0, 8.0


# Where the range begins at 0, a part of its upper end stands for its lower one.
_LOW_PART = 30


# Values so many widths of the training's range away from it.
_FAR = 6.0


# A scene is looked at whole up to this side, else in a grid of small windows: a reduced read of a large file without
# overviews reads all of it.
_WHOLE_PX = 1024


_GRID, _WINDOW_PX = 5, 64


# Inputs of a run whose values are looked at.
_MAX_INPUTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBands:
    """Bands of the training images; saved with a model.

    Attributes:
        names: of the bands; empty where images call them differently.
        dtype: of the pixels.
        low: 2nd percentile of the valid values of each band.
        high: 98th percentile, likewise.
    """

    names: tuple[str, ...]
    dtype: str
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def measured(cls, images: Sequence[GeoImage], names: Sequence[str] = ()) -> InputBands:
        """Measure images that have the same bands; a band without a valid value gets (0, 0).

        Args:
            images: as they are read.
            names: of the bands.
        """
        low, high = [], []
        for band in range(len(images[0].pixels)):
            values = band_values(images, band)
            ends = np.percentile(values, _PERCENTILES) if values.size else (0.0, 0.0)
            low.append(float(ends[0]))
            high.append(float(ends[1]))
        return cls(names=tuple(names), dtype=str(images[0].pixels.dtype), low=tuple(low), high=tuple(high))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputBands:
        """Make a spec from the result of `to_dict`."""
        names, low, high = (tuple(values[key]) for key in ("names", "low", "high"))
        return cls(names=names, dtype=values["dtype"], low=low, high=high)


def common_names(sources: Sequence[Source], num_bands: int) -> tuple[str, ...]:
    """Names of the bands, if all sources call them the same."""
    names = {tuple(source.band_names) for source in sources}
    return names.pop() if len(names) == 1 and len(next(iter(names))) == num_bands else ()


class InputCheck:
    """Warns of the first input of a run whose bands are not like those of the training images.

    Names are compared for every input, values for the first 32, by one reduced read each.

    Args:
        trained: the training images; None for a model that doesn't know, of which nothing is said.
    """

    def __init__(self, trained: InputBands | None) -> None:
        self._trained = trained
        self._num_looked_at = 0
        self._warned = False

    def __call__(self, source: Source) -> None:
        """Look at an input; one that can't be read is for others to report."""
        if self._trained is None or self._warned:
            return
        found = [_name_problem(source.band_names, self._trained.names), self._value_problem(source, self._trained)]
        if problems := [each for each in found if each]:
            self._warned = True
            warnings.warn(
                f"{source.path} is not like the images that the model was trained on, so its results may mean "
                f"nothing: {'; '.join(problems)}; check the order of the bands, their units and scaling",
                DataWarning,
                stacklevel=3,
            )

    def _value_problem(self, source: Source, trained: InputBands) -> str | None:
        if self._num_looked_at >= _MAX_INPUTS or source.num_bands != len(trained.low):
            return None
        self._num_looked_at += 1
        try:
            seen = InputBands.measured(_sample(source), source.band_names)
        except InputError:
            return None
        bands = _bands_of_other_size(seen, trained) or _bands_far_away(seen, trained)
        return _told_of(bands, seen, trained) if bands else None


def _sample(source: Source) -> list[GeoImage]:
    if max(source.size) <= _WHOLE_PX:
        return [source.read(source.extent)]
    height, width = (min(_WINDOW_PX, side) for side in source.size)
    rows, cols = (
        np.linspace(0, side - part, _GRID).astype(int).tolist()
        for side, part in zip(source.size, (height, width), strict=True)
    )
    return [source.read(Window(row, col, height, width)) for row in rows for col in cols]


def _name_problem(names: Sequence[str], trained: Sequence[str]) -> str | None:
    """In which way names of bands differ, where both have any."""
    ours, theirs = ([" ".join(re.findall(r"[^\W_]+", name.casefold())) for name in each] for each in (names, trained))
    if ours == theirs or len(ours) != len(theirs) or not (_are_words(ours) and _are_words(theirs)):
        return None
    how = "in another order" if sorted(ours) == sorted(theirs) else "others"
    return f"its bands are {how}: {', '.join(names)}, in training {', '.join(trained)}"


def _are_words(names: Sequence[str]) -> bool:
    """Whether names say more than the band's number."""
    return any(re.fullmatch(r"(band|channel|layer)? ?\d*", name) is None for name in names)


def _bands_of_other_size(seen: InputBands, trained: InputBands) -> list[int]:
    """All bands, if at least half of them have values many times larger or smaller than in training."""
    ours, (least, most) = _sizes(seen)[1], _sizes(trained)
    known = (ours > 0) & (most > 0)
    if not known.any():
        return []
    ours, least, most = ours[known], np.maximum(least, most / _LOW_PART)[known], most[known]
    is_other = seen.dtype != trained.dtype
    larger = np.median(ours / most) > (_LARGER_OF_OTHER_DTYPE if is_other else _LARGER)
    smaller = np.median(least / ours) > _BELOW_LOW or (is_other and np.median(most / ours) > _SMALLER_OF_OTHER_DTYPE)
    return list(range(len(seen.low))) if larger or smaller else []


def _sizes(bands: InputBands) -> tuple[FloatArray, FloatArray]:
    """The least and largest absolute values between both percentiles of each band."""
    ends = np.array([bands.low, bands.high])
    is_around_zero = ends.prod(0) <= 0
    return np.where(is_around_zero, 0, np.abs(ends).min(0)), np.abs(ends).max(0)


def _bands_far_away(seen: InputBands, trained: InputBands) -> list[int]:
    """Bands whose values all lie far outside the range of the training's."""
    low, high = np.array(trained.low), np.array(trained.high)
    size = np.maximum(np.abs(low), np.abs(high))
    margin = _FAR * np.maximum(high - low, 0.1 * size)
    is_far = (np.array(seen.low) > high + margin) | (np.array(seen.high) < low - margin)
    has_values = (size > 0) & ((np.array(seen.low) != 0) | (np.array(seen.high) != 0))
    return np.flatnonzero(is_far & has_values).tolist()


def _told_of(bands: Sequence[int], seen: InputBands, trained: InputBands) -> str:
    """The band that differs most stands for the others."""
    differences = [abs(seen.high[band] - trained.high[band]) / max(abs(trained.high[band]), 1e-30) for band in bands]
    band = bands[int(np.argmax(differences))]
    label = band_labels(trained.names or seen.names, len(seen.low))[band]
    dtypes = "" if seen.dtype == trained.dtype else f" (pixels of {seen.dtype}, in training of {trained.dtype})"
    return (
        f"values of {len(bands)} of {len(seen.low)} bands have another range, such as {label}: 2nd to 98th percentile "
        f"{seen.low[band]:.4g} to {seen.high[band]:.4g}, in training {trained.low[band]:.4g} to "
        f"{trained.high[band]:.4g}{dtypes}"
    )
