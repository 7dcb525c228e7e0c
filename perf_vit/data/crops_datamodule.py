"""The Lightning data module of unlabelled crops, and its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from perf_vit.data.band_statistics import given_normalizer
from perf_vit.data.config import BaseDataConfig, SplitConfig, check_base, image_paths
from perf_vit.data.crops import UnlabelledCrops, find_images
from perf_vit.data.epochs import EpochDataModule, ShareSampler, collate_tiles
from perf_vit.errors import InputError
from perf_vit.transforms import Normalizer

__all__ = ["DistillationDataConfig", "DistillationDataModule", "build_distillation_datamodule"]


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
