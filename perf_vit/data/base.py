"""Base of data modules: epoch samplers and loaders, band statistics."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from perf_vit.distributed import rank_and_world_size, sample_rank_and_world_size
from perf_vit.errors import ConfigError, DataWarning
from perf_vit.models import InputBands, common_names
from perf_vit.transforms import Normalizer, band_labels, replace_tiny_std
from perf_vit.types import GeoImage, Source

__all__ = [
    "EpochDataModule",
    "EpochLoader",
    "EpochSampler",
    "ShareLoader",
    "ShareSampler",
    "TileBatch",
    "given_normalizer",
    "measure_bands",
    "sample_images",
    "shuffled_indices",
    "warn_of_mixed_mpp",
]

TileBatch = tuple[Tensor, Tensor, Tensor | None]
"""Tiles [B, C, H, W], labels or targets, and valid pixels [B, H, W] bool, None if all pixels are valid."""


class EpochSampler(Sampler[int]):
    """Sampler whose indices continue from epoch to epoch, so that datasets that depend on the index never repeat.

    Lightning calls `set_epoch`, also after a resume, so samples continue where they would have been. With several
    processes, the samples are interleaved: together they see those of a single process; a remainder is left out.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0
        self._num_skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the first index of an epoch."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Skip samples of this process at the start of the next iteration."""
        self._num_skipped = num_samples

    def __iter__(self) -> Iterator[int]:
        rank, world_size = sample_rank_and_world_size()
        start = self.epoch * self.length
        skipped, self._num_skipped = self._num_skipped, 0
        return iter(range(start + rank, start + len(self) * world_size, world_size)[skipped:])

    def __len__(self) -> int:
        return self.length // sample_rank_and_world_size()[1]


class ShareSampler(Sampler[int]):
    """Sampler that distributes the samples of a dataset over the validating processes, in order.

    All processes get the same number of samples, as networks with sharded weights predict together. Processes without a
    sample left repeat the last one of the dataset, which is not counted there.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        rank, world_size = sample_rank_and_world_size()
        return (min(rank + turn * world_size, self.length - 1) for turn in range(len(self)))

    def __len__(self) -> int:
        return -(-self.length // sample_rank_and_world_size()[1])

    @property
    def num_counted(self) -> int:
        """Number of samples of this process to count; they come first."""
        rank, world_size = sample_rank_and_world_size()
        return len(range(rank, self.length, world_size))


def _read_in_one_thread(worker: int) -> None:
    """Keep GDAL in a loader process to one core: it decodes JPEG 2000 with a thread for each by default."""
    os.environ.setdefault("GDAL_NUM_THREADS", "1")


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Let loader processes that start meanwhile augment in one thread, as torch does for its own threads there.

    OpenCV's threads don't survive a fork, and a forked process that changes their number waits for them forever.
    """
    opencv = sys.modules.get("cv2")
    if opencv is None:
        yield
        return
    before = opencv.getNumThreads()
    opencv.setNumThreads(1)
    try:
        yield
    finally:
        opencv.setNumThreads(before)


class ShareLoader(DataLoader[Any]):
    """Loader of all samples of a dataset in order, see `ShareSampler`.

    Args:
        dataset: Dataset to load.
        batch_size: Number of samples per batch.
        num_workers: Number of loader processes; 0 loads in the validating process.
        collate_fn: Function that collates a list of samples.
    """

    def __init__(
        self, dataset: Any, *, batch_size: int, num_workers: int, collate_fn: Callable[[list[Any]], Any]
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=ShareSampler(len(dataset)),
            num_workers=num_workers,
            collate_fn=collate_fn,
            worker_init_fn=_read_in_one_thread,
        )

    def __iter__(self) -> Any:
        with _one_opencv_thread():
            return super().__iter__()


class EpochLoader(DataLoader[Any]):
    """Loader of batches, one epoch after another.

    Args:
        dataset: Dataset whose samples depend on the index, see `EpochSampler`; its length is that of an epoch.
        batch_size: Number of samples per batch.
        num_workers: Number of loader processes; 0 loads in the training process.
        collate_fn: Function that collates a list of samples; None for torch's default.
        drop_last: Whether to drop a smaller last batch, whose batch statistics are worse.

    Attributes:
        num_given: Number of batches of the current epoch handed out; workers may have prepared more.
        num_skipped: Number of batches to skip at the start of the next epoch.
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
            worker_init_fn=_read_in_one_thread,
        )
        self.num_given = 0
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts at its first batch: Lightning requests the iterator before it sets the sampler's epoch,
        # and workers start at once.
        self.num_given, self.num_skipped = self.num_skipped, 0
        self.epoch_sampler.skip(self.num_given * (self.batch_size or 1))
        with _one_opencv_thread():
            batches = super().__iter__()
        for batch in batches:
            self.num_given += 1
            yield batch


@lru_cache(maxsize=4)
def shuffled_indices(seed: int, turn: int, length: int) -> npt.NDArray[np.int64]:
    """Return the order of a dataset's items in one pass, as a permutation of their indices.

    Args:
        seed: Seed of the dataset.
        turn: Index of the pass.
        length: Number of items.
    """
    # A separate seed, which no item uses.
    return np.random.default_rng((seed, turn, length)).permutation(length)


def _sharers() -> tuple[int, str]:
    """Return how many share the samples, and what they are: processes, or groups of processes that share a tile."""
    number, num_processes = sample_rank_and_world_size()[1], rank_and_world_size()[1]
    if number < num_processes:
        return number, f"{number} groups of {num_processes // number} processes (trainer.sequence_parallel)"
    return number, f"{number} processes"


class EpochDataModule(lightning.LightningDataModule):
    """Data module whose position in an epoch is saved in checkpoints.

    A run resumed within an epoch continues with exactly the remaining samples. Subclasses build their training loader
    with `train_loader`, and their loaders with `loader_batch_size`.

    Attributes:
        batch_size: Number of samples per step, of each process.
        global_batch_size: Number of samples per step of all processes together, instead of `batch_size`; None for none.
    """

    batch_size: int
    global_batch_size: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._loader: EpochLoader | None = None
        self._num_skipped = 0

    @property
    def loader_batch_size(self) -> int:
        """Number of samples per step of this process.

        Raises:
            ConfigError: The processes can't share the global batch equally.
        """
        if self.global_batch_size is None:
            return self.batch_size
        number, sharers = _sharers()
        if self.global_batch_size % number:
            nearest = max(1, round(self.global_batch_size / number)) * number
            raise ConfigError(
                f"data.global_batch_size must be a multiple of the {sharers}, got {self.global_batch_size}; take "
                f"{nearest}"
            )
        return self.global_batch_size // number

    def train_loader(self, loader: EpochLoader) -> EpochLoader:
        """Return the training loader, which starts at the checkpoint's position, if any.

        Raises:
            ConfigError: There are too few samples for a batch in each process.
        """
        self._loader = loader
        if not len(loader):
            key = "batch_size" if self.global_batch_size is None else "global_batch_size"
            number, sharers = _sharers()
            who = "1 process has" if number == 1 else f"{sharers} share"
            raise ConfigError(
                f"data.{key}: {who} the {loader.epoch_sampler.length} samples of an epoch, too few for a batch of "
                f"{loader.batch_size} each; take smaller batches or fewer trainer.devices"
            )
        loader.num_skipped, self._num_skipped = self._num_skipped, 0
        return loader

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches handed out in the epoch, 0 after its last."""
        return {"num_batches": 0 if self._loader is None else self._loader.num_given % max(1, len(self._loader))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the batches that were handed out before."""
        # In sharded training the loader already exists when the checkpoint is read.
        if self._loader is None:
            self._num_skipped = state_dict["num_batches"]
        else:
            self._loader.num_skipped = state_dict["num_batches"]


# Scanners of one nominal magnification differ by less than this.
_MIXED_SCALE = 1.15


def warn_of_mixed_mpp(sources: Iterable[Source], hint: str = "give data.mpp") -> None:
    """Warn if slides are read at different pixel sizes, as they are at level 0.

    Args:
        sources: Training and validation sources; rasters don't count.
        hint: What to do, for the warning.
    """
    sized = sorted((source.mpp, source.path) for source in sources if source.mpp is not None)
    if not sized or sized[-1][0] <= _MIXED_SCALE * sized[0][0]:
        return
    (low, finest), (high, coarsest) = sized[0], sized[-1]
    warnings.warn(
        f"{len(sized)} slides are read at their own pixel sizes, from {low:.4g} micrometres ({finest}) to {high:.4g} "
        f"({coarsest}), and objects in them have different sizes in pixels; {hint}",
        DataWarning,
        stacklevel=3,
    )


# Number and longest side of the images to measure: enough for two digits, read within a second.
_IMAGES = 64

_SIDE_PX = 256


def given_normalizer(mean: Sequence[float] | None, std: Sequence[float] | None, num_bands: int) -> Normalizer | None:
    """Build the normalizer from `data.mean` and `data.std`; None if the config leaves them to be measured.

    Raises:
        ConfigError: Only one of them is given, their length is wrong, or a std is not above 0.
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
    return Normalizer(tuple(mean), replace_tiny_std(std, floor, band_labels(None, num_bands)))


def measure_bands(
    images: Sequence[GeoImage], sources: Sequence[Source], given: Normalizer | None
) -> tuple[Normalizer, InputBands]:
    """Return the normalizer, measured unless given, and the value ranges of the bands.

    Args:
        images: Some training images at low resolution.
        sources: All training sources.
        given: Normalizer from `given_normalizer`, or None.

    Raises:
        InputError: A band has no valid pixels.
    """
    names = common_names(sources, len(images[0].pixels))
    return given or Normalizer.from_images(images, names or None), InputBands.measure(images, names)


def sample_images(
    read_reduced: Callable[[int, int], GeoImage], paths: Sequence[str | Path], seed: int
) -> list[GeoImage]:
    """Read a random sample of images at low resolution, for statistics.

    Args:
        read_reduced: Function that reads an image, given its index and its longest side in pixels.
        paths: Paths of all images.
        seed: Seed of the selection.
    """
    chosen = np.random.default_rng(seed).permutation(len(paths))[:_IMAGES]
    seen = [read_reduced(int(index), _SIDE_PX) for index in chosen]
    bare = [int(index) for index, image in zip(chosen, seen, strict=True) if not image.valid.any()]
    if bare and len(bare) < len(seen):
        warnings.warn(
            f"{len(bare)} of {len(seen)} training images checked have no valid pixel, the first {paths[bare[0]]}",
            DataWarning,
            stacklevel=3,
        )
    return seen
