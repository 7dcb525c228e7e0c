"""Shared parts of all data modules: epochs, workers, band statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from perf_vit.distributed import process_place
from perf_vit.errors import ConfigError, DataWarning
from perf_vit.transforms import InputBands, Normalizer, band_labels, common_names, without_tiny
from perf_vit.types import GeoImage, Source

__all__ = [
    "EpochDataModule",
    "EpochLoader",
    "EpochSampler",
    "ShareSampler",
    "TileBatch",
    "collate_tiles",
    "given_normalizer",
    "measure_bands",
    "order_of_turn",
    "seen_images",
]

TileBatch = tuple[Tensor, Tensor, Tensor | None]
"""Tiles [B, C, H, W], their labels or targets, and valid pixels, bool [B, H, W], None where all are."""


class EpochSampler(Sampler[int]):
    """Counts on from epoch to epoch, so that a dataset which is a function of the index never repeats itself.

    Lightning calls `set_epoch`, also after a resume: the samples go on where they would have been. Of several
    processes each takes every so many-th sample, so together they see what one would; a rest is left out.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0
        self._num_skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at this epoch's first index."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Leave out so many of this process's samples at the start of the next iteration."""
        self._num_skipped = num_samples

    def __iter__(self) -> Iterator[int]:
        rank, world_size = process_place()
        start = self.epoch * self.length
        skipped, self._num_skipped = self._num_skipped, 0
        return iter(range(start + rank, start + len(self) * world_size, world_size)[skipped:])

    def __len__(self) -> int:
        return self.length // process_place()[1]


class ShareSampler(Sampler[int]):
    """The samples of a dataset in order, each in one of the processes that validate together.

    All processes have equally many, since networks whose weights are shared out predict together: those without a
    sample of their own at the end take the dataset's last one, which doesn't count there.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        rank, world_size = process_place()
        return (min(rank + turn * world_size, self.length - 1) for turn in range(len(self)))

    def __len__(self) -> int:
        return -(-self.length // process_place()[1])

    @property
    def num_counted(self) -> int:
        """How many of this process's samples are its own; they come first."""
        rank, world_size = process_place()
        return len(range(rank, self.length, world_size))


def collate_tiles(samples: Sequence[tuple[Tensor, ...]]) -> Any:
    """A batch of samples that end with the valid pixels of a tile, bool [H, W]; None where all pixels are valid."""
    *parts, valid = zip(*samples, strict=True)
    all_valid = all(each.all() for each in valid)
    return *(default_collate(list(part)) for part in parts), None if all_valid else default_collate(list(valid))


class EpochLoader(DataLoader[Any]):
    """Batches of the samples of one epoch after another.

    Args:
        dataset: of samples that are functions of the index, see `EpochSampler`; its length is that of an epoch.
        batch_size: samples a batch.
        num_workers: loader processes; 0 loads in the training process.
        collate_fn: makes a batch of a list of samples; torch's by default.
        drop_last: drop a last smaller batch, whose batch statistics are worse.

    Attributes:
        num_given: batches of the present epoch that were handed out; workers may have made more.
        num_skipped: batches to leave out at the start of the next epoch.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = True,
    ) -> None:
        self.epoch_sampler = EpochSampler(len(dataset))
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=self.epoch_sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=collate_fn,
            drop_last=drop_last,
        )
        self.num_given = 0
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts with its first batch: Lightning asks for the iterator before it sets the sampler's epoch,
        # and workers begin at once.
        self.num_given, self.num_skipped = self.num_skipped, 0
        self.epoch_sampler.skip(self.num_given * (self.batch_size or 1))
        for batch in super().__iter__():
            self.num_given += 1
            yield batch


@lru_cache(maxsize=4)
def order_of_turn(seed: int, turn: int, length: int) -> npt.NDArray[np.int64]:
    """The order in which a dataset's items come in one turn through it, as a permutation of their numbers."""
    # A seed of its own, so that no item draws from it.
    return np.random.default_rng((seed, turn, length)).permutation(length)


class EpochDataModule(lightning.LightningDataModule):
    """A data module whose place in an epoch is part of a checkpoint.

    A run that is resumed in the middle of an epoch goes on with exactly the samples that were left. Subclasses make
    their training loader with `train_loader`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loader: EpochLoader | None = None
        self._num_skipped = 0

    def train_loader(self, dataset: Any, **options: Any) -> EpochLoader:
        """A loader that begins where the checkpoint was written, if there is one; `options` are `EpochLoader`'s.

        Raises:
            ConfigError: not a batch of samples for each of several processes.
        """
        self._loader = EpochLoader(dataset, **options)
        if not len(self._loader):
            raise ConfigError(
                f"data.batch_size: {process_place()[1]} processes share the {len(dataset)} samples of an epoch, too "
                f"few for a batch of {self._loader.batch_size} each; take smaller batches or fewer trainer.devices"
            )
        self._loader.num_skipped, self._num_skipped = self._num_skipped, 0
        return self._loader

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were given; none of the next one after the last."""
        return {"num_batches": 0 if self._loader is None else self._loader.num_given % max(1, len(self._loader))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave out the batches that were given before."""
        # Sharded training reads the checkpoint when the loader is there already.
        if self._loader is None:
            self._num_skipped = state_dict["num_batches"]
        else:
            self._loader.num_skipped = state_dict["num_batches"]


# Images to measure on, and their longest side: enough for two digits, read in a second.
_IMAGES = 64

_SIDE_PX = 256


def given_normalizer(mean: Sequence[float] | None, std: Sequence[float] | None, num_bands: int) -> Normalizer | None:
    """The normalizer of `data.mean` and `data.std`; None where a config leaves them to be measured.

    Raises:
        ConfigError: one without the other, another number of bands, or a std that is not above 0.
    """
    if (mean is None) != (std is None):
        raise ConfigError("data.mean and data.std go together; give both, or neither to have them measured")
    if mean is None or std is None:
        return None
    if not len(mean) == len(std) == num_bands or min(std) <= 0:
        raise ConfigError(
            f"data.mean and data.std must give one value for each of {num_bands} bands, std above 0, "
            f"got {list(mean)} and {list(std)}"
        )
    floor = [float(np.finfo(np.float32).eps) * abs(each) for each in mean]
    return Normalizer(tuple(mean), without_tiny(std, floor, band_labels(None, num_bands)))


def measure_bands(
    images: Sequence[GeoImage], sources: Sequence[Source], given: Normalizer | None
) -> tuple[Normalizer, InputBands]:
    """The normalizer, measured where it isn't given, and the ranges of the bands.

    Args:
        images: some training images, of low resolution.
        sources: all of them.
        given: see `given_normalizer`.

    Raises:
        InputError: a band has no valid pixel.
    """
    names = common_names(sources, len(images[0].pixels))
    return given or Normalizer.from_images(images, names or None), InputBands.measured(images, names)


def seen_images(read_reduced: Callable[[int, int], GeoImage], paths: Sequence[str | Path], seed: int) -> list[GeoImage]:
    """Some images that the seed decides, of low resolution, to measure statistics on.

    Args:
        read_reduced: an image by its place and its longest side in pixels.
        paths: of the images.
        seed: decides which are looked at.
    """
    chosen = np.random.default_rng(seed).permutation(len(paths))[:_IMAGES]
    seen = [read_reduced(int(index), _SIDE_PX) for index in chosen]
    bare = [int(index) for index, image in zip(chosen, seen, strict=True) if not image.valid.any()]
    if bare and len(bare) < len(seen):
        warnings.warn(
            f"{len(bare)} of {len(seen)} training images looked at have no valid pixel, the first {paths[bare[0]]}",
            DataWarning,
            stacklevel=3,
        )
    return seen
