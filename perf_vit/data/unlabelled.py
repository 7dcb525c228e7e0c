"""Random crops of images without labels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from perf_vit.data.base import EpochDataModule, ShareSampler, collate_tiles, given_normalizer
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
    """Crops at random places of random images; item i is a function of (seed, i) alone.

    Every image is drawn with the same probability, whatever its size. A crop of which less than half holds data is
    drawn anew, up to ten times.

    Args:
        images: rasters, photos and slides, as `find_images` lists them; slides are read at level 0.
        normalizer: one mean and standard deviation a band, in the images' units.
        tile_px: side of a crop, in pixels.
        length: number of crops.
        seed: decides images, places and symmetries, whatever the number of workers.
        bands: 1-based bands to read; the first ones, as many as the normalizer has, if None.
        symmetries: turn and mirror each crop into one of the eight symmetries of the square.

    Raises:
        InputError: no image, or one that can't be opened, lacks the bands or is smaller than a crop.
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
            raise InputError("expected images to take crops of, got none")
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
        """Crop [C, tile_px, tile_px] float32, standardised, and valid pixels [tile_px, tile_px]; any index >= 0."""
        rng = np.random.default_rng((self.seed, index))
        for _ in range(10):
            source = self.sources[int(rng.integers(len(self.sources)))]
            # Closed after each crop: there may be more images than a process may hold open.
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
            f"crops of {tile_px} px need images as large, got {len(small)} of {len(sources)} that are smaller, the "
            f"first {small[0].path} with {height} x {width} px; leave them out or take smaller crops"
        )


@dataclass(kw_only=True)
class DistillationDataConfig(BaseDataConfig):
    """Images without labels to take random tiles of; `BaseDataConfig` has further keys.

    By default, `bands` are the first ones, as many as the model takes, and `mean` and `std` the model's own, times 255,
    for images of 8 bits.

    Attributes:
        train: images trained on.
        val: images validated on, best of another place.
        num_val_tiles: tiles to validate on, the same ones each time.
    """

    train: SplitConfig
    val: SplitConfig
    tile_px: int = 518
    batch_size: int = 1
    num_val_tiles: int = 16


class DistillationDataModule(EpochDataModule):
    """Random crops to train on, a fixed set of them to validate on.

    Args:
        train: crops of an epoch; later epochs count on.
        val: crops to validate on.
        batch_size: crops a step.
        num_workers: loader processes.
    """

    def __init__(self, train: UnlabelledCrops, val: UnlabelledCrops, *, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Crops that were never seen before, each epoch."""
        return self.train_loader(
            self.train, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate_tiles
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The crops to validate on, in order."""
        return DataLoader(
            self.val,
            batch_size=self.batch_size,
            sampler=ShareSampler(len(self.val)),
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
        )


def build_distillation_datamodule(
    config: DistillationDataConfig, mean: Sequence[float], std: Sequence[float], *, steps_per_epoch: int, seed: int
) -> DistillationDataModule:
    """Open all images.

    Args:
        config: images and crops.
        mean: the model's, one value a band, for pixels from 0 to 1.
        std: as `mean`.
        steps_per_epoch: batches an epoch.
        seed: decides the crops.

    Raises:
        ConfigError: numbers that don't fit.
        InputError: images that are missing, too small, or not of 8 bits where the config gives no mean and std.
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
                f"the model's own mean and std are for images of 8 bits, got {source.path} of {source.dtype}; give "
                "data.mean and data.std in its units"
            )
