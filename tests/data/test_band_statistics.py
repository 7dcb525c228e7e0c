"""Bands are standardised by the statistics that a config gives, or by those of the training rasters."""

import numpy as np
import pytest
from label_cases import write_image

from perf_vit.data import (
    ClassificationDataConfig,
    ClassificationSplitConfig,
    DetectionDataConfig,
    DetectionSplitConfig,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    build_classification_datamodule,
    build_detection_datamodule,
    build_segmentation_datamodule,
)
from perf_vit.errors import ConfigError, DataWarning


@pytest.fixture
def region(make_scene) -> SegmentationSplitConfig:
    labels = make_scene(pixels=np.zeros((1, 70, 90), np.uint8), nodata=None)
    return SegmentationSplitConfig(image=str(make_scene()), labels=str(labels))


def config(region: SegmentationSplitConfig, **options) -> SegmentationDataConfig:
    return SegmentationDataConfig(train=region, val=region, classes=["a", "b"], tile_px=32, **options)


def test_given_statistics_standardise_tiles_and_travel_with_the_model(region) -> None:
    measured = build_segmentation_datamodule(config(region), seed=0)
    given = build_segmentation_datamodule(config(region, mean=[10.0, 20.0, 30.0], std=[2.0, 4.0, 8.0]), seed=0)
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
        build_segmentation_datamodule(config(region, **options), seed=0)


def test_a_given_std_of_rounding_errors_is_1(region) -> None:
    with pytest.warns(DataWarning, match=r"^band 2 \(std 1e-17\).*taken as 1"):
        data = build_segmentation_datamodule(config(region, mean=[10.0, 0.3, 30.0], std=[2.0, 1e-17, 8.0]), seed=0)
    assert data.normalizer.std == (2.0, 1.0, 8.0)


def folders(tmp_path, options) -> ClassificationDataConfig:
    for number in range(6):
        write_image(tmp_path / "scenes" / f"class_{number % 2}" / f"{number}.png", height=40, width=40, seed=number)
    return ClassificationDataConfig(
        train=ClassificationSplitConfig(image=str(tmp_path / "scenes")), tile_px=32, batch_size=2, **options
    )


def objects(tmp_path, options) -> DetectionDataConfig:
    write_image(tmp_path / "objects" / "a.png", height=70, width=90)
    (tmp_path / "objects.csv").write_text("image_path,xmin,ymin,xmax,ymax,label\na.png,3,4,20,30,ship\n")
    split = DetectionSplitConfig(
        image=str(tmp_path / "objects"), labels=str(tmp_path / "objects.csv"), label_format="csv"
    )
    return DetectionDataConfig(train=split, val=split, classes=["ship"], tile_px=32, **options)


@pytest.mark.parametrize(
    ("make", "build"),
    [(folders, build_classification_datamodule), (objects, build_detection_datamodule)],
    ids=["scenes", "objects"],
)
def test_scenes_and_objects_take_given_statistics_too(tmp_path, make, build) -> None:
    statistics = {"mean": [10.0, 20.0, 30.0], "std": [2.0, 4.0, 8.0]}
    given, measured = (build(make(tmp_path, options), seed=0) for options in (statistics, {}))
    assert given.normalizer.to_dict() == statistics
    assert measured.normalizer.to_dict() != statistics
    with pytest.raises(ConfigError, match=r"data\.mean and data\.std"):
        build(make(tmp_path, {"mean": [0.0] * 3}), seed=0)
