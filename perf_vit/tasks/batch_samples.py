"""Names of the samples of a batch, for errors."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import ConcatDataset

from perf_vit.data.base import EpochSampler
from perf_vit.distributed import sample_rank_and_world_size

__all__ = ["samples_of"]

_NUM_NAMED = 3


def samples_of(loader: Any, batch_idx: int, epoch: int) -> list[str]:
    """Name the first samples of a batch, as far as the dataset can.

    Args:
        loader: Loader of the batch.
        batch_idx: Index of the batch in its epoch.
        epoch: Index of the epoch.
    """
    dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    if dataset is None or not isinstance(size, int):
        return []
    indices = list(_indices(loader.sampler, batch_idx * size, size, epoch))
    named = [name for index in indices[:_NUM_NAMED] if (name := _described(dataset, index)) is not None]
    more = len(indices) - _NUM_NAMED
    return [*named, f"{more} more"] if named and more > 0 else named


def _indices(sampler: Any, start: int, size: int, epoch: int) -> Iterator[int]:
    if isinstance(sampler, EpochSampler):
        rank, world_size = sample_rank_and_world_size()
        first = epoch * sampler.length + rank
        return iter(range(first, first + len(sampler) * world_size, world_size)[start : start + size])
    return islice(iter(sampler), start, start + size)


def _described(dataset: Any, index: int) -> str | None:
    if isinstance(dataset, ConcatDataset):
        part = bisect.bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return _described(dataset.datasets[part], index - before)
    describe = getattr(dataset, "describe", None)
    return None if describe is None else str(describe(index))
