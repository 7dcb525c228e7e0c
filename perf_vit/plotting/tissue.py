"""Pictures of slides with the outline of their tissue."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from perf_vit.plotting.pictures import Picture, rgb_from
from perf_vit.types import GeoImage, Source

__all__ = ["has_tissue", "tissue_picture"]

_COLOR = (0, 160, 60)


def has_tissue(source: Source) -> bool:
    """Return whether a source is a slide opened with `tissue`."""
    return getattr(source, "options", {}).get("tissue") is not None


def tissue_picture(source: Source, max_size_px: int = 1024) -> Picture:
    """Draw a whole slide with the outline of its tissue: the first picture to look at.

    Args:
        source: Slide, opened with `tissue`.
        max_size_px: Maximum size of the longest side in pixels.

    Returns:
        RGB picture, [H, W, 3].
    """
    image = source.read_reduced(max_size_px)
    everything = np.ones((1, *image.valid.shape), bool)
    picture = rgb_from(GeoImage.from_mask(image.pixels, everything, None, image.transform, image.mpp)).copy()
    rim = image.valid & ~ndimage.binary_erosion(image.valid, np.ones((3, 3)), iterations=2)
    picture[rim] = _COLOR
    return picture
