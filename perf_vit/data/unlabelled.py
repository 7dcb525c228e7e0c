"""Data module of distillation, of crops of unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import DataLoader

from perf_vit.data.base import EpochDataModule, EpochLoader, ShareLoader, given_normalizer
from perf_vit.data.config import BaseDataConfig, SplitConfig, check_base, image_paths
from perf_vit.models import UnlabelledCrops, collate_tiles
from perf_vit.sources import find_images
from perf_vit.transforms import Normalizer

__all__ = ["DistillationDataConfig", "DistillationDataModule", "build_distillation_datamodule"]


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
            EpochLoader(
                self.train, batch_size=self.loader_batch_size, num_workers=self.num_workers, collate_fn=collate_tiles
            )
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the validation crops, in order."""
        return ShareLoader(
            self.val,
            batch_size=self.loader_batch_size,
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
        (config.train, steps_per_epoch * config.process_batch_size(), True),
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
            crops.check_bytes("give data.mean and data.std in the units of the images")
        parts.append(crops)
    data = DistillationDataModule(*parts, batch_size=config.batch_size, num_workers=config.num_workers)
    data.global_batch_size = config.global_batch_size
    return data
