"""The Lightning data module of window datasets."""

from __future__ import annotations

from collections.abc import Iterator

import lightning
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from perf_vit.data.windows import GridWindows, RandomWindows
from perf_vit.transforms import Normalizer

__all__ = ["WindowDataModule"]


class EpochSampler(Sampler[int]):
    """Counts on from epoch to epoch, so that a dataset which is a function of the index never repeats itself.

    Lightning calls `set_epoch`, also after a resume: the samples go on where they would have been.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at this epoch's first index."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        return iter(range(start, start + self.length))

    def __len__(self) -> int:
        return self.length


class WindowDataModule(lightning.LightningDataModule):
    """Random windows to train on, grid windows to validate on.

    Attributes:
        classes: names, in the order of the class indices.
        normalizer: measured on the training region.
        tile_px: side of a tile, in pixels.
    """

    def __init__(
        self,
        train: RandomWindows,
        val: GridWindows,
        *,
        classes: tuple[str, ...],
        normalizer: Normalizer,
        tile_px: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.classes = classes
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Augmented tiles, a new set each epoch; a last smaller batch is dropped (batch statistics)."""
        return DataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(self.train)),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The validation region's tiles, in order."""
        return DataLoader(self.val, batch_size=self.batch_size, num_workers=self.num_workers)
