"""The Lightning data module of window datasets."""

from __future__ import annotations

from typing import TypeAlias

from torch.utils.data import ConcatDataset, DataLoader

from perf_vit.data.epochs import EpochDataModule, ShareSampler, collate_tiles
from perf_vit.data.window_places import GridPlaces
from perf_vit.data.windows import GridWindows, LabelledTile, RandomWindows
from perf_vit.transforms import InputBands, Normalizer

__all__ = ["Grids", "SegmentationDataModule"]

Grids: TypeAlias = GridWindows | ConcatDataset[LabelledTile]
"""The tiles of one source, or of several."""


class SegmentationDataModule(EpochDataModule):
    """Augmented windows to train on, grid windows to validate on.

    Attributes:
        classes: names, in the order of the class indices.
        normalizer: as given, or measured on the training region.
        trained_on: bands of the training region.
        tile_px: side of a tile, in pixels.
    """

    def __init__(
        self,
        train: RandomWindows,
        val: Grids,
        *,
        classes: tuple[str, ...],
        normalizer: Normalizer,
        trained_on: InputBands,
        tile_px: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.classes = classes
        self.normalizer = normalizer
        self.trained_on = trained_on
        self.tile_px = tile_px
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[LabelledTile]:
        """Augmented tiles, a new set each epoch; a last smaller batch is dropped (batch statistics), but of a grid."""
        return self.train_loader(
            self.train,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
            drop_last=not isinstance(self.train.places, GridPlaces),
        )

    def val_dataloader(self) -> DataLoader[LabelledTile]:
        """The validation regions' tiles, in order."""
        return DataLoader(
            self.val,
            batch_size=self.batch_size,
            sampler=ShareSampler(len(self.val)),
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
        )
