"""Mean and deviation of each band: as a config gives them, or measured on training images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from perf_vit.errors import ConfigError, DataWarning
from perf_vit.transforms import InputBands, Normalizer, band_labels, common_names, without_tiny
from perf_vit.types import GeoImage, Source

__all__ = ["given_normalizer", "measure_bands", "seen_images"]

# Images to measure on, and their longest side: enough for two digits, read in a second.
_IMAGES = 64
_SIDE_PX = 256


def given_normalizer(mean: Sequence[float] | None, std: Sequence[float] | None, num_bands: int) -> Normalizer | None:
    """The normalizer of `data.mean` and `data.std`; None where a config leaves them to be measured.

    Raises:
        ConfigError: one without the other, another number of bands, or a std that is not above 0.
    """
    if (mean is None) != (std is None):
        raise ConfigError("data.mean and data.std go together; give both, or neither to have them measured")
    if mean is None or std is None:
        return None
    if not len(mean) == len(std) == num_bands or min(std) <= 0:
        raise ConfigError(
            f"data.mean and data.std must give one value for each of {num_bands} bands, std above 0, "
            f"got {list(mean)} and {list(std)}"
        )
    floor = [float(np.finfo(np.float32).eps) * abs(each) for each in mean]
    return Normalizer(tuple(mean), without_tiny(std, floor, band_labels(None, num_bands)))


def measure_bands(
    images: Sequence[GeoImage], sources: Sequence[Source], given: Normalizer | None
) -> tuple[Normalizer, InputBands]:
    """The normalizer, measured where it isn't given, and the ranges of the bands.

    Args:
        images: some training images, of low resolution.
        sources: all of them.
        given: see `given_normalizer`.

    Raises:
        InputError: a band has no valid pixel.
    """
    names = common_names(sources, len(images[0].pixels))
    return given or Normalizer.from_images(images, names or None), InputBands.measured(images, names)


def seen_images(read_reduced: Callable[[int, int], GeoImage], paths: Sequence[str | Path], seed: int) -> list[GeoImage]:
    """Some images that the seed decides, of low resolution, to measure statistics on.

    Args:
        read_reduced: an image by its place and its longest side in pixels.
        paths: of the images.
        seed: decides which are looked at.
    """
    chosen = np.random.default_rng(seed).permutation(len(paths))[:_IMAGES]
    seen = [read_reduced(int(index), _SIDE_PX) for index in chosen]
    bare = [int(index) for index, image in zip(chosen, seen, strict=True) if not image.valid.any()]
    if bare and len(bare) < len(seen):
        warnings.warn(
            f"{len(bare)} of {len(seen)} training images looked at have no valid pixel, the first {paths[bare[0]]}",
            DataWarning,
            stacklevel=3,
        )
    return seen
