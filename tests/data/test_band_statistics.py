"""Bands are standardised by the statistics that a config gives, or by those of the training rasters."""

import numpy as np
import pytest

from perf_vit.data import DataConfig, RegionConfig, build_datamodule
from perf_vit.errors import ConfigError


@pytest.fixture
def region(make_scene) -> RegionConfig:
    labels = make_scene(pixels=np.zeros((1, 70, 90), np.uint8), nodata=None)
    return RegionConfig(image=str(make_scene()), labels=str(labels))


def config(region: RegionConfig, **options) -> DataConfig:
    return DataConfig(train=region, val=region, classes=["a", "b"], tile_px=32, **options)


def test_given_statistics_standardise_tiles_and_travel_with_the_model(region) -> None:
    measured = build_datamodule(config(region), seed=0)
    given = build_datamodule(config(region, mean=[10.0, 20.0, 30.0], std=[2.0, 4.0, 8.0]), seed=0)
    assert given.normalizer.to_dict() == {"mean": [10.0, 20.0, 30.0], "std": [2.0, 4.0, 8.0]}
    ours, theirs = (data.val[-1 % len(data.val)][0].numpy() for data in (given, measured))
    mean, std = (np.array(each)[:, None, None] for each in (measured.normalizer.mean, measured.normalizer.std))
    pixels = theirs * std + mean
    expected = (pixels - np.array([10, 20, 30])[:, None, None]) / np.array([2, 4, 8])[:, None, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": [0.0] * 3},
        {"mean": [0.0] * 2, "std": [1.0] * 2},
        {"mean": [0.0] * 3, "std": [1.0, 0.0, 1.0]},
    ],
)
def test_statistics_that_do_not_fit_the_bands_are_refused(region, options) -> None:
    with pytest.raises(ConfigError, match=r"data\.mean and data\.std"):
        build_datamodule(config(region, **options), seed=0)
