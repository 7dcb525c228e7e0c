"""The keys that the data configs of all tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perf_vit.data.augmentation import AugmentConfig, check_augment
from perf_vit.errors import ConfigError

__all__ = ["BaseDataConfig", "SplitConfig", "TileDataConfig", "check_base", "image_paths"]


@dataclass(kw_only=True)
class SplitConfig:
    """Images to train on or to validate on.

    Attributes:
        image: a file, a folder, a glob, or a list of these.
    """

    # OmegaConf has no union of text and lists.
    image: Any

    def __post_init__(self) -> None:
        paths = image_paths(self.image)
        if not paths or not all(isinstance(path, str) for path in paths):
            raise ConfigError(f"image must be a file, a folder, a glob, or a list of these, got {self.image!r:.100}")


@dataclass(kw_only=True)
class BaseDataConfig:
    """Bands and tiles, for every task.

    Attributes:
        bands: 1-based bands to use; all of them if left out.
        mean: mean of each band, in the images' units, for standardisation, such as what a backbone was pretrained with;
            measured on training images if left out.
        std: standard deviation of each band; goes with `mean`.
        tile_px: tile size in pixels; a multiple of the backbone's patch size.
        batch_size: tiles a step.
        num_workers: loader processes; 0 loads in the training process.
    """

    bands: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    tile_px: int = 224
    batch_size: int = 4
    num_workers: int = 0


@dataclass(kw_only=True)
class TileDataConfig(BaseDataConfig):
    """Labelled tiles, for the tasks that train a backbone on them.

    Attributes:
        nodata: value of missing pixels, instead of the one that files declare.
        augment: random changes of training tiles.
    """

    nodata: float | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def image_paths(image: str | Sequence[str]) -> list[str]:
    """The paths and globs that a key `image` gives."""
    return list(image) if isinstance(image, list | tuple) else [image]  # type: ignore[list-item]


def check_base(config: BaseDataConfig, least: Mapping[str, int] | None = None) -> None:
    """Refuse sizes and augmentation out of range.

    Args:
        config: of any task.
        least: smallest values of further keys.

    Raises:
        ConfigError: names the key, and what is expected.
    """
    if isinstance(config, TileDataConfig):
        check_augment(config.augment)
    for key, smallest in {"tile_px": 1, "batch_size": 1, "num_workers": 0, **(least or {})}.items():
        if getattr(config, key) < smallest:
            raise ConfigError(f"data.{key} must be at least {smallest}, got {getattr(config, key)}")
