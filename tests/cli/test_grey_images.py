"""A detector of three bands on grey images."""

import json

import geopandas
import numpy as np
from command_line import call, save_detector
from PIL import Image

from perf_vit.models import DetectionSpec
from perf_vit.transforms import Normalizer

SPEC = DetectionSpec(
    classes=("cell",),
    normalizer=Normalizer((100.0, 90.0, 80.0), (50.0, 40.0, 60.0)),
    tile_px=64,
    label_options={"label_format": "coco"},
)


def test_a_grey_image_is_predicted_and_evaluated_as_three_equal_bands(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90), np.uint8)
    checkpoint = save_detector(tmp_path / "last.ckpt", SPEC, head_kwargs={"detections_per_tile": 20})
    annotation = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [8, 8, 30, 30]}
    scores, found = [], []
    for name, image in (("grey", Image.fromarray(pixels)), ("color", Image.fromarray(pixels).convert("RGB"))):
        folder = tmp_path / name
        folder.mkdir()
        image.save(folder / "a.png")
        listed = [{"id": 0, "file_name": "a.png", "height": 70, "width": 90}]
        content = {"images": listed, "annotations": [annotation], "categories": [{"id": 1, "name": "cell"}]}
        (tmp_path / "labels.json").write_text(json.dumps(content))
        args = ["--checkpoint", checkpoint, "--input", folder / "a.png"]
        out = ["--output", tmp_path / f"{name}.geojson", "--score-threshold", "0"]
        assert call(["predict", *args, *out]) == 0
        labels = ["--labels", tmp_path / "labels.json", "--json", tmp_path / f"{name}_scores.json"]
        assert call(["evaluate", *args, *labels]) == 0
        found.append(geopandas.read_file(tmp_path / f"{name}.geojson"))
        scores.append(json.loads((tmp_path / f"{name}_scores.json").read_text()))
    assert len(found[0])
    assert found[0].equals(found[1])
    assert scores[0] == scores[1]
