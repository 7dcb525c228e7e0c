"""The Lightning data module of window datasets."""

from __future__ import annotations

from collections.abc import Iterator

import lightning
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from perf_vit.data.windows import GridWindows, RandomWindows
from perf_vit.transforms import Normalizer

__all__ = ["WindowDataModule"]


class EpochSampler(Sampler[int]):
    """Counts on from epoch to epoch, so that a dataset which is a function of the index never repeats itself.

    Lightning calls `set_epoch`, also after a resume: the samples go on where they would have been. Of several
    processes each takes every so many-th sample, so together they see what one would; a rest is left out.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at this epoch's first index."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rank, world_size = _place()
        start = self.epoch * self.length
        return iter(range(start + rank, start + len(self) * world_size, world_size))

    def __len__(self) -> int:
        return self.length // _place()[1]


class ShareSampler(Sampler[int]):
    """The samples of a dataset in order, each in one of the processes that validate together."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        rank, world_size = _place()
        return iter(range(rank, self.length, world_size))

    def __len__(self) -> int:
        rank, world_size = _place()
        return len(range(rank, self.length, world_size))


def _place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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
        return DataLoader(
            self.val, batch_size=self.batch_size, sampler=ShareSampler(len(self.val)), num_workers=self.num_workers
        )
