"""Few labels in a large scene: each training and validation tile holds some of them."""

import geopandas
import numpy as np
import pytest
import rasterio
from affine import Affine
from shapely.geometry import box

from perf_vit.data import AugmentConfig, SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.types import IGNORE_INDEX

SIDE_PX = 800


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> SegmentationSplitConfig:
    """Two labelled patches, of 1 and 2 % of the scene."""
    folder = tmp_path_factory.mktemp("sparse")
    pixels = np.random.default_rng(0).integers(1, 255, (3, SIDE_PX, SIDE_PX)).astype(np.uint8)
    profile = {"driver": "GTiff", "count": 3, "height": SIDE_PX, "width": SIDE_PX, "dtype": "uint8"}
    place = {"crs": "EPSG:32622", "transform": Affine(1, 0, 0, 0, -1, SIDE_PX)}
    with rasterio.open(folder / "scene.tif", "w", **profile, **place) as dataset:
        dataset.write(pixels)
    shapes = [box(100, 100, 180, 180), box(600, 500, 700, 600)]
    table = geopandas.GeoDataFrame({"kind": ["a", "b"]}, geometry=shapes, crs="EPSG:32622")
    table.to_file(folder / "labels.geojson", driver="GeoJSON")
    return SegmentationSplitConfig(image=str(folder / "scene.tif"), labels=str(folder / "labels.geojson"))


def data_of(scene, **options):
    keys = {"classes": ["a", "b"], "attribute": "kind", "background": "ignore", "tile_px": 64, "tiles_per_epoch": 40}
    return build_segmentation_datamodule(SegmentationDataConfig(train=scene, val=scene, **keys, **options), seed=0)


@pytest.mark.parametrize("sampler", ["random", "balanced", "grid"])
@pytest.mark.parametrize("augment", [{}, {"scale": (0.5, 2.0)}])
def test_every_training_tile_has_a_label(scene, sampler, augment) -> None:
    train = data_of(scene, sampler=sampler, augment=AugmentConfig(**augment)).train
    tiles = [train[index][1] for index in range(60)]
    assert all((labels != IGNORE_INDEX).any() for labels in tiles)
    assert {0, 1} <= {int(value) for labels in tiles for value in np.unique(labels)}


def test_random_tiles_are_drawn_as_often_in_each_place_with_labels(scene) -> None:
    train = data_of(scene, augment=AugmentConfig(flips=False)).train
    shares = np.mean([[bool((train[index][1] == k).any()) for k in (0, 1)] for index in range(400)], axis=0)
    assert shares == pytest.approx([0.5, 0.5], abs=4 * 0.5 / 20)


def test_validation_leaves_out_tiles_without_labels_and_keeps_each_labelled_pixel(scene) -> None:
    val = data_of(scene).val
    tiles = [val[index][1] for index in range(len(val))]
    assert len(tiles) < (SIDE_PX // 64) ** 2 / 8
    assert all((labels != IGNORE_INDEX).any() for labels in tiles)
    assert [sum(int((labels == k).sum()) for labels in tiles) for k in (0, 1)] == [80**2, 100**2]
