"""QuPath's annotations of slides, in pixels of level 0, at the size that slides are read at."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from synthetic_slide import make_slide

from perf_vit.data import (
    DetectionDataConfig,
    DetectionSplitConfig,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    build_detection_datamodule,
    build_segmentation_datamodule,
)
from perf_vit.errors import ConfigError, InputError
from perf_vit.labels import open_labels
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import open_source
from perf_vit.types import IGNORE_INDEX, Window

# In pixels of level 0, x and y of the corners.
TUMOUR = (80, 40, 240, 120)
STROMA = (300, 160, 380, 320)


def feature(box: tuple[int, int, int, int], name: str) -> dict:
    left, top, right, bottom = box
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": name, "color": [200, 0, 0]}},
    }


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("annotated")
    features = [feature(TUMOUR, "Tumor"), feature(STROMA, "Stroma")]
    (root / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return make_slide(root / "a.svs", 400, 480, mpp=0.5, tile_px=64, tissue_share=1.0)


@pytest.mark.parametrize(("mpp", "scale"), [(0.5, 1), (1.0, 2), (2.0, 4)])
def test_masks_of_annotations_lie_where_they_were_drawn_at_any_mpp(slide, mpp, scale) -> None:
    source = open_source(slide, mpp=mpp)
    labels = open_labels(
        slide.with_suffix(".geojson"), source, attribute="classification", classes=["none", "Tumor", "Stroma"]
    ).read(source.extent)
    expected = np.zeros(source.size, np.uint8)
    for index, (left, top, right, bottom) in enumerate((TUMOUR, STROMA), 1):
        expected[top // scale : bottom // scale, left // scale : right // scale] = index
    assert np.array_equal(labels, expected)


def test_labels_beside_a_slide_and_mask_rasters_of_slides_are_refused(slide, tmp_path) -> None:
    source = open_source(slide, mpp=1.0)
    far = tmp_path / "far.geojson"
    far.write_text(json.dumps({"type": "FeatureCollection", "features": [feature((900, 0, 950, 20), "Tumor")]}))
    with pytest.raises(InputError, match=r"don't overlap .*pixels of level 0"):
        open_labels(far, source, attribute="classification", classes=["none", "Tumor"])
    with pytest.raises(InputError, match="must be polygons"):
        open_labels(slide, source, classes=["none", "Tumor"])


def config(slide: Path, **options) -> SegmentationDataConfig:
    region = SegmentationSplitConfig(image=str(slide), labels=str(slide.with_suffix(".geojson")))
    given = {"mpp": 1.0, "background": "ignore", "attribute": "classification", **options}
    return SegmentationDataConfig(
        train=region, val=region, classes=["Tumor", "Stroma"], tile_px=64, tiles_per_epoch=8, batch_size=2, **given
    )


def test_segmentation_trains_on_windows_of_a_slide(slide) -> None:
    data = build_segmentation_datamodule(config(slide), seed=0)
    tiles = [data.val[index] for index in range(len(data.val))]
    assert tiles[0][0].shape == (3, 64, 64)
    counts = np.sum([np.bincount(labels.flatten(), minlength=256) for _, labels, _ in tiles], axis=0)
    assert counts[0] == 80 * 40
    assert counts[1] == 40 * 80
    assert counts[:2].sum() + counts[IGNORE_INDEX] == counts.sum()


def test_balanced_tiles_of_a_slide_hold_its_annotations(slide) -> None:
    data = build_segmentation_datamodule(config(slide, sampler="balanced"), seed=0)
    assert all(bool((data.train[index][1] != IGNORE_INDEX).any()) for index in range(20))
    tumour, stroma = data.train.sampler.groups
    assert (len(tumour), len(stroma)) == (80 * 40, 40 * 80)
    assert stroma.min(0).tolist() == [0, 80, 150]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mpp": None, "tissue": "otsu"}, "need data.mpp"),
        ({"resolution": 2.0}, "leave one out"),
    ],
)
def test_options_of_slides_and_rasters_dont_mix(slide, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmentation_datamodule(config(slide, **options), seed=0)


@pytest.mark.parametrize(("mpp", "scale"), [(None, 1), (0.5, 1), (1.0, 2), (2.0, 4)])
def test_objects_of_slides_are_in_pixels_of_the_size_that_is_read(slide, mpp, scale) -> None:
    options = {} if mpp is None else {"mpp": mpp}
    (record,) = read_object_labels(
        slide.parent,
        slide.parent,
        label_format="polygons",
        classes=["Tumor", "Stroma"],
        attribute="classification",
        open_input=partial(open_source, **options),
    )
    assert (record.height, record.width) == (400 // scale, 480 // scale)
    assert record.boxes_xyxy.tolist() == [[side / scale for side in TUMOUR], [side / scale for side in STROMA]]
    window = Window(0, 0, record.height, record.width)
    masks = record.masks.read(np.arange(2), window)
    assert masks[0].sum() == 160 * 80 / scale**2


def test_detectors_train_on_tiles_at_the_mpp_of_the_config(slide) -> None:
    split = DetectionSplitConfig(image=str(slide), labels=str(slide.with_suffix(".geojson")), label_format="polygons")
    given = {"classes": ["Tumor", "Stroma"], "attribute": "classification", "tile_px": 128, "tiles_per_epoch": 4}
    data = build_detection_datamodule(DetectionDataConfig(train=split, val=split, mpp=2.0, **given), seed=0)
    tile, objects, _ = data.val[0]
    assert tile.shape == (3, 128, 128)
    assert objects.boxes_xyxy.tolist() == [[20, 10, 60, 30], [75, 40, 95, 80]]
    # The pixels are those of the slide at this size.
    source = open_source(slide, mpp=2.0)
    expected = data.normalizer(source.read(Window(0, 0, 128, 128)))
    assert np.array_equal(tile.numpy(), expected)
