"""Standardisation per band, with statistics saved in the checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import DataWarning, InputError
from perf_vit.types import GeoImage

__all__ = ["Normalizer", "band_labels", "band_values", "replace_tiny_std"]

_HUGE = 1e30


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Standardisation (pixel - mean) / std per band; invalid values become 0, the mean.

    Attributes:
        mean: Mean of each band, in units of the source.
        std: Standard deviation of each band, in units of the source, above 0.

    Raises:
        ValueError: Mean and std are of different numbers of bands.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"expected mean and std of the same bands, got {len(self.mean)} and {len(self.std)}")

    def __call__(self, image: GeoImage) -> npt.NDArray[np.float32]:
        """Standardise an image.

        Returns:
            Standardised pixels, [C, H, W] float32.

        Raises:
            InputError: The number of bands differs.
        """
        if len(image.pixels) != len(self.mean):
            raise InputError(
                f"expected {len(self.mean)} bands, got {len(image.pixels)}; give an image with those bands"
            )
        # float32 can't represent timestamps or large 32-bit integers exactly.
        dtype = image.pixels.dtype
        work: Any = np.float64 if dtype.itemsize > 2 and dtype != np.float32 else np.float32
        mean = np.asarray(self.mean, work)[:, None, None]
        scale = 1 / np.asarray(self.std, work)[:, None, None]
        mask = image.mask
        with np.errstate(over="ignore", invalid="ignore"):
            # Two passes over large arrays; more would take longer than reading them.
            pixels = np.subtract(image.pixels, mean, dtype=work)
            pixels *= scale
            pixels = pixels.astype(np.float32, copy=False)
        if image.pixels.dtype.kind == "f":
            # Never pass NaN to a network, even if a source marks it as valid.
            mask = mask & np.isfinite(pixels)
        if not mask.all():
            np.copyto(pixels, 0, where=~mask)
        return pixels

    @classmethod
    def from_images(cls, images: Sequence[GeoImage], names: Sequence[str] | None = None) -> Normalizer:
        """Measure mean and standard deviation of each band over the valid pixels of images.

        A constant band gets std 1 and maps to 0.

        Args:
            images: Images with the same bands.
            names: Names of the bands, for messages.

        Raises:
            InputError: A band has no valid pixel.
        """
        labels = band_labels(names, len(images[0].pixels))
        mean, std, floor = [], [], []
        for index, label in enumerate(labels):
            values = band_values(images, index)
            if values.size == 0:
                raise InputError(f"expected valid pixels to measure mean and std on, got none in {label}; check nodata")
            _warn_of_huge(values, label)
            mean.append(float(values.mean()))
            std.append(float(values.std()))
            floor.append(_resolution(images[0].pixels.dtype) * float(np.abs(values).max()))
        return cls(tuple(mean), replace_tiny_std(std, floor, labels))

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain lists, for a checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalizer:
        """Make a normalizer from the result of `to_dict`."""
        return cls(tuple(values["mean"]), tuple(values["std"]))


def band_labels(names: Sequence[str] | None, num_bands: int) -> list[str]:
    """Return labels of bands for messages, such as "band 2 (red)"."""
    given = names or [""] * num_bands
    is_word = [bool(name) and name != f"band_{number}" for number, name in enumerate(given, 1)]
    return [
        f"band {number} ({name})" if word else f"band {number}"
        for number, (name, word) in enumerate(zip(given, is_word, strict=True), 1)
    ]


def band_values(images: Sequence[GeoImage], band: int) -> npt.NDArray[np.float64]:
    """Return the valid values of one band of several images, [n]."""
    values = []
    for image in images:
        mask = image.valid if image.band_valid is None else image.band_valid[band]
        values.append(image.pixels[band][mask].astype(np.float64))
    found = np.concatenate(values)
    return found[np.isfinite(found)] if images[0].pixels.dtype.kind == "f" else found


def replace_tiny_std(std: Sequence[float], floor: Sequence[float], labels: Sequence[str]) -> tuple[float, ...]:
    """Replace standard deviations that are only rounding errors by 1, with a warning.

    Args:
        std: Standard deviations, measured or given.
        floor: Largest standard deviation explained by rounding, for each band.
        labels: Labels of the bands, for the warning.
    """
    tiny = [index for index, (each, least) in enumerate(zip(std, floor, strict=True)) if each <= least]
    if tiny:
        said = ", ".join(f"{labels[index]} (std {std[index]:.3g})" for index in tiny)
        warnings.warn(
            f"{said}: constant up to rounding, so the std is taken as 1; the band holds no information, leave it out",
            DataWarning,
            stacklevel=4,
        )
    return tuple(1.0 if index in tiny else float(each) for index, each in enumerate(std))


def _resolution(dtype: np.dtype[Any]) -> float:
    """Return the relative rounding error of a std: the larger of that of the dtype and of sums in float64."""
    sums = 16 * np.finfo(np.float64).eps
    return float(max(np.finfo(dtype).eps, sums) if dtype.kind == "f" else sums)


def _warn_of_huge(values: npt.NDArray[np.float64], label: str) -> None:
    """Warn about implausibly large values, which many files use for missing pixels."""
    number = int((np.abs(values) > _HUGE).sum())
    if number:
        warnings.warn(
            f"{number} of {values.size} sampled pixels have values up to {np.abs(values).max():.3g} in {label}; "
            "if that means missing, declare it as nodata",
            DataWarning,
            stacklevel=4,
        )
