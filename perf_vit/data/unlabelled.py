"""Random crops of unlabelled images, and the data module of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from perf_vit.data.base import EpochDataModule, EpochLoader, ShareLoader, collate_tiles, given_normalizer
from perf_vit.data.config import BaseDataConfig, SplitConfig, check_base, image_paths
from perf_vit.errors import InputError
from perf_vit.sources import (
    find_images,
    open_source,
)
from perf_vit.tiling import random_window
from perf_vit.transforms import Normalizer, turn
from perf_vit.types import Source

__all__ = ["DistillationDataConfig", "DistillationDataModule", "UnlabelledCrops", "build_distillation_datamodule"]


class UnlabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of random images; item i depends on (seed, i) only.

    All images are equally likely, whatever their size. Crops with less than half valid pixels are drawn again, up to
    ten times.

    Args:
        images: Rasters, photos and slides, as listed by `find_images`; slides are read at level 0.
        normalizer: Mean and standard deviation of each band, in the images' units.
        tile_px: Crop size in pixels.
        length: Number of crops.
        seed: Seed of images, positions and symmetries, whatever the number of workers.
        bands: 1-based bands to read; None for the first ones, as many as the normalizer has.
        symmetries: Whether to apply the eight symmetries of the square.

    Raises:
        InputError: There is no image, or one can't be opened, lacks the bands or is smaller than a crop.
    """

    def __init__(
        self,
        images: Sequence[Path],
        normalizer: Normalizer,
        *,
        tile_px: int,
        length: int,
        seed: int,
        bands: Sequence[int] | None = None,
        symmetries: bool = True,
    ) -> None:
        if not images:
            raise InputError("expected images to take crops from, got none")
        chosen = tuple(bands) if bands is not None else tuple(range(1, len(normalizer.mean) + 1))
        self.sources = [_open(path, chosen) for path in images]
        _check_sizes(self.sources, tile_px)
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.length = length
        self.seed = seed
        self.symmetries = symmetries

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a standardised crop [C, tile_px, tile_px] float32 and its valid pixels [tile_px, tile_px].

        Any index >= 0 is allowed.
        """
        rng = np.random.default_rng((self.seed, index))
        for _ in range(10):
            source = self.sources[int(rng.integers(len(self.sources)))]
            # Close after each crop, as there may be more images than the limit of open files.
            with closing(source):
                image = source.read(random_window(source.extent, self.tile_px, rng))
            if image.valid.mean() >= 0.5:
                break
        symmetry = int(rng.integers(8)) if self.symmetries else 0
        pixels, valid = turn(self.normalizer(image), symmetry), turn(image.valid, symmetry)
        return torch.from_numpy(pixels), torch.from_numpy(valid)


def _open(path: Path, bands: tuple[int, ...]) -> Source:
    with closing(open_source(path, bands=bands)) as source:
        return source


def _check_sizes(sources: Sequence[Source], tile_px: int) -> None:
    small = [source for source in sources if min(source.size) < tile_px]
    if small:
        height, width = small[0].size
        raise InputError(
            f"crops of {tile_px} px need images of that size, got {len(small)} of {len(sources)} smaller ones, the "
            f"first {small[0].path} with {height} x {width} px; leave them out or take smaller crops"
        )


@dataclass(kw_only=True)
class DistillationDataConfig(BaseDataConfig):
    """Unlabelled images to take random crops from; `BaseDataConfig` has further keys.

    By default, `bands` are the first ones, as many as the model takes, and for 8-bit images `mean` and `std` are those
    of the model, times 255.

    Attributes:
        train: Training images.
        val: Validation images, preferably of another place.
        num_val_tiles: Number of fixed validation crops.
    """

    train: SplitConfig
    val: SplitConfig
    tile_px: int = 518
    batch_size: int = 1
    num_val_tiles: int = 16


class DistillationDataModule(EpochDataModule):
    """Data module of distillation: random training crops, fixed validation crops.

    Args:
        train: Crops of the first epoch; later epochs continue the index.
        val: Validation crops.
        batch_size: Number of crops per step.
        num_workers: Number of loader processes.
    """

    def __init__(self, train: UnlabelledCrops, val: UnlabelledCrops, *, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of training crops, new ones each epoch."""
        return self.train_loader(
            EpochLoader(self.train, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate_tiles)
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the validation crops, in order."""
        return ShareLoader(
            self.val,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
        )


def build_distillation_datamodule(
    config: DistillationDataConfig, mean: Sequence[float], std: Sequence[float], *, steps_per_epoch: int, seed: int
) -> DistillationDataModule:
    """Open all images and build the data module.

    Args:
        config: Images and crops.
        mean: Mean of the model, one value per band, for pixels from 0 to 1.
        std: Standard deviation of the model, likewise.
        steps_per_epoch: Number of batches per epoch.
        seed: Seed of the crops.

    Raises:
        ConfigError: Values are out of range.
        InputError: Images are missing, too small, or not 8-bit if the config gives no mean and std.
    """
    check_base(config, {"num_val_tiles": 1})
    normalizer = given_normalizer(config.mean, config.std, len(mean)) or Normalizer(
        tuple(255 * value for value in mean), tuple(255 * value for value in std)
    )
    parts = []
    for split, length, symmetries in (
        (config.train, steps_per_epoch * config.batch_size, True),
        (config.val, config.num_val_tiles, False),
    ):
        crops = UnlabelledCrops(
            find_images(image_paths(split.image)),
            normalizer,
            tile_px=config.tile_px,
            length=length,
            seed=seed,
            bands=config.bands,
            symmetries=symmetries,
        )
        if config.mean is None:
            _check_bytes(crops)
        parts.append(crops)
    return DistillationDataModule(*parts, batch_size=config.batch_size, num_workers=config.num_workers)


def _check_bytes(crops: UnlabelledCrops) -> None:
    for source in crops.sources:
        if source.dtype != np.uint8:
            raise InputError(
                f"the model's own mean and std are for 8-bit images, got {source.path} of {source.dtype}; give "
                "data.mean and data.std in the units of the images"
            )
