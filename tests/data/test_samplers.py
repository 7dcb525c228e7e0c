"""Places of training tiles: around pixels of each class alike, and tile by tile of a grid."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from torch.utils.data import DataLoader

from perf_vit.data import AugmentConfig, SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.data.base import EpochSampler
from perf_vit.data.class_pixels import find_class_pixels
from perf_vit.data.samplers import ClassSampler, GridSampler
from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.errors import ConfigError, DataWarning
from perf_vit.labels import open_labels
from perf_vit.sources import open_raster
from perf_vit.types import IGNORE_INDEX, Window

CLASSES = ["land", "water", "pond"]
PLACE = Affine(2, 0, 650_010, 0, -2, 9_480_000)


def write_raster(path, bands: np.ndarray, nodata: float | None = None) -> str:
    profile = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    with rasterio.open(
        path, "w", crs="EPSG:32622", transform=PLACE, dtype=bands.dtype, nodata=nodata, **profile
    ) as dataset:
        dataset.write(bands)
    return str(path)


def write_scene(folder, name: str, labels: np.ndarray, *, seed: int = 0) -> SegmentationSplitConfig:
    """Labels [(K,) h, w] over an image of noise whose last five columns are nodata."""
    height, width = labels.shape[-2:]
    pixels = np.random.default_rng(seed).integers(1, 200, (3, height, width)).astype(np.uint8)
    pixels[..., -5:] = 0
    image = write_raster(folder / f"{name}.tif", pixels, nodata=0)
    return SegmentationSplitConfig(
        image=image, labels=write_raster(folder / f"{name}_labels.tif", np.atleast_3d(labels.T).T)
    )


@pytest.fixture
def ponds(tmp_path) -> SegmentationSplitConfig:
    """Land and water, a pond of 2 x 2 px, and another where the image holds nothing."""
    labels = np.zeros((203, 197), np.uint8)
    labels[:, 150:] = 1
    labels[40:42, 30:32] = 2
    labels[100:110, 193:] = 2
    labels[:20] = 9
    return write_scene(tmp_path, "ponds", labels)


def config(train: SegmentationSplitConfig, **options) -> SegmentationDataConfig:
    given = {"classes": CLASSES, "ignore_values": [9], "tile_px": 32, "tiles_per_epoch": 60}
    return SegmentationDataConfig(train=train, val=train, **{**given, **options})


def windows_of(dataset, indices) -> list[tuple[int, Window]]:
    """The windows that items are cut from, as the dataset draws them."""
    drawn = []
    draw = dataset.sampler.draw

    def watched(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    dataset.sampler.draw = watched
    for index in indices:
        dataset[index]
    del dataset.sampler.draw
    return drawn


def labelled(region: SegmentationSplitConfig, window: Window | None = None) -> LabelledSource:
    source = open_raster(region.image)
    labels = open_labels(region.labels, source, classes=CLASSES, ignore_values=[9])
    return LabelledSource(source, labels, window or source.extent)


def test_a_class_of_four_pixels_is_in_as_many_tiles_as_any(ponds) -> None:
    data = build_segmentation_datamodule(config(ponds, sampler="balanced", augment=AugmentConfig(flips=False)), seed=0)
    tiles = [data.train[index][1] for index in range(300)]
    assert all((labels != IGNORE_INDEX).any() for labels in tiles)
    with_pond = np.mean([bool((labels == 2).any()) for labels in tiles])
    # A third of the tiles is drawn for the pond; others hold it by chance.
    assert abs(with_pond - 1 / 3) < 4 * math.sqrt(2 / 9 / 300) + 0.05
    random = build_segmentation_datamodule(config(ponds), seed=0)
    assert np.mean([bool((random.train[index][1] == 2).any()) for index in range(300)]) < 0.1


def test_the_pixel_drawn_lies_anywhere_in_its_tile(ponds) -> None:
    region = labelled(ponds, Window(25, 10, 120, 150))
    pixels = find_class_pixels([region], 3)
    assert sorted(pixels[2].tolist()) == [[0, r, c] for r in (40, 41) for c in (30, 31)]
    sampler = ClassSampler([region.region], [pixels[2]])
    drawn = [sampler.draw(0, np.random.default_rng(seed), lambda source: 16)[1] for seed in range(400)]
    for window in drawn:
        assert window.intersect(region.region) == window
        assert window.intersect(Window(40, 30, 2, 2)) is not None
    # The first row of the region is 25, the pond's last is 41.
    assert {window.row for window in drawn} == set(range(25, 42))
    assert {window.col for window in drawn} == set(range(15, 32))


def test_pixels_of_a_class_are_a_uniform_sample_of_those_training_can_see(ponds) -> None:
    region = labelled(ponds)
    truth = region.read_labels(region.region)
    for window_px in (32, 64, 512):
        pixels = find_class_pixels([region, region], 3, max_pixels=500, window_px=window_px)
        assert [len(each) for each in pixels] == [500, 500, 8]
        for number, each in enumerate(pixels):
            assert (truth[each[:, 1], each[:, 2]] == number).all()
            assert len(np.unique(each, axis=0)) == len(each)
        # Of 500 of either source 250 are expected, and as many of the upper half of the rows.
        assert abs((pixels[0][:, 0] == 0).sum() - 250) < 4 * math.sqrt(125)
        middle = np.median(np.nonzero(truth == 0)[0])
        assert abs((pixels[0][:, 1] <= middle).sum() - 250) < 4 * math.sqrt(125) + 5
    again, other = (find_class_pixels([region], 3, max_pixels=500, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again[0], find_class_pixels([region], 3, max_pixels=500)[0])
    assert not np.array_equal(again[0], other[0])


def test_progress_counts_windows(ponds) -> None:
    told = []
    find_class_pixels([labelled(ponds)], 3, window_px=100, on_window=lambda *given: told.append(given))
    assert told == [(done, 6) for done in range(1, 7)]


def test_classes_that_do_not_exclude_each_other_come_alike_with_none_of_them(tmp_path) -> None:
    layers = np.zeros((2, 160, 160), np.uint8)
    layers[0, 5:8, 5:8] = 1
    layers[1, 6:9, 100:150] = 1
    layers[:, 120:] = 7
    region = write_scene(tmp_path, "layers", layers)
    options = {"classes": ["a", "b"], "multilabel": True, "ignore_values": [7], "sampler": "balanced"}
    data = build_segmentation_datamodule(config(region, **options), seed=0)
    a, b, none = data.train.sampler.groups
    assert len(a) == 9
    assert len(b) == 150
    assert none[:, 1].max() < 120
    assert not layers[:, none[:, 1], none[:, 2]].any()
    tiles = [data.train[index][1] for index in range(90)]
    assert 20 <= sum(bool((labels[0] == 1).any()) for labels in tiles) <= 50


def test_tiles_of_further_rasters_vector_labels_and_other_resolutions_hold_their_pixel(tmp_path, ponds) -> None:
    square = [PLACE @ corner for corner in ((60, 70), (63, 70), (63, 73), (60, 73), (60, 70))]
    feature = {
        "type": "Feature",
        "properties": {"kind": "pond"},
        "geometry": {"type": "Polygon", "coordinates": [square]},
    }
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32622"}}
    path = tmp_path / "more.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": [feature]}))
    more = replace(write_scene(tmp_path, "more", np.zeros((90, 99), np.uint8)), labels=str(path))
    options = {"extra_train": [ponds], "attribute": "kind", "background": "land", "sampler": "balanced"}
    augment = AugmentConfig(flips=False, resolution=(1.0, 4.0))
    data = build_segmentation_datamodule(config(more, augment=augment, **options), seed=0)
    ponds_of = {(source, row, col) for source, row, col in data.train.sampler.groups[2].tolist()}
    assert ponds_of == {(1, r, c) for r in (40, 41) for c in (30, 31)} | {
        (0, r, c) for r in (70, 71, 72) for c in (60, 61, 62)
    }
    drawn = windows_of(data.train, range(40))
    assert {source for source, _ in drawn} == {0, 1}
    assert len({window.height for _, window in drawn}) > 5
    for source, window in drawn:
        region = data.train.sources[source].region
        assert window.intersect(region).shape == (min(window.height, region.height), min(window.width, region.width))


@pytest.mark.parametrize("sampler", ["balanced", "grid"])
def test_tiles_are_functions_of_seed_and_index_whatever_the_workers(ponds, sampler) -> None:
    def train(seed: int):
        augment = AugmentConfig(flips=True, gain=0.1, scale=(0.8, 1.2))
        return build_segmentation_datamodule(config(ponds, sampler=sampler, augment=augment), seed=seed).train

    alone = list(DataLoader(train(0), batch_size=None, sampler=EpochSampler(60)))
    with_workers = DataLoader(train(0), batch_size=None, sampler=EpochSampler(60), num_workers=2)
    for sample, other in zip(alone, with_workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(sample, other, strict=True))
    dataset = train(0)
    assert all(torch.equal(dataset[index][0], alone[index][0]) for index in (59, 3, 17))
    assert not torch.equal(train(1)[0][0], alone[0][0])


def test_a_grid_gives_every_tile_once_an_epoch_in_another_order_each(ponds, tmp_path) -> None:
    more = write_scene(tmp_path, "small", np.zeros((20, 70), np.uint8))
    region = replace(ponds, region=[10, 20, 100, 65])
    data = build_segmentation_datamodule(
        config(region, extra_train=[more], sampler="grid", tiles_per_epoch=0, batch_size=5), seed=0
    )
    assert len(data.train) == 4 * 3 + 3
    loader = data.train_dataloader()
    assert sum(len(batch[0]) for batch in loader) == 15
    epochs = [windows_of(data.train, range(start, start + 15)) for start in (0, 15)]
    expected = [(0, Window(r, c, 32, 32)) for r in (10, 42, 74, 78) for c in (20, 52, 53)]
    expected += [(1, Window(0, col, 32, 32)) for col in (0, 32, 38)]
    for epoch in epochs:
        assert sorted(epoch, key=repr) == sorted(expected, key=repr)
    assert epochs[0] != epochs[1]
    assert (
        windows_of(
            build_segmentation_datamodule(config(region, extra_train=[more], sampler="grid"), seed=1).train, range(15)
        )
        != (epochs[0])
    )


def test_the_rest_of_a_grid_is_a_smaller_batch(ponds) -> None:
    data = build_segmentation_datamodule(config(ponds, sampler="grid", batch_size=8), seed=0)
    batches = [len(images) for images, *_ in data.train_dataloader()]
    assert sum(batches) == len(data.train) == 49
    assert batches[-1] == 1


def test_tiles_of_a_grid_lie_around_its_middle_at_other_resolutions(ponds) -> None:
    augment = AugmentConfig(flips=False, resolution=(2.0, 8.0))
    data = build_segmentation_datamodule(config(ponds, sampler="grid", augment=augment), seed=0)
    # Tiles of 4 m, the middle between 2 and 8, are 64 px of 2 m.
    assert len(data.train) == 4 * 4
    assert all(tile.height == 64 for _, tile in data.train.sampler.tiles)
    sampler = GridSampler([Window(5, 5, 100, 100)], [40], seed=0)
    for index in range(len(sampler)):
        _, small = sampler.draw(index, np.random.default_rng(0), lambda source: 20)
        _, large = sampler.draw(index, np.random.default_rng(0), lambda source: 60)
        assert large.intersect(small) == small
        assert large.intersect(Window(5, 5, 100, 100)) == large


def test_unknown_samplers_are_refused_and_absent_classes_told(ponds, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sampler must be one of random, balanced, grid, got even"):
        build_segmentation_datamodule(config(ponds, sampler="even"), seed=0)
    bare = write_scene(tmp_path, "bare", np.zeros((64, 64), np.uint8))
    with pytest.warns(DataWarning, match=r"2 of 3 classes have no pixel among all labelled ones of data.train: water"):
        data = build_segmentation_datamodule(config(bare, sampler="balanced"), seed=0)
    assert data.train[0][1].unique().tolist() in ([0], [0, IGNORE_INDEX])


def test_absent_classes_that_do_not_exclude_each_other_are_told(tmp_path) -> None:
    layers = np.zeros((2, 64, 64), np.uint8)
    layers[0, :9] = 1
    region = write_scene(tmp_path, "layers", layers)
    with pytest.warns(DataWarning, match=r"1 of 2 classes have no pixel among 3,776 labelled ones of data.val .*: b$"):
        build_segmentation_datamodule(config(region, classes=["a", "b"], multilabel=True), seed=0)
    none = write_scene(tmp_path, "none", np.zeros((1, 64, 64), np.uint8))
    with pytest.warns(DataWarning, match="1 of 1 classes have no pixel"):
        build_segmentation_datamodule(config(none, classes=["a"], multilabel=True), seed=0)
