"""Targets of whole images, such as counts, belong to tiles that hold the whole image."""

import numpy as np
import pytest
from PIL import Image

from perf_vit.data import (
    AugmentConfig,
    ClassificationDataConfig,
    ClassificationSplitConfig,
    RegressionDataConfig,
    build_classification_datamodule,
)
from perf_vit.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> ClassificationSplitConfig:
    """Images with as many white dots on grey as their target says, and a table of classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = ["image,dots,label"]
    for number in range(6):
        pixels = np.full((48, 40, 3), 100, np.uint8)
        places = rng.permutation(8 * 6)[: number + 1]
        for row, col in zip(*np.divmod(places, 6), strict=True):
            pixels[6 * row + 1 : 6 * row + 4, 6 * col + 1 : 6 * col + 4] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{number + 1},{'ab'[number % 2]}")
    (folder / "dots.csv").write_text("\n".join(rows) + "\n")
    return ClassificationSplitConfig(image=str(folder), labels=str(folder / "dots.csv"))


def regression(photos, **keys):
    given = {"targets": ["dots"], "batch_size": 2, "mean": [100.0] * 3, "std": [100.0] * 3, **keys}
    return build_classification_datamodule(RegressionDataConfig(train=photos, val=photos, **given), seed=0)


def white_share(tile) -> float:
    return float((tile[0].numpy() > 0.5).mean())


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_a_tile_holds_all_that_its_image_counts(photos, scale) -> None:
    train = regression(photos, tile_px=96, augment=AugmentConfig(scale=scale)).train
    for index in range(30):
        tile, target, valid = train[index]
        # Of the image's own pixels, 9 are a dot; the rest of the tile is padding.
        dots = white_share(tile) * 96**2 / (valid.numpy().sum() / (48 * 40)) / 9
        assert dots == pytest.approx(float(target[0]), rel=0.35)


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_larger_than_its_tile_is_refused_unless_crops_have_its_target(photos, part) -> None:
    with pytest.raises(InputError, match=r"0\.png has 48 x 40 px, more than the tile of 32 px .* data\.crop=true"):
        regression(photos, tile_px=32)
    data = regression(photos, tile_px=32, crop=True)
    assert getattr(data, part)[0][0].shape == (3, 32, 32)
    assert regression(photos, tile_px=32, resize=True).train[0][0].shape == (3, 32, 32)


def test_a_zoom_that_cuts_whole_images_is_refused(photos) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.augment\.scale up to 2 cuts images whose targets are those of the whole"
    ):
        regression(photos, tile_px=32, resize=True, augment=AugmentConfig(scale=(0.5, 2.0)))


@pytest.mark.parametrize("resize", [False, True])
def test_zoomed_tiles_of_classes_have_no_black_border(photos, resize) -> None:
    keys = {"tile_px": 32, "resize": resize, "batch_size": 2, "augment": AugmentConfig(scale=(0.5, 2.0))}
    data = build_classification_datamodule(ClassificationDataConfig(train=photos, val=photos, **keys), seed=0)
    tiles = [data.train[index] for index in range(30)]
    assert all(valid.all() for _, _, valid in tiles)
    assert len({round(white_share(tile), 3) for tile, _, _ in tiles}) > 6
