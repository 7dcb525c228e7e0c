"""Specification of a model's input, opening of inputs by it, and comparison of inputs with the training images."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from perf_vit.errors import DataWarning, InputError
from perf_vit.transforms import Normalizer
from perf_vit.transforms.normalize import band_labels, band_values
from perf_vit.types import GeoImage, InputOptions, InputPath, Source, Window

__all__ = ["InputBands", "InputCheck", "InputSpec", "TaskSpec", "accepts_bands", "common_names", "repeat_grey_band"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec(InputOptions):
    """Input of a model, saved with its weights.

    Attributes:
        classes: Names of the classes or targets, in the order of the outputs.
        normalizer: Band statistics of the training images; None for no normalisation.
        tile_px: Size of the square tiles of the training, in pixels.
        trained_on: Names, dtype and value ranges of the bands of the training images, to warn about different input;
            None if unknown.
        label_options: Options with which its label files are read.

    The other attributes are those of `InputOptions`.
    """

    takes_grey: ClassVar[bool] = False
    """Whether a model of three bands accepts a grey image, repeated for all three."""

    classes: tuple[str, ...] = ()
    normalizer: Normalizer | None = None
    tile_px: int | None = None
    trained_on: InputBands | None = None
    label_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_data_config(cls, config: Any, data: Any, **more: Any) -> Self:
        """Make the spec of a model to be trained.

        Args:
            config: Data config; its keys with the names of fields set them.
            data: Data module; its attributes with the names of fields, such as `normalizer`, take precedence over
                `config`.
            **more: Values of other fields.
        """
        found = {each.name: getattr(data, each.name, getattr(config, each.name, MISSING)) for each in fields(cls)}
        # What one cohort's files state wrongly says nothing about other slides.
        found |= {"slide_mpp_override": None, **more}
        return cls(**{name: _without_lists(value) for name, value in found.items() if value is not MISSING})

    def open(self, path: InputPath | Source, *, check: InputCheck | None = None, **overrides: Any) -> Source:
        """Open an input as in training: bands, nodata, pixel size, tissue.

        A source from `perf_vit.open` is reopened if its options differ from the model's; options given to
        `perf_vit.open` take precedence. Other sources are used unchanged. Of a slide, by its path or open, the part
        inside its bounds is read, which QuPath shows.

        Args:
            path: Input of `perf_vit.open`, or a source.
            check: Comparison with the training images, shared by the inputs of a run so that it warns once;
                `InputCheck(None)` disables it. None for a new one.
            **overrides: Options of `perf_vit.open` that take precedence over the model's; None is ignored.

        Raises:
            InputError: The input can't be opened or its number of bands differs from the training images.
        """
        source = self._opened(path, overrides)
        try:
            self.check_bands(source)
        except InputError:
            source.close()
            raise
        (InputCheck(self.trained_on) if check is None else check)(source)
        return source

    def check_bands(self, source: Source) -> None:
        """Check that a source has the number of bands of the training images.

        Raises:
            InputError: The number of bands differs.
        """
        if self.normalizer is None:
            return
        expected, got = len(self.normalizer.mean), source.num_bands
        if got == expected or (self.takes_grey and accepts_bands(got, expected)):
            return
        raise InputError(
            f"the model was trained on {expected} bands, {source.path} has {got}; give an input with those bands"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a spec from the result of `to_dict`."""
        read: dict[str, Callable[[Any], Any]] = {
            "normalizer": Normalizer.from_dict,
            "trained_on": InputBands.from_dict,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**{name: read.get(name, _without_lists)(value) for name, value in given.items()})

    def _opened(self, path: InputPath | Source, overrides: dict[str, Any]) -> Source:
        # Imported lazily, so that loading a network doesn't import rasterio.
        from perf_vit.sources import merged_options, open_input
        from perf_vit.sources.slides import SlideSource

        if isinstance(path, str | Path | Sequence):
            return open_input(path, self, overrides)
        opened_from = getattr(path, "opened_from", None)
        given = getattr(path, "options", {})
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if opened_from is None and overrides:
            raise InputError(
                f"{', '.join(sorted(overrides))} can't be chosen for an open source that `perf_vit.open` didn't open; "
                "leave it out, or give a path"
            )
        wanted = merged_options(self, {**given, **overrides})
        if opened_from is None or wanted == dict(given):
            # All of level 0 would give other coordinates than the path of the same slide.
            return path.within_bounds() if isinstance(path, SlideSource) else path
        return open_input(opened_from, self, wanted)


def _without_lists(value: Any) -> Any:
    # Configs and JSON have no tuples.
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec(InputSpec):
    """Input of a model of one of the package's tasks, with required classes, statistics and tile size."""

    classes: tuple[str, ...]
    normalizer: Normalizer
    tile_px: int


def accepts_bands(num_bands: int, expected: int) -> bool:
    """Return whether images of `num_bands` bands are accepted; grey images are where three bands are expected."""
    return num_bands == expected or (num_bands, expected) == (1, 3)


def repeat_grey_band(image: GeoImage, num_bands: int) -> GeoImage:
    """Repeat the band of a grey image if three bands are expected; return other images unchanged."""
    if len(image.pixels) == 1 and num_bands == 3:
        # `band_valid` is None for a single band.
        image.pixels = np.repeat(image.pixels, num_bands, axis=0)
    return image


FloatArray = npt.NDArray[np.float64]

_PERCENTILES = (2, 98)

# Ratios of the values to those of the training. Snow stays below `_LARGER`, and water is dark in some bands only; other
# units, bit depths and values stretched to [0, 1] change most bands. Another dtype makes another bit depth likely.
_LARGER, _LARGER_OF_OTHER_DTYPE = 10.0, 4.0

_BELOW_LOW, _SMALLER_OF_OTHER_DTYPE = 3.0, 8.0

# Fraction of the upper end of the range that replaces a lower end of 0.
_LOW_PART = 30

# Distance from the range of the training, in widths of that range.
_FAR = 6.0

# Scenes up to this size are read as a whole, larger ones in a grid of small windows: a reduced read of a large file
# without overviews reads all of it.
_WHOLE_PX = 1024

_GRID, _WINDOW_PX = 5, 64

# Number of inputs of a run whose values are checked.
_MAX_INPUTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBands:
    """Bands of the training images, saved with a model.

    Attributes:
        names: Names of the bands; empty if they differ between images.
        dtype: Dtype of the pixels.
        low: 2nd percentile of the valid values of each band.
        high: 98th percentile of the valid values of each band.

    Raises:
        ValueError: The percentiles are of different numbers of bands.
    """

    names: tuple[str, ...]
    dtype: str
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high):
            raise ValueError(f"expected low and high of the same bands, got {len(self.low)} and {len(self.high)}")

    @classmethod
    def measure(cls, images: Sequence[GeoImage], names: Sequence[str] = ()) -> InputBands:
        """Measure images with the same bands; a band without a valid value gets (0, 0).

        Args:
            images: Images, not standardised.
            names: Names of the bands.
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
        """Make an instance from the result of `to_dict`."""
        names, low, high = (tuple(values[key]) for key in ("names", "low", "high"))
        return cls(names=names, dtype=values["dtype"], low=low, high=high)


def common_names(sources: Sequence[Source], num_bands: int) -> tuple[str, ...]:
    """Return the names of the bands if they are equal in all sources, else an empty tuple."""
    names = {tuple(source.band_names) for source in sources}
    return names.pop() if len(names) == 1 and len(next(iter(names))) == num_bands else ()


class InputCheck:
    """Warning about the first input of a run whose bands differ from those of the training images.

    Names are compared for every input, values for the first 32 inputs on a sample of pixels.

    Args:
        trained: Bands of the training images; None to disable the check.
    """

    def __init__(self, trained: InputBands | None) -> None:
        self._trained = trained
        self._num_looked_at = 0
        self._warned = False

    def __call__(self, source: Source) -> None:
        """Check an input; unreadable inputs are ignored here."""
        self.warn(self.problem(source), stacklevel=4)

    def problem(self, source: Source) -> str | None:
        """Describe how an input differs, without a warning; None if it doesn't. Several threads may call it."""
        if self._trained is None or self._warned:
            return None
        found = [_name_problem(source.band_names, self._trained.names), self._value_problem(source, self._trained)]
        problems = [each for each in found if each]
        if not problems:
            return None
        return (
            f"{source.path} is not like the images that the model was trained on, so its results may be "
            f"meaningless: {'; '.join(problems)}; check the order of the bands, their units and scaling"
        )

    def warn(self, problem: str | None, stacklevel: int = 2) -> None:
        """Warn of the result of `problem`, unless the check has warned before."""
        if problem is not None and not self._warned:
            warnings.warn(problem, DataWarning, stacklevel=stacklevel)
            # Not where a filter makes an error of it: the next input is to fail, too.
            self._warned = True

    def _value_problem(self, source: Source, trained: InputBands) -> str | None:
        if self._num_looked_at >= _MAX_INPUTS or source.num_bands != len(trained.low):
            return None
        self._num_looked_at += 1
        try:
            seen = InputBands.measure(_sample(source), source.band_names)
        except InputError:
            return None
        bands = _bands_of_other_size(seen, trained) or _bands_far_away(seen, trained)
        return _describe_bands(bands, seen, trained) if bands else None


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
    """Describe the difference of band names, None if they agree or aren't informative."""
    ours, theirs = ([" ".join(re.findall(r"[^\W_]+", name.casefold())) for name in each] for each in (names, trained))
    if ours == theirs or len(ours) != len(theirs) or not (_are_words(ours) and _are_words(theirs)):
        return None
    how = "in another order" if sorted(ours) == sorted(theirs) else "others"
    return f"its bands are {how}: {', '.join(names)}, in training {', '.join(trained)}"


def _are_words(names: Sequence[str]) -> bool:
    """Return whether names contain more than the band's index."""
    return any(re.fullmatch(r"(band|channel|layer)? ?\d*", name) is None for name in names)


def _bands_of_other_size(seen: InputBands, trained: InputBands) -> list[int]:
    """Return all bands if at least half of them have much larger or smaller values than in training, else none."""
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
    """Return the smallest and largest absolute values between the percentiles of each band."""
    ends = np.array([bands.low, bands.high])
    is_around_zero = ends.prod(0) <= 0
    return np.where(is_around_zero, 0, np.abs(ends).min(0)), np.abs(ends).max(0)


def _bands_far_away(seen: InputBands, trained: InputBands) -> list[int]:
    """Return the bands whose values all lie far outside the range of the training."""
    low, high = np.array(trained.low), np.array(trained.high)
    size = np.maximum(np.abs(low), np.abs(high))
    margin = _FAR * np.maximum(high - low, 0.1 * size)
    is_far = (np.array(seen.low) > high + margin) | (np.array(seen.high) < low - margin)
    has_values = (size > 0) & ((np.array(seen.low) != 0) | (np.array(seen.high) != 0))
    return np.flatnonzero(is_far & has_values).tolist()


def _describe_bands(bands: Sequence[int], seen: InputBands, trained: InputBands) -> str:
    """Describe the band that differs most."""
    differences = [abs(seen.high[band] - trained.high[band]) / max(abs(trained.high[band]), 1e-30) for band in bands]
    band = bands[int(np.argmax(differences))]
    label = band_labels(trained.names or seen.names, len(seen.low))[band]
    dtypes = "" if seen.dtype == trained.dtype else f" (pixels of {seen.dtype}, in training of {trained.dtype})"
    return (
        f"values of {len(bands)} of {len(seen.low)} bands have another range, such as {label}: 2nd to 98th percentile "
        f"{seen.low[band]:.4g} to {seen.high[band]:.4g}, in training {trained.low[band]:.4g} to "
        f"{trained.high[band]:.4g}{dtypes}"
    )
