"""Standardisation per band. The statistics travel inside the checkpoint, so nobody repeats them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import DataWarning, InputError
from perf_vit.types import GeoImage

__all__ = ["Normalizer"]

_HUGE = 1e30


@dataclass(frozen=True, slots=True)
class Normalizer:
    """(pixel - mean) / std per band, and 0, the mean, where a pixel is invalid.

    Attributes:
        mean: one value a band, in the source's units.
        std: one value a band, in the source's units, above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: GeoImage) -> npt.NDArray[np.float32]:
        """Standardise an image.

        Returns:
            [C, H, W] float32.

        Raises:
            InputError: the image's band count is not the normalizer's.
        """
        if len(image.pixels) != len(self.mean):
            raise InputError(
                f"expected {len(self.mean)} bands, got {len(image.pixels)}; give an image with those bands"
            )
        mean = np.asarray(self.mean, np.float32)[:, None, None]
        scale = 1 / np.asarray(self.std, np.float32)[:, None, None]
        pixels = (image.pixels.astype(np.float32) - mean) * scale
        return np.where(image.valid, pixels, np.float32(0))

    @classmethod
    def from_images(cls, images: Sequence[GeoImage]) -> Normalizer:
        """Measure mean and standard deviation over the valid pixels of some images.

        A constant band gets std 1, so that it maps to 0 instead of dividing by 0.

        Raises:
            InputError: no image has a valid pixel.
        """
        samples = [image.pixels[:, image.valid].astype(np.float64) for image in images]
        values = np.concatenate(samples, axis=1)
        if values.shape[1] == 0:
            raise InputError("expected valid pixels to measure mean and std on, got none; check the nodata value")
        _warn_of_huge(values)
        std = values.std(axis=1)
        return cls(tuple(values.mean(axis=1).tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for a checkpoint."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalizer:
        """The inverse of `to_dict`."""
        return cls(tuple(values["mean"]), tuple(values["std"]))


def _warn_of_huge(values: npt.NDArray[np.float64]) -> None:
    """Tell of values that nothing measures and that many files have for missing pixels, [C, n]."""
    sizes = np.abs(values).max(axis=1)
    if (sizes > _HUGE).any():
        band = int(np.argmax(sizes))
        number = int((np.abs(values[band]) > _HUGE).sum())
        warnings.warn(
            f"{number} of {values.shape[1]} pixels looked at have values up to {sizes[band]:.3g} in band {band + 1}; "
            "if that means missing, declare it as nodata",
            DataWarning,
            stacklevel=4,
        )
