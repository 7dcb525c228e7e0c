"""Grey images among images of three bands."""

from __future__ import annotations

import numpy as np

from perf_vit.types import GeoImage

__all__ = ["bands_fit", "with_bands"]


def bands_fit(num_bands: int, expected: int) -> bool:
    """Whether images of so many bands are taken where others are expected: grey ones are for three."""
    return num_bands == expected or (num_bands, expected) == (1, 3)


def with_bands(image: GeoImage, num_bands: int) -> GeoImage:
    """A grey image among images of three bands, as three equal ones; others as they are."""
    if len(image.pixels) == 1 and num_bands == 3:
        # Of a single band, `band_valid` is None.
        image.pixels = np.repeat(image.pixels, num_bands, axis=0)
    return image
