"""Which samples each of several processes gets."""

import pytest

from perf_vit.data import epochs
from perf_vit.data.epochs import ShareSampler


@pytest.mark.parametrize("length", [1, 2, 5, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_validate_on_equally_many_samples_and_each_counts_once(length, world_size, monkeypatch) -> None:
    counted, turns = [], set()
    for rank in range(world_size):
        monkeypatch.setattr(epochs, "process_place", lambda place=(rank, world_size): place)
        sampler = ShareSampler(length)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        assert all(0 <= index < length for index in indices)
        turns.add(len(indices))
        counted += indices[: sampler.num_counted]
    assert turns == {-(-length // world_size)}
    assert sorted(counted) == list(range(length))
