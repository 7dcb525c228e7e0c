"""What a network sees in training of values that are missing in some bands: the mean, whatever is done to a tile."""

import numpy as np
import pytest

from perf_vit.data import (
    AugmentConfig,
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

# Valid values become 1 in both bands.
STATISTICS = {"mean": [500.0, 1000.0], "std": [500.0, 1000.0]}
AUGMENTS = {
    "plain": {"flips": False},
    "flips": {},
    "zoom": {"scale": (0.5, 2.0)},
    "pixel sizes": {"resolution": (1.0, 6.0)},
    "colours": {"gain": 0.3, "offset": 0.5, "shuffle": 0.5},
    "all": {"scale": (0.5, 2.0), "gain": 0.3, "offset": 0.5, "shuffle": 0.5},
}


@pytest.fixture
def image(make_scene):
    """Two bands with holes of their own and holes of both."""
    rng = np.random.default_rng(0)
    pixels = np.empty((2, 120, 120), np.float32)
    pixels[0], pixels[1] = 1000, 2000
    for band in (0, 1, slice(None)):
        for _ in range(25):
            row, col = rng.integers(0, 110, 2)
            pixels[band, row : row + 9, col : col + 9] = -9999
    return make_scene(pixels=pixels, nodata=-9999)


def maps(image, make_scene, augment):
    labels = make_scene(pixels=np.random.default_rng(1).integers(0, 2, (1, 120, 120)).astype(np.uint8), nodata=None)
    region = SegmentationSplitConfig(image=str(image), labels=str(labels))
    config = SegmentationDataConfig(
        train=region, val=region, classes=["a", "b"], tile_px=48, augment=augment, **STATISTICS
    )
    data = build_segmentation_datamodule(config, seed=0)
    return [data.train[index] for index in range(20)]


def objects(image, make_scene, augment):
    table = image.with_suffix(".csv")
    table.write_text(f"image_path,xmin,ymin,xmax,ymax,label\n{image.name},30,40,90,70,ship\n")
    split = DetectionSplitConfig(image=str(image), labels=str(table), label_format="csv")
    config = DetectionDataConfig(train=split, val=split, classes=["ship"], tile_px=48, augment=augment, **STATISTICS)
    data = build_detection_datamodule(config, seed=0)
    return [data.train[index] for index in range(20)]


def scenes(image, make_scene, augment, *, resize):
    folder = image.parent / "scenes"
    for number, name in enumerate("abab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number}.tif").write_bytes(image.read_bytes())
    config = ClassificationDataConfig(
        train=ClassificationSplitConfig(image=str(folder)),
        tile_px=48,
        batch_size=1,
        resize=resize,
        augment=augment,
        **STATISTICS,
    )
    data = build_classification_datamodule(config, seed=0)
    return [data.train[index] for index in range(20)] + [data.val[0]]


def whole_scenes(*args):
    return scenes(*args, resize=True)


def parts_of_scenes(*args):
    return scenes(*args, resize=False)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("make", [maps, objects, whole_scenes, parts_of_scenes])
def test_missing_values_are_the_mean_and_have_no_part_in_their_neighbours(image, make_scene, make, augment) -> None:
    if "resolution" in AUGMENTS[augment] and "scenes" in make.__name__:
        pytest.skip("classifiers take scale, not resolution")
    num_masked = 0
    for pixels, _, valid in make(image, make_scene, AugmentConfig(**AUGMENTS[augment])):
        tile = pixels.numpy()
        assert np.isfinite(tile).all()
        # The mask goes where the pixels go.
        assert np.array_equal(valid.numpy(), (tile != 0).any(0))
        num_masked += not valid.all()
        for band in tile:
            held = band[band != 0]
            # One value for what is valid, whatever colours made of it: nothing lies between it and the mean.
            np.testing.assert_allclose(held, held[0] if held.size else 0, rtol=1e-4, atol=1e-5)
            if "gain" not in AUGMENTS[augment]:
                np.testing.assert_allclose(held, 1, rtol=1e-4)
            assert held.size < band.size
    assert num_masked
