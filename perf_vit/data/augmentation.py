"""Augmentation config and its checks against the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf_vit.errors import ConfigError
from perf_vit.transforms import Augmentation, StainJitter
from perf_vit.types import Source

__all__ = [
    "AugmentConfig",
    "check_augment",
    "draw_log_uniform",
    "draw_zoom",
    "make_augmentation",
    "make_stain_jitter",
    "pixel_size",
    "pixel_sizes",
    "zoomed_px",
]

# Larger ratios of pixel sizes are mistakes, e.g. metres for a raster in degrees.
_LARGEST_FACTOR = 16


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes of training tiles.

    Attributes:
        flips: Whether to apply the eight symmetries of the square, which suit imagery seen from above.
        scale: Zoom range (min, max); (1, 1) for none. A tile of zoom z is a window of tile_px / z pixels, resized;
            windows larger than a tile stay within their image, except in detection.
        resolution: Pixel size range (min, max) of tiles, instead of `scale`: micrometres for slides, CRS units for
            rasters. Windows are read larger or smaller than a tile accordingly.
        gain: Bands are multiplied by random factors from [1 - gain, 1 + gain].
        offset: Bands are shifted by random amounts from [-offset, offset], in standard deviations.
        shuffle: Probability of a random band order, for data where shape matters more than colour.
        stain: Strength of haematoxylin and eosin stain jitter, for 8-bit RGB; 0.2 is strong.
    """

    flips: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    resolution: tuple[float, float] | None = None
    gain: float = 0.0
    offset: float = 0.0
    shuffle: float = 0.0
    stain: float = 0.0

    @staticmethod
    def from_short(value: Any, key: str) -> dict[str, Any] | None:
        """Return the keys that none or false in place of a mapping stands for: no changes at all."""
        return {"flips": False} if str(value).lower() in ("none", "null", "false", "no", "off") else None

    @staticmethod
    def short_schema() -> dict[str, Any]:
        """Return the JSON schema of what `from_short` takes."""
        return {"enum": ["none", False, None]}


def check_augment(config: AugmentConfig) -> None:
    """Check the ranges of an augmentation config.

    Raises:
        ConfigError: A value is out of range, or `scale` and `resolution` are both given.
    """
    for key in ("scale", "resolution"):
        value = getattr(config, key)
        if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1] < math.inf):
            shown = ", ".join(f"{size:g}" for size in value)
            raise ConfigError(f"data.augment.{key} must be [smallest, largest] above 0, got [{shown}]")
    if config.resolution is not None and tuple(config.scale) != (1.0, 1.0):
        raise ConfigError("data.augment.scale and data.augment.resolution are alternatives; give one of them")
    for key in ("gain", "offset"):
        if not 0 <= getattr(config, key) < math.inf:
            raise ConfigError(f"data.augment.{key} must be at least 0, got {getattr(config, key):g}")
    for key in ("shuffle", "stain"):
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"data.augment.{key} must lie between 0 and 1, got {getattr(config, key):g}")


def make_augmentation(config: AugmentConfig) -> Augmentation:
    """Build the augmentation of a config, without stain and what changes the window: `scale` and `resolution`."""
    return Augmentation(flips=config.flips, gain=config.gain, offset=config.offset, shuffle=config.shuffle)


def make_stain_jitter(config: AugmentConfig, sources: Sequence[Source], num_bands: int) -> StainJitter | None:
    """Build the stain jitter of a config; None if its strength is 0.

    Args:
        config: Augmentation config.
        sources: Images that it is applied to.
        num_bands: Number of bands of the images as read.

    Raises:
        ConfigError: The images are not 8-bit RGB.
    """
    if not config.stain:
        return None
    for source in sources:
        if num_bands != 3 or source.dtype != np.uint8:
            raise ConfigError(
                f"data.augment.stain is for images of 3 bands of uint8 (red, green, blue), {source.path} has "
                f"{source.num_bands} of {source.dtype}; leave it out or choose those bands with data.bands"
            )
    return StainJitter(config.stain)


def pixel_size(source: Source) -> float | None:
    """Return the pixel size of a source: micrometres for a slide, CRS units for a raster; None if unknown.

    For non-square pixels it is the side of a square of equal area.
    """
    if source.mpp is not None:
        return source.mpp
    transform = source.transform
    if source.crs is None and transform.is_identity:
        return None
    return math.sqrt(abs(transform.determinant))


def pixel_sizes(config: AugmentConfig, sources: Sequence[Source]) -> list[float] | None:
    """Return the pixel size of each source if the config has a `resolution` range, else None.

    Raises:
        ConfigError: A source has no pixel size, or one so far from the range that its unit must be wrong.
    """
    if config.resolution is None:
        return None
    return [_checked_pixel_size(source, config.resolution) for source in sources]


def draw_log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """Draw a number between two bounds from a log-uniform distribution."""
    return float(np.exp(rng.uniform(*np.log(bounds))))


def draw_zoom(scale: tuple[float, float], rng: np.random.Generator) -> float:
    """Draw a zoom; no random number is drawn if there is none."""
    return 1.0 if tuple(scale) == (1.0, 1.0) else draw_log_uniform(scale, rng)


def zoomed_px(tile_px: int, zoom: float, size: tuple[int, int]) -> int:
    """Return the size in pixels of the window of a zoomed tile; a zoom below 1 doesn't reach past an image.

    Args:
        tile_px: Tile size in pixels.
        zoom: Size of objects in the tile, relative to the image.
        size: Height and width of the image or of the region to stay inside.
    """
    return min(max(1, round(tile_px / zoom)), max(tile_px, min(size)))


def _checked_pixel_size(source: Source, resolution: tuple[float, float]) -> float:
    size = pixel_size(source)
    low, high = resolution
    if size is None:
        raise ConfigError(
            f"data.augment.resolution needs the pixel size, which {source.path} doesn't have; give "
            "data.slide_mpp for a slide, a raster with a georeference, or use data.augment.scale"
        )
    if high > size * _LARGEST_FACTOR or low * _LARGEST_FACTOR < size:
        unit = "micrometres" if source.mpp is not None else f"units of {source.crs}"
        raise ConfigError(
            f"data.augment.resolution [{low:g}, {high:g}] differs by more than a factor of {_LARGEST_FACTOR} from the "
            f"pixel size of {source.path}, {size:.4g} {unit}; give sizes near that"
        )
    return size
