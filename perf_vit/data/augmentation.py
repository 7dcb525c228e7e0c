"""What configs say about augmentation, checked against the images it is applied to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perf_vit.errors import ConfigError
from perf_vit.transforms import StainJitter
from perf_vit.types import Source

__all__ = ["AugmentConfig", "check_augment", "draw_log_uniform", "make_stain_jitter", "pixel_size", "pixel_sizes"]

# A window of more pixels a side than this many tiles is a mistake, such as metres for a raster in degrees.
_LARGEST_FACTOR = 16


@dataclass(kw_only=True)
class AugmentConfig:
    """What is random about training tiles, beside where they lie.

    Attributes:
        flips: the eight symmetries of the square: right for imagery seen from above.
        scale: (smallest, largest) zoom; (1, 1) for none. Of maps and classifiers, each axis has a zoom of its own.
        resolution: instead of `scale`, (smallest, largest) pixel size of a tile: micrometres of slides, units of
            the CRS of rasters. Windows are larger or smaller than a tile accordingly.
        gain: each band is multiplied by a factor from [1 - gain, 1 + gain].
        offset: each band is shifted by an amount from [-offset, offset], in standard deviations.
        shuffle: probability of a random order of the bands, where shapes tell more than colours do.
        stain: jitter of the stains of haematoxylin and eosin, 0.2 is a lot; for red, green and blue of 8 bits.
    """

    flips: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    resolution: tuple[float, float] | None = None
    gain: float = 0.0
    offset: float = 0.0
    shuffle: float = 0.0
    stain: float = 0.0


def check_augment(config: AugmentConfig) -> None:
    """Refuse values that can't be drawn from.

    Raises:
        ConfigError: which, and what is expected.
    """
    for key in ("scale", "resolution"):
        value = getattr(config, key)
        if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1] < math.inf):
            shown = ", ".join(f"{side:g}" for side in value)
            raise ConfigError(f"data.augment.{key} must be [smallest, largest] above 0, got [{shown}]")
    if config.resolution is not None and tuple(config.scale) != (1.0, 1.0):
        raise ConfigError("data.augment.scale and data.augment.resolution say the same thing twice; give one of both")
    for key in ("gain", "offset"):
        if not 0 <= getattr(config, key) < math.inf:
            raise ConfigError(f"data.augment.{key} must be at least 0, got {getattr(config, key):g}")
    for key in ("shuffle", "stain"):
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"data.augment.{key} must lie between 0 and 1, got {getattr(config, key):g}")


def make_stain_jitter(config: AugmentConfig, sources: Sequence[Source], num_bands: int) -> StainJitter | None:
    """The jitter that a config asks for, None for none.

    Args:
        config: whose `stain` is above 0 for some.
        sources: images it is applied to.
        num_bands: of the images as they are read.

    Raises:
        ConfigError: images that are not red, green and blue of 8 bits.
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
    """Pixel size in micrometres of a slide, in units of its CRS of a raster; None where the source has none.

    Of pixels that are not square, the side of a square as large.
    """
    if source.mpp is not None:
        return source.mpp
    transform = source.transform
    if source.crs is None and transform.is_identity:
        return None
    return math.sqrt(abs(transform.determinant))


def pixel_sizes(config: AugmentConfig, sources: Sequence[Source]) -> list[float] | None:
    """`pixel_size` of each source where a config asks for pixels of other sizes, None where it doesn't.

    Raises:
        ConfigError: a source without, or one so far from what is asked for that the unit must be wrong.
    """
    if config.resolution is None:
        return None
    return [_checked_side(source, config.resolution) for source in sources]


def draw_log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """A number between both bounds, as likely to lie in [x, 2 x] whatever x."""
    return float(np.exp(rng.uniform(*np.log(bounds))))


def _checked_side(source: Source, resolution: tuple[float, float]) -> float:
    side = pixel_size(source)
    low, high = resolution
    if side is None:
        raise ConfigError(
            f"data.augment.resolution needs the size of pixels, which {source.path} doesn't tell; give "
            "data.slide_mpp for a slide, a raster with a georeference, or data.augment.scale, which are factors"
        )
    if high > side * _LARGEST_FACTOR or low * _LARGEST_FACTOR < side:
        unit = "micrometres" if source.mpp is not None else f"units of {source.crs}"
        raise ConfigError(
            f"data.augment.resolution [{low:g}, {high:g}] is more than {_LARGEST_FACTOR} times the pixels of "
            f"{source.path}, or less than their {_LARGEST_FACTOR}th part: they are {side:.4g} {unit}; give sizes near "
            "that"
        )
    return side
