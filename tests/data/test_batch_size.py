"""The size of a step, of each process or of all together."""

import pytest

from perf_vit.data import base
from perf_vit.data.base import EpochDataModule, EpochLoader
from perf_vit.errors import ConfigError


def module(batch_size: int, global_batch_size: int | None) -> EpochDataModule:
    data = EpochDataModule()
    data.batch_size, data.global_batch_size = batch_size, global_batch_size
    return data


@pytest.mark.parametrize(("processes", "expected"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_a_global_batch_is_shared_out_equally(monkeypatch, processes, expected) -> None:
    monkeypatch.setattr(base, "sample_rank_and_world_size", lambda: (0, processes))
    assert module(3, 8).loader_batch_size == expected
    assert module(3, None).loader_batch_size == 3


def test_a_global_batch_that_processes_cannot_share_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(base, "sample_rank_and_world_size", lambda: (0, 3))
    with pytest.raises(ConfigError, match=r"must be a multiple of the 3 processes, got 8; take 9"):
        _ = module(1, 8).loader_batch_size


def test_groups_of_processes_that_share_a_tile_are_not_called_processes(monkeypatch) -> None:
    monkeypatch.setattr(base, "sample_rank_and_world_size", lambda: (0, 3))
    monkeypatch.setattr(base, "rank_and_world_size", lambda: (0, 6))
    with pytest.raises(ConfigError, match=r"must be a multiple of the 3 groups of 2 processes .*, got 8; take 9"):
        _ = module(1, 8).loader_batch_size


@pytest.mark.parametrize(("global_batch_size", "key"), [(None, "data.batch_size"), (8, "data.global_batch_size")])
def test_too_few_samples_for_a_batch_are_refused_with_the_key_that_was_set(global_batch_size, key) -> None:
    data = module(8, global_batch_size)
    with pytest.raises(
        ConfigError, match=rf"^{key}: 1 process has the 5 samples of an epoch, too few for a batch of 8"
    ):
        data.train_loader(EpochLoader(range(5), batch_size=data.loader_batch_size, num_workers=0))
