import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from perf_vit.data import make_ship_scene
from perf_vit.data.base import EpochSampler
from perf_vit.data.segmentation_tiles import LabelledSource, SegmentationGrid, SegmentationTiles
from perf_vit.labels import open_labels
from perf_vit.sources import open_source
from perf_vit.transforms import Augmentation, Normalizer
from perf_vit.types import IGNORE_INDEX, Window

NORMALIZER = Normalizer((600.0,) * 4, (300.0,) * 4)


@pytest.fixture(scope="module")
def ships(tmp_path_factory):
    scene = make_ship_scene(tmp_path_factory.mktemp("ships"), seed=3, size_px=200, num_targets=12)
    source = open_source(scene.image)
    labels = open_labels(scene.labels, source, classes=["sea", "ship"])
    return LabelledSource(source, labels, source.extent)


def _random(ships, seed: int = 0) -> SegmentationTiles:
    augmentation = Augmentation(flips=True, gain=0.1, offset=0.1)
    return SegmentationTiles(
        [ships], NORMALIZER, augmentation, tile_px=64, tiles_per_epoch=6, seed=seed, scale=(0.7, 1.3)
    )


def test_samples_depend_on_seed_and_index_whatever_the_workers(ships) -> None:
    alone = list(DataLoader(_random(ships), batch_size=None, sampler=EpochSampler(6)))
    workers = DataLoader(_random(ships), batch_size=None, sampler=EpochSampler(6), num_workers=2)
    for sample, other in zip(alone, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(sample, other, strict=True))
    assert not torch.equal(alone[0][0], _random(ships, seed=1)[0][0])
    assert not torch.equal(alone[0][0], alone[1][0])


def test_epochs_go_on_counting() -> None:
    sampler = EpochSampler(6)
    first = list(sampler)
    sampler.set_epoch(2)
    assert first == [0, 1, 2, 3, 4, 5]
    assert list(sampler) == [12, 13, 14, 15, 16, 17]


def test_tiles_are_standardised_and_invalid_pixels_ignored(ships) -> None:
    image, labels = ships.read(Window(-10, 0, 64, 64), NORMALIZER)
    valid = ships.source.read(Window(-10, 0, 64, 64)).valid
    assert (labels[~valid] == IGNORE_INDEX).all()
    assert (image[:, ~valid] == 0).all()
    assert (labels[:10] == IGNORE_INDEX).all()
    assert (labels[valid] != IGNORE_INDEX).all()


@pytest.mark.parametrize("tile_px", [64, 96, 256])
def test_grid_windows_hold_each_labelled_pixel_once(ships, tile_px: int) -> None:
    whole = ships.read(ships.source.extent, NORMALIZER)[1]
    grid = SegmentationGrid(ships, NORMALIZER, tile_px=tile_px)
    counts = [int((grid[i][1] == 1).sum()) for i in range(len(grid))]
    assert sum(counts) == int((whole == 1).sum()) > 0
    kept = [int((grid[i][1] != IGNORE_INDEX).sum()) for i in range(len(grid))]
    assert sum(kept) == int((whole != IGNORE_INDEX).sum())


def test_a_region_keeps_labels_of_the_other_part_out(ships) -> None:
    upper = LabelledSource(ships.source, ships.labels, Window(0, 0, 100, 200))
    _, labels = upper.read(Window(60, 40, 64, 64), NORMALIZER)
    assert (labels[40:] == IGNORE_INDEX).all()
    dataset = SegmentationTiles([upper], NORMALIZER, Augmentation(flips=False), tile_px=64, tiles_per_epoch=50, seed=0)
    rows = [np.flatnonzero((dataset[i][1] != IGNORE_INDEX).any(1)).max() for i in range(20)]
    assert max(rows) <= 63


def test_scene_is_the_same_for_the_same_seed(tmp_path) -> None:
    a, b, c = (make_ship_scene(tmp_path / str(i), seed=s, size_px=128, num_targets=5) for i, s in enumerate((1, 1, 2)))
    assert a.image.read_bytes() == b.image.read_bytes()
    assert a.labels.read_text() == b.labels.read_text()
    assert a.image.read_bytes() != c.image.read_bytes()
    assert 0 < a.num_targets <= 5


def test_tiles_of_several_rasters_come_in_proportion_to_their_size(ships) -> None:
    whole = ships.source.extent
    upper = LabelledSource(ships.source, ships.labels, Window(0, 0, whole.height // 4, whole.width))
    seen = []

    class Watched(SegmentationTiles):
        def _choose(self, rng: np.random.Generator) -> int:
            seen.append(super()._choose(rng))
            return seen[-1]

    options = {"tile_px": 32, "tiles_per_epoch": 200, "seed": 0}
    mixed = Watched([ships, upper], NORMALIZER, Augmentation(flips=False), **options)
    for index in range(200):
        mixed[index]
    # Four fifths of the pixels are the first one's; four standard deviations of a binomial either way.
    assert abs(np.mean(seen) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(seen))
    assert torch.equal(
        mixed[7][0], SegmentationTiles([ships, upper], NORMALIZER, Augmentation(flips=False), **options)[7][0]
    )
