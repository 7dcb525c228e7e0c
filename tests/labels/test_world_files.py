"""Labels in the coordinates of a world file lie where it places them."""

import json

import numpy as np
import pytest
from PIL import Image

from perf_vit.data import SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.errors import DataWarning, InputError
from perf_vit.labels.objects import read_object_labels

SIZE = 64


def _folders(tmp_path, corner_xy, box):
    """An image of half-metre pixels by its world file, and a box of labels in any coordinates."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    x, y = corner_xy
    (tmp_path / "images" / "a.pgw").write_text(f"0.5\n0\n0\n-0.5\n{x + 0.25}\n{y - 0.25}\n")
    left, bottom, right, top = box
    ring = [[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]]
    shape = {"type": "Feature", "properties": {"class": "t"}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (tmp_path / "labels" / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [shape]}))
    return tmp_path / "images", tmp_path / "labels"


# Columns 10 to 30 and rows 20 to 40.
CASES = {
    "metres": ((1000, 2000), (1005, 1980, 1015, 1990)),
    "pixels": ((1000, 2000), (10, 20, 30, 40)),
    "metres near 0": ((0, 32), (5, 12, 15, 22)),
}


@pytest.mark.filterwarnings("ignore::perf_vit.errors.DataWarning")
@pytest.mark.parametrize("case", CASES)
def test_polygons_are_placed_by_the_world_file_or_in_pixels(tmp_path, case) -> None:
    images, labels = _folders(tmp_path, *CASES[case])
    index = read_object_labels(labels, images, label_format="polygons", classes=["t"])
    assert index.records[0].boxes_xyxy.tolist() == [[10, 20, 30, 40]]
    region = SegmentationSplitConfig(image=str(images), labels=str(labels))
    config = SegmentationDataConfig(train=region, val=region, classes=["sea", "t"], background="sea", tile_px=SIZE)
    _, mask, _ = build_segmentation_datamodule(config, seed=0).val[0]
    expected = np.zeros((SIZE, SIZE), np.int64)
    expected[20:40, 10:30] = 1
    assert np.array_equal(mask.numpy(), expected)


def test_labels_that_fit_both_are_told_once(tmp_path) -> None:
    images, labels = _folders(tmp_path, *CASES["metres near 0"])
    with pytest.warns(DataWarning, match=r"both in pixels and on the grid of its transform without CRS"):
        read_object_labels(labels, images, label_format="polygons", classes=["t"])


def test_labels_of_a_mask_that_lie_on_neither_are_refused(tmp_path) -> None:
    images, labels = _folders(tmp_path, (1000, 2000), (5000, 5000, 5010, 5010))
    region = SegmentationSplitConfig(image=str(images), labels=str(labels))
    config = SegmentationDataConfig(train=region, val=region, classes=["sea", "t"], background="sea", tile_px=SIZE)
    with pytest.raises(InputError, match="don't overlap"):
        build_segmentation_datamodule(config, seed=0)
