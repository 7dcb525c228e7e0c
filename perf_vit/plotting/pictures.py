"""RGB pictures of imagery: contrast stretch, natural colours, PNG; figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from perf_vit.errors import InputError, OutputError
from perf_vit.files import staged
from perf_vit.types import GeoImage, Source

__all__ = ["natural_bands", "rgb_from", "save_figure", "save_png"]

Picture = npt.NDArray[np.uint8]

_FIGURE_DPI = 110

_STRETCH_SAMPLES = 1_000_000


def rgb_from(image: GeoImage, bands: Sequence[int] | None = None) -> Picture:
    """Stretch bands between their 2nd and 98th percentile to a picture; invalid pixels are white.

    Args:
        image: pixels and valid mask.
        bands: 1-based numbers of the red, green and blue band, or of one grey band; by default the first three
            bands, or the first where there are fewer.

    Returns:
        [H, W, 3] uint8.

    Raises:
        InputError: neither one band nor three, or not in the image.
    """
    count = len(image.pixels)
    chosen = list(bands or ([1, 2, 3] if count >= 3 else [1]))
    if len(chosen) not in (1, 3) or not all(1 <= band <= count for band in chosen):
        raise InputError(f"expected one or three of the bands 1 to {count} for a picture, got {chosen}")
    mask = np.broadcast_to(image.mask, image.pixels.shape)
    channels = [_stretch(image.pixels[band - 1], mask[band - 1]) for band in chosen]
    picture = np.stack(channels * (3 // len(channels)), axis=-1)
    picture[~image.valid] = 255
    return picture


def save_png(path: str | Path, picture: Picture) -> None:
    """Write a picture [H, W, 3] or [H, W, 4], which appears when it is complete.

    Raises:
        OutputError: it can't be written there.
    """
    target = Path(path)
    with staged(target) as folder:
        try:
            Image.fromarray(picture).save(folder / target.name, format="PNG")
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}") from error


def save_figure(path: str | Path, figure: Any) -> None:
    """Write a figure of matplotlib; it appears when it is complete.

    Raises:
        OutputError: nothing can be written there.
    """
    target = Path(path)
    with staged(target) as folder:
        try:
            figure.savefig(folder / target.name, dpi=_FIGURE_DPI)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror}; choose another output") from error


def _stretch(band: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Picture:
    values = band[valid]
    if values.size == 0:
        return np.zeros(band.shape, np.uint8)
    sample = values[:: max(1, values.size // _STRETCH_SAMPLES)].astype(np.float64)
    low, high = np.percentile(sample, (2, 98))
    scaled = (np.where(valid, band, low).astype(np.float64) - low) / max(high - low, np.finfo(float).tiny)
    return np.round(scaled.clip(0, 1) * 255).astype(np.uint8)


def natural_bands(source: Source) -> list[int] | None:
    """Where the bands called red, green and blue are ("Red", "red_B4"), if there are all three."""
    words = [re.findall("[a-z]+", name.lower()) for name in source.band_names]
    found = [next((i for i, name in enumerate(words, 1) if color in name), 0) for color in ("red", "green", "blue")]
    return found if all(found) else None
