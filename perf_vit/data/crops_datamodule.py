"""The Lightning data module of unlabelled crops, and its config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from perf_vit.data.band_statistics import given_normalizer
from perf_vit.data.crops import UnlabelledCrops, find_images
from perf_vit.data.epochs import EpochDataModule, ShareSampler
from perf_vit.errors import ConfigError, InputError
from perf_vit.transforms import Normalizer

__all__ = ["CropsConfig", "CropsDataModule", "build_crops"]


@dataclass(kw_only=True)
class CropsConfig:
    """Images to take crops of.

    Attributes:
        images: files and folders to train on.
        val_images: files and folders to validate on, best of another place than `images`.
        size_px: side of a crop, in pixels; a multiple of the model's patch size.
        bands: 1-based bands; the first ones, as many as the model takes, if left out.
        mean: one value a band, in the images' units; the model's own, times 255, if left out, for images of 8 bits.
        std: as `mean`.
        batch_size: crops a step.
        num_val_crops: crops to validate on, the same ones each time.
        num_workers: loader processes; 0 loads in the training process.
    """

    images: list[str]
    val_images: list[str]
    size_px: int = 518
    bands: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 1
    num_val_crops: int = 16
    num_workers: int = 0


class CropsDataModule(EpochDataModule):
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

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Crops that were never seen before, each epoch."""
        return self.train_loader(self.train, batch_size=self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The crops to validate on, in order."""
        return DataLoader(
            self.val, batch_size=self.batch_size, sampler=ShareSampler(len(self.val)), num_workers=self.num_workers
        )


def build_crops(
    config: CropsConfig, mean: Sequence[float], std: Sequence[float], *, steps_per_epoch: int, seed: int
) -> CropsDataModule:
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
    if min(config.batch_size, config.num_val_crops) < 1 or config.num_workers < 0:
        raise ConfigError(
            "data.batch_size and data.num_val_crops must be at least 1 and data.num_workers 0 or more, got "
            f"{config.batch_size}, {config.num_val_crops} and {config.num_workers}"
        )
    normalizer = given_normalizer(config.mean, config.std, len(mean)) or Normalizer(
        tuple(255 * value for value in mean), tuple(255 * value for value in std)
    )
    parts = []
    for images, length, symmetries in (
        (config.images, steps_per_epoch * config.batch_size, True),
        (config.val_images, config.num_val_crops, False),
    ):
        crops = UnlabelledCrops(
            find_images(images),
            normalizer,
            size_px=config.size_px,
            length=length,
            seed=seed,
            bands=config.bands,
            symmetries=symmetries,
        )
        if config.mean is None:
            _check_bytes(crops)
        parts.append(crops)
    return CropsDataModule(*parts, batch_size=config.batch_size, num_workers=config.num_workers)


def _check_bytes(crops: UnlabelledCrops) -> None:
    for source in crops.sources:
        if source.dtype != np.uint8:
            raise InputError(
                f"the model's own mean and std are for images of 8 bits, got {source.path} of {source.dtype}; give "
                "data.mean and data.std in its units"
            )
