"""Scores of a detector on images as they come: with holes, and large."""

import numpy as np
import rasterio
from affine import Affine
from command_line import save_detector

from perf_vit.cli.detecting import evaluate_detector
from perf_vit.data import SeenObjects
from perf_vit.io import open_source
from perf_vit.models import DetectorSpec
from perf_vit.transforms import Normalizer
from perf_vit.types import Window

SPEC = DetectorSpec(
    classes=("car",),
    normalizer=Normalizer((100.0,) * 3, (50.0,) * 3),
    tile_px=64,
    label_options={"label_format": "csv"},
)


def write_half_empty(path) -> None:
    """A raster of 96 x 160 px whose columns from 70 on are nodata."""
    pixels = np.random.default_rng(0).integers(1, 255, (3, 96, 160)).astype(np.uint8)
    pixels[:, :, 70:] = 0
    profile = {"driver": "GTiff", "height": 96, "width": 160, "count": 3, "dtype": "uint8", "crs": "EPSG:32636"}
    with rasterio.open(path, "w", transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000), nodata=0, **profile) as file:
        file.write(pixels)


def test_objects_on_no_data_are_not_missed_in_evaluation(tmp_path) -> None:
    write_half_empty(tmp_path / "a.tif")
    rows = ["5,5,20,20", "60,40,80,60", "75,5,90,20", "120,70,140,90"]
    lines = ["image,xmin,ymin,xmax,ymax,label", *(f"a.tif,{row},car" for row in rows)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    checkpoint = save_detector(tmp_path / "last.ckpt", SPEC, head_kwargs={"detections_per_tile": 20})
    report = evaluate_detector(checkpoint, tmp_path / "a.tif", tmp_path / "labels.csv", device="cpu")
    assert report.scores.classes[0].num_objects == 2


def test_an_object_is_seen_once_a_window_shows_a_valid_pixel_of_it(tmp_path) -> None:
    write_half_empty(tmp_path / "a.tif")
    boxes = np.array([[5, 5, 20, 20], [60.2, 40, 80, 60], [69.5, 5, 90, 20], [70, 70, 140, 90]])
    with open_source(tmp_path / "a.tif") as source:
        reader = SeenObjects(source, boxes)
        reader.read(Window(0, 64, 64, 64))
        assert reader.seen.tolist() == [False, True, True, False]
        for row in (0, 32):
            for col in (0, 64, 96):
                reader.read(Window(row, col, 64, 64))
        assert reader.seen.tolist() == [True, True, True, False]
