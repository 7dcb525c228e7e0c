"""Data config keys shared by all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perf_vit.data.augmentation import AugmentConfig, check_augment
from perf_vit.errors import ConfigError

__all__ = ["BaseDataConfig", "SplitConfig", "TileDataConfig", "check_base", "image_paths"]


@dataclass(kw_only=True)
class SplitConfig:
    """Images to train or validate on.

    Attributes:
        image: File, folder, glob, or list of these.
    """

    # OmegaConf has no union of str and list.
    image: Any

    def __post_init__(self) -> None:
        paths = image_paths(self.image)
        if not paths or not all(isinstance(path, str) for path in paths):
            raise ConfigError(f"image must be a file, a folder, a glob, or a list of these, got {self.image!r:.100}")


@dataclass(kw_only=True)
class BaseDataConfig:
    """Bands and tiles, for all tasks.

    Attributes:
        bands: 1-based bands to use; None for all.
        mean: Mean of each band in the images' units, for standardisation, e.g. that of the backbone's pretraining; None
            to measure it on training images.
        std: Standard deviation of each band; required with `mean`.
        tile_px: Tile size in pixels; a multiple of the backbone's patch size.
        batch_size: Number of tiles per step.
        num_workers: Number of loader processes; 0 loads in the training process.
    """

    bands: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    tile_px: int = 224
    batch_size: int = 4
    num_workers: int = 0


@dataclass(kw_only=True)
class TileDataConfig(BaseDataConfig):
    """Labelled tiles, for tasks that train a backbone on them.

    Attributes:
        nodata: Value of missing pixels, which replaces the one declared in files.
        augment: Augmentation of training tiles.
    """

    nodata: float | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def image_paths(image: str | Sequence[str]) -> list[str]:
    """Return the paths and globs of an `image` key."""
    return list(image) if isinstance(image, list | tuple) else [image]  # type: ignore[list-item]


def check_base(config: BaseDataConfig, least: Mapping[str, int] | None = None) -> None:
    """Check sizes and augmentation.

    Args:
        config: Data config of any task.
        least: Minimum values of further keys.

    Raises:
        ConfigError: A value is out of range.
    """
    if isinstance(config, TileDataConfig):
        check_augment(config.augment)
    for key, smallest in {"tile_px": 1, "batch_size": 1, "num_workers": 0, **(least or {})}.items():
        if getattr(config, key) < smallest:
            raise ConfigError(f"data.{key} must be at least {smallest}, got {getattr(config, key)}")
