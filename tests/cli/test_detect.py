"""Train, evaluate and predict objects through the real entry point."""

import csv
import json
import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import call
from PIL import Image

from perf_vit.config import load_config
from perf_vit.models import Detector, load_detector
from perf_vit.workflows.run_config import DetectionRun

TRANSFORM = Affine(0.2, 0, 500_000, 0, -0.3, 4_000_000)
CONFIG = """
out: ???
task: detection
data:
  train: {image: "???", labels: "???"}
  classes: [car, bus]
  tile_px: 64
  tiles_per_epoch: 32
  batch_size: 4
  val_share: 0.25
model:
  backbone: test_resnet
  strides: [4, 8]
  channels: 64
  head: fcos
  head_kwargs: {num_convs: 1, detections_per_tile: 100}
optim: {lr: 0.005}
trainer: {max_epochs: 6, accelerator: cpu, val_every_epochs: 9, report: false}
"""


def make_streets(folder: Path) -> tuple[Path, Path]:
    """Four rasters of 4 bands with bright cars of 6 x 6 px and buses of 6 x 16 px, and their COCO file."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        pixels = rng.normal(100, 10, (4, 90, 140)).astype(np.float32)
        for place in range(12):
            kind, row, col = place % 2, 6 + 28 * (place // 4), 8 + 33 * (place % 4)
            width = 16 if kind else 6
            pixels[kind : kind + 2, row : row + 6, col : col + width] += 120
            box = [col, row, width, 6]
            annotations.append({"id": len(annotations), "image_id": number, "category_id": kind, "bbox": box})
        profile = {"driver": "GTiff", "height": 90, "width": 140, "count": 4, "dtype": "float32", "crs": "EPSG:32636"}
        with rasterio.open(folder / "images" / f"{number}.tif", "w", transform=TRANSFORM, **profile) as file:
            file.write(pixels)
        images.append({"id": number, "file_name": f"{number}.tif", "height": 90, "width": 140})
    categories = [{"id": 0, "name": "car"}, {"id": 1, "name": "bus"}]
    labels = folder / "labels.json"
    labels.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder / "images", labels


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("detection")
    images, labels = make_streets(root)
    (root / "cars.yaml").write_text(CONFIG)
    files = [f"data.train.image={images}", f"data.train.labels={labels}", f"out={root / 'run'}"]
    assert call(["train", str(root / "cars.yaml"), *files]) == 0
    return images, labels, root / "run"


def test_the_run_folder_holds_config_checkpoints_metrics_and_curve(run) -> None:
    folder = run[2]
    assert load_config(folder / "config.yaml", DetectionRun).model.head == "fcos"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    last = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    assert {"train/loss", "train/box", "val/ap", "val/ap50", "val/ap50/car", "val/ap_very_tiny"} <= set(last)
    assert Image.open(folder / "loss_curve.png").size[0] > 500
    spec = load_detector(folder / "checkpoints" / "best.ckpt").spec
    assert spec.classes == ("car", "bus")
    assert spec.score_threshold != 0.5
    assert spec.label_options["label_format"] == "coco"
    assert spec.category_ids == (0, 1)


def test_evaluation_prints_classes_and_writes_scores_and_curves(run, tmp_path, capsys) -> None:
    images, labels, folder = run
    checkpoint = folder / "checkpoints" / "best.ckpt"
    report = tmp_path / "scores.json"
    args = ["--checkpoint", checkpoint, "--input", images, "--labels", labels, "--json", report]
    assert call(["evaluate", *args]) == 0
    shown = capsys.readouterr().out
    assert "bus" in shown
    assert "very tiny" in shown
    scores = json.loads(report.read_text())
    assert [each["num_objects"] for each in scores["classes"]] == [24, 24]
    assert scores["ap50"] > 0.3
    assert Image.open(report.with_suffix(".png")).size[0] > 300
    assert scores["confusion"]["classes"] == ["car", "bus", "background"]
    assert [sum(row) for row in scores["confusion"]["matrix"][:2]] == [24, 24]
    assert scores["froc"]["classes"]["car"]["sensitivity"][-1] > 0.3
    assert "sensitivity by false positives an image" in shown
    assert Image.open(tmp_path / "scores_confusion.png").size[0] > 300


def test_evaluation_of_a_list_scores_its_images_alone(run, tmp_path, capsys) -> None:
    images, labels, folder = run
    names, report = tmp_path / "names.txt", tmp_path / "scores.json"
    names.write_text("2.tif\n0\n")
    args = ["--checkpoint", folder / "checkpoints" / "best.ckpt", "--input", images, "--labels", labels]
    assert call(["evaluate", *args, "--names", names, "--json", report]) == 0
    assert [each["num_objects"] for each in json.loads(report.read_text())["classes"]] == [12, 12]
    assert call(["evaluate", *args, "--names", tmp_path / "nothing.txt"]) == 2
    assert "can't read names" in capsys.readouterr().err
    assert call(["evaluate", *args, "--flips"]) == 2
    assert "--flips is not for an object detector" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".json"])
def test_prediction_writes_the_objects_where_they_lie(run, tmp_path, suffix) -> None:
    images, _, folder = run
    checkpoint, out = folder / "checkpoints" / "best.ckpt", tmp_path / f"cars{suffix}"
    args = ["--checkpoint", checkpoint, "--input", images / "0.tif", "--output", out, "--score-threshold", "0.1"]
    assert call(["predict", *args]) == 0
    if suffix == ".json":
        found = json.loads(out.read_text())
        assert found["annotations"]
        return
    objects = geopandas.read_file(out)
    assert len(objects)
    assert set(objects["class"]) <= {"car", "bus"}
    if suffix == ".gpkg":
        left, bottom, right, top = objects.total_bounds
        assert left >= TRANSFORM.c - 1e-6
        assert right <= TRANSFORM.c + 140 * 0.2 + 1e-6
        assert bottom >= TRANSFORM.f - 90 * 0.3 - 1e-6
        assert top <= TRANSFORM.f + 1e-6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--score-threshold", "2"], "--score-threshold must lie between 0 and 1, got 2"),
        (["--input", "again.tif"], "several inputs need a folder as --output"),
        (["--overlap", "64"], "--overlap must be below the window size 64"),
        (["--polygons", "gpkg"], "one file has it in its name"),
        (["--kind", "probabilities"], "--kind is not for an object detector"),
        (["--blend", "gaussian"], "--blend is not for an object detector"),
        (["--flips"], "--flips is not for an object detector"),
        (["--num-actors", "2"], "--num-actors is for --engine ray"),
    ],
)
def test_arguments_that_fit_no_detector_are_one_clear_line(run, tmp_path, capsys, args, message) -> None:
    images, _, folder = run
    base = ["--checkpoint", folder / "checkpoints" / "best.ckpt", "--input", images / "0.tif"]
    assert call(["predict", *base, "--output", tmp_path / "cars.gpkg", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cars.gpkg").exists()


def test_a_folder_of_images_becomes_a_folder_of_files_with_a_report(run, tmp_path, capsys) -> None:
    images, _, folder = run
    scenes = tmp_path / "scenes"
    shutil.copytree(images, scenes / "north")
    (scenes / "bad.tif").write_bytes(b"no raster")
    args = ["predict", "--checkpoint", folder / "checkpoints" / "best.ckpt", "--input", scenes, "--output"]
    out = tmp_path / "found"
    assert call([*args, out, "--on-error", "skip", "--score-threshold", "0.1"]) == 2
    assert "1 of 5 inputs failed" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "north").glob("[!.]*.gpkg")) == ["0.gpkg", "1.gpkg", "2.gpkg", "3.gpkg"]
    assert all((out / "north" / f"{number}.{suffix}").exists() for number in range(4) for suffix in ("png", "qml"))
    report = json.loads((out / "report.json").read_text())
    assert report["totals"] | {"done": 4, "failed": 1} == report["totals"]
    alone = tmp_path / "alone.gpkg"
    single = ["--input", images / "2.tif", "--output", alone, "--score-threshold", "0.1"]
    assert call([*args[:3], *single]) == 0
    assert geopandas.read_file(alone).equals(geopandas.read_file(out / "north" / "2.gpkg"))

    (scenes / "bad.tif").unlink()
    before = (out / "north" / "0.gpkg").stat().st_mtime_ns
    assert call([*args, out, "--score-threshold", "0.1"]) == 0
    assert json.loads((out / "report.json").read_text())["totals"]["skipped-existing"] == 4
    assert (out / "north" / "0.gpkg").stat().st_mtime_ns == before
    assert call([*args, out, "--polygons", "geojson", "--overwrite"]) == 0
    assert (out / "north" / "0.geojson").exists()


def test_options_of_maps_are_refused_in_evaluation(run, tmp_path, capsys) -> None:
    images, labels, folder = run
    args = ["--checkpoint", folder / "checkpoints" / "best.ckpt", "--input", images, "--labels", labels]
    assert call(["evaluate", *args, "--region", "0", "0", "9", "9"]) == 2
    assert "--region is not for an object detector" in capsys.readouterr().err


def test_an_unknown_task_is_one_clear_line(tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("task: tracking\n")
    assert call(["train", str(tmp_path / "run.yaml")]) == 2
    assert (
        "task must be one of segmentation, detection, classification, regression, slide_classification, got 'tracking'"
        in capsys.readouterr().err
    )


def predict_many(run, images, out, *extra: str) -> dict[str, bytes]:
    """Objects of a folder of images, as GeoJSON by name."""
    args = ["predict", "--checkpoint", run[2] / "checkpoints" / "best.ckpt", "--input", images, "--output", out]
    assert call([*args, "--polygons", "geojson", "--score-threshold", "0.1", *extra]) == 0
    return {path.name: path.read_bytes() for path in out.glob("*.geojson")}


@pytest.mark.parametrize("change", ["threshold", pytest.param("image", marks=pytest.mark.slow)])
def test_objects_found_with_other_settings_or_in_another_image_are_not_left_as_they_are(run, tmp_path, change) -> None:
    images = shutil.copytree(run[0], tmp_path / "images")
    before = predict_many(run, images, tmp_path / "found")
    changed = ["--score-threshold", "0.9"] if change == "threshold" else []
    if change == "image":
        shutil.copy(images / "1.tif", images / "0.tif")
    wanted = predict_many(run, images, tmp_path / "wanted", *changed)
    assert wanted["0.geojson"] != before["0.geojson"]
    args = ["predict", "--checkpoint", run[2] / "checkpoints" / "best.ckpt", "--input", images]
    args += ["--output", tmp_path / "found", "--polygons", "geojson", "--score-threshold", "0.1", *changed]
    # Refused without --overwrite, as maps are, or made again.
    code = call(args)
    found = (tmp_path / "found" / "0.geojson").read_bytes()
    assert code != 0 or found == wanted["0.geojson"]


def test_a_killed_search_goes_on_with_the_windows_that_were_left(run, tmp_path, monkeypatch) -> None:
    scene = tmp_path / "scene.tif"
    with rasterio.open(run[0] / "0.tif") as file:
        pixels, profile = np.tile(file.read(), (1, 3, 1)), file.profile
    with rasterio.open(scene, "w", **{**profile, "height": pixels.shape[1]}) as file:
        file.write(pixels)
    args = ["predict", "--checkpoint", run[2] / "checkpoints" / "best.ckpt", "--input", scene]
    args += ["--score-threshold", "0.1", "--output"]
    seen: list[int] = []
    forward = Detector.forward

    class KilledError(BaseException):
        pass

    whole: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "forward", lambda self, tiles: whole.append(len(tiles)) or forward(self, tiles))
        assert call([*args, tmp_path / "whole" / "cars.geojson"]) == 0

    def count(self, tiles):
        if len(seen) == 10:
            raise KilledError
        seen.append(len(tiles))
        return forward(self, tiles)

    monkeypatch.setattr(Detector, "forward", count)
    with pytest.raises(KilledError):
        call([*args, tmp_path / "found" / "cars.geojson"])
    again: list[int] = []
    monkeypatch.setattr(Detector, "forward", lambda self, tiles: again.append(len(tiles)) or forward(self, tiles))
    assert call([*args, tmp_path / "found" / "cars.geojson"]) == 0
    assert (tmp_path / "found" / "cars.geojson").read_bytes() == (tmp_path / "whole" / "cars.geojson").read_bytes()
    assert 0 < sum(again) < sum(whole)


def test_damaged_parts_of_an_image_are_left_out_if_asked_for(run, tmp_path) -> None:
    scene = tmp_path / "scene.tif"
    with rasterio.open(run[0] / "0.tif") as file:
        pixels, profile = np.tile(file.read(), (1, 6, 1)), file.profile
    with rasterio.open(scene, "w", **{**profile, "height": pixels.shape[1], "blockysize": 16}) as file:
        file.write(pixels)
    scene.write_bytes(scene.read_bytes()[: int(scene.stat().st_size * 0.6)])
    args = ["predict", "--checkpoint", run[2] / "checkpoints" / "best.ckpt", "--input", scene]
    args += ["--score-threshold", "0.1", "--output", tmp_path / "found.geojson"]
    assert call(args) == 2
    assert call([*args, "--on-error", "skip"]) == 0
    assert len(geopandas.read_file(tmp_path / "found.geojson"))
