"""Which samples each of several processes gets, and what the processes that load them may use."""

import cv2
import numpy as np
import pytest
import torch
from rasterio.env import get_gdal_config
from torch.utils.data import Dataset

from perf_vit.data import base as epochs
from perf_vit.data.base import EpochDataModule, EpochLoader, ShareLoader, ShareSampler
from perf_vit.errors import ConfigError


@pytest.mark.parametrize("length", [1, 2, 5, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_validate_on_equally_many_samples_and_each_counts_once(length, world_size, monkeypatch) -> None:
    counted, turns = [], set()
    for rank in range(world_size):
        monkeypatch.setattr(epochs, "sample_rank_and_world_size", lambda place=(rank, world_size): place)
        sampler = ShareSampler(length)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        assert all(0 <= index < length for index in indices)
        turns.add(len(indices))
        counted += indices[: sampler.num_counted]
    assert turns == {-(-length // world_size)}
    assert sorted(counted) == list(range(length))


def test_too_few_samples_for_a_batch_of_each_process_are_refused(monkeypatch) -> None:
    data = EpochDataModule()
    assert len(data.train_loader(EpochLoader(range(100), batch_size=16, num_workers=0))) == 6
    monkeypatch.setattr(epochs, "sample_rank_and_world_size", lambda: (0, 8))
    with pytest.raises(ConfigError, match="8 processes share the 100 samples of an epoch, too few for a batch of 16"):
        data.train_loader(EpochLoader(range(100), batch_size=16, num_workers=0))


class _Threads(Dataset):
    """Samples that say how many threads torch, OpenCV and GDAL use where they are loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int, str | None]:
        return torch.get_num_threads(), cv2.getNumThreads(), get_gdal_config("GDAL_NUM_THREADS", normalize=False)


@pytest.mark.parametrize("loader", [EpochLoader, ShareLoader])
def test_a_loader_process_computes_in_one_thread(loader, monkeypatch) -> None:
    monkeypatch.delenv("GDAL_NUM_THREADS", raising=False)
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    # Its threads run here, and don't in a forked process.
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 9)
    try:
        batches = list(loader(_Threads(), batch_size=2, num_workers=2, collate_fn=list))
    finally:
        cv2.setNumThreads(before)
    assert batches == [[(1, 1, "1")] * 2] * 2
    assert cv2.getNumThreads() == before
