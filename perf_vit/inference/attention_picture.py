"""Where a slide classifier looked, as a picture over the slide."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt

from perf_vit.io import rgb_from
from perf_vit.types import Source, Window

__all__ = ["attention_picture"]

_SIZE_PX = 2048
_OPACITY = 0.55


def attention_picture(
    source: Source, windows: Sequence[Window], weights: npt.NDArray[np.floating], max_size_px: int = _SIZE_PX
) -> npt.NDArray[np.uint8]:
    """A slide at low resolution under the colours of its windows' attention, blue for none and red for the most.

    Args:
        source: the slide.
        windows: that were looked at.
        weights: 0 to 1, [N]; where windows overlap, the larger one shows.
        max_size_px: longest side of the picture.

    Returns:
        [H, W, 3].

    Raises:
        InputError: the slide can't be read.
    """
    image = source.read_reduced(max_size_px)
    is_rgb = image.pixels.dtype == np.uint8 and len(image.pixels) == 3
    picture = image.pixels.transpose(1, 2, 0) if is_rgb else rgb_from(image)
    height, width = picture.shape[:2]
    heat = np.full((height, width), np.nan)
    for index in np.argsort(weights, kind="stable"):
        window = windows[index]
        rows = slice(*_pixels(window.row, window.row_stop, height / source.height))
        cols = slice(*_pixels(window.col, window.col_stop, width / source.width))
        heat[rows, cols] = weights[index]
    seen = ~np.isnan(heat)
    colors = matplotlib.colormaps["turbo"](np.nan_to_num(heat))[..., :3] * 255
    mixed = np.where(seen[..., None], (1 - _OPACITY) * picture + _OPACITY * colors, picture)
    return np.rint(mixed).astype(np.uint8)


def _pixels(start: int, stop: int, scale: float) -> tuple[int, int]:
    """A span in pixels of the picture, one at least."""
    low = round(start * scale)
    return low, max(low + 1, round(stop * scale))
