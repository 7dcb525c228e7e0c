"""Train, evaluate and predict through the real entry point."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from command_line import call, train_args
from PIL import Image
from rio_cogeo.cogeo import cog_validate

import perf_vit
from perf_vit.config import load_config
from perf_vit.sources import open_source
from perf_vit.workflows.run_config import SegmentationRun


def test_run_folder_holds_config_checkpoints_metrics_and_curve(trained) -> None:
    folder = trained.folder
    config = load_config(folder / "config.yaml", SegmentationRun)
    assert config.data.tile_px == 64
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train/loss", "val/loss", "val/iou/ship", "val/f1/ship", "lr"} <= set(rows[0])
    assert Image.open(folder / "loss_curve.png").size[0] > 500
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_without_a_terminal_each_epoch_is_a_line(trained, tmp_path) -> None:
    args = train_args(trained.scene, tmp_path / "run", "trainer.max_epochs=1")
    done = subprocess.run([sys.executable, "-m", "perf_vit", *args], capture_output=True, text=True, check=True)
    assert "epoch 1 of 1: train/loss" in done.stderr
    assert "val/iou" in done.stderr


def test_the_same_seed_trains_the_same_weights(trained, tmp_path) -> None:
    assert call(train_args(trained.scene, tmp_path / "again")) == 0
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (trained.folder, tmp_path / "again")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (trained.folder / "metrics.csv").read_text() == (tmp_path / "again" / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trained, tmp_path) -> None:
    out = tmp_path / "run"
    # the schedule must be the whole run's from the start, so interrupt by keeping the first epoch's checkpoint
    assert call(train_args(trained.scene, out, "trainer.max_epochs=3")) == 0
    whole = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    curve = (out / "metrics.csv").read_text()

    interrupted = tmp_path / "interrupted"
    script = (
        "import lightning, sys; from perf_vit.cli.main import run\n"
        "class Stop(lightning.Callback):\n"
        "    def on_train_epoch_start(self, trainer, module):\n"
        "        if trainer.current_epoch == 2: raise KeyboardInterrupt\n"
        "import perf_vit.tasks.trainer as t; kept = t.best_and_last\n"
        "t.best_and_last = lambda *a, **k: [*kept(*a, **k), Stop()]\n"
        "run(sys.argv[1:])\n"
    )
    args = train_args(trained.scene, interrupted, "trainer.max_epochs=3")
    stopped = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, check=False)
    assert stopped.returncode == 130
    assert len((interrupted / "metrics.csv").read_text().splitlines()) == 3
    assert call([*args, "resume=true"]) == 0
    resumed = torch.load(interrupted / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (interrupted / "metrics.csv").read_text() == curve


def test_predict_writes_a_valid_cog_on_the_grid_of_the_input(trained, tmp_path) -> None:
    out = tmp_path / "new" / "map.tif"
    args = ["--checkpoint", trained.checkpoint, "--input", trained.scene.image, "--output", out]
    assert call(["predict", *args]) == 0
    valid, errors, warnings = cog_validate(out, strict=True)
    assert (valid, errors, warnings) == (True, [], [])
    scene, result = open_source(trained.scene.image), open_source(out)
    assert (result.crs, result.size, result.nodata) == (scene.crs, scene.size, 255)
    assert result.transform.almost_equals(scene.transform, precision=1e-9)
    before, after = scene.read(scene.extent), result.read(result.extent)
    assert np.array_equal(before.valid, after.valid)
    assert set(np.unique(after.pixels[0][after.valid])) <= {0, 1}
    assert result.colormap[1] != result.colormap[0]
    picture = np.asarray(Image.open(out.with_suffix(".png")))
    assert picture.shape[0] > 100
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10
    names = ["map.html", "map.png", "map.qml", "map.tif", "map.tif.aux.xml"]
    assert sorted(p.name for p in out.parent.iterdir()) == names


def test_a_model_trained_on_coarser_pixels_maps_at_them(trained, tmp_path) -> None:
    out = tmp_path / "run"
    assert call(train_args(trained.scene, out, "trainer.max_epochs=1", "data.resolution=8")) == 0
    checkpoint = out / "checkpoints" / "best.ckpt"
    base = ["--checkpoint", checkpoint, "--input", trained.scene.image]
    assert call(["predict", *base, "--output", tmp_path / "map.tif"]) == 0
    scene, result = open_source(trained.scene.image), open_source(tmp_path / "map.tif")
    assert abs(result.transform.a) == abs(result.transform.e) == 8
    assert result.width == pytest.approx(scene.width * abs(scene.transform.a) / 8, abs=1)
    scores = tmp_path / "scores.json"
    assert call(["evaluate", *base, "--labels", trained.scene.labels, "--json", scores]) == 0
    scored = sum(row["num_pixels"] for row in json.loads(scores.read_text())["classes"])
    assert 0 < scored <= result.width * result.height


def _moved(image: Path, path: Path, crs: str, transform: Affine) -> Path:
    """The same pixels in another CRS."""
    with rasterio.open(image) as source:
        profile = {**source.profile, "crs": crs, "transform": transform}
        with rasterio.open(path, "w", **profile) as dataset:
            dataset.write(source.read())
    return path


def test_a_model_of_metres_meets_its_scale_in_feet_and_refuses_degrees(trained, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert call(train_args(trained.scene, out, "trainer.max_epochs=1", "data.resolution=8")) == 0
    base = ["--checkpoint", out / "checkpoints" / "best.ckpt"]
    with rasterio.open(trained.scene.image) as source:
        side, size = abs(source.transform.a), source.shape
    foot = 1200 / 3937
    feet = _moved(trained.scene.image, tmp_path / "feet.tif", "EPSG:2263",
                  Affine(side / foot, 0, 9e5, 0, -side / foot, 2e5))  # fmt: skip
    assert call(["predict", *base, "--input", feet, "--output", tmp_path / "map.tif"]) == 0
    result = open_source(tmp_path / "map.tif")
    assert result.transform.a == pytest.approx(8 / foot, rel=1e-9)
    assert result.size == tuple(pytest.approx(pixels * side / 8, abs=1) for pixels in size)
    degrees = _moved(trained.scene.image, tmp_path / "degrees.tif", "EPSG:4326",
                     Affine(1e-5, 0, 37.5, 0, -1e-5, 55))  # fmt: skip
    capsys.readouterr()
    assert call(["predict", *base, "--input", degrees, "--output", tmp_path / "no.tif"]) == 2
    assert "the model reads pixels of 8 metre" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no.tif").exists()


def test_probabilities_sum_to_1_and_agree_with_the_classes(trained, tmp_path) -> None:
    base = ["predict", "--checkpoint", trained.checkpoint, "--input", trained.scene.image]
    assert call([*base, "--output", tmp_path / "c.tif"]) == 0
    assert call([*base, "--output", tmp_path / "p.tif", "--kind", "probabilities"]) == 0
    classes, probs = open_source(tmp_path / "c.tif"), open_source(tmp_path / "p.tif")
    c, p = classes.read(classes.extent), probs.read(probs.extent)
    assert p.pixels.dtype == np.float32
    assert np.array_equal(c.valid, p.valid)
    np.testing.assert_allclose(p.pixels.sum(0)[p.valid], 1, atol=1e-5)
    assert np.array_equal(p.pixels.argmax(0)[p.valid], c.pixels[0][c.valid])
    assert probs.band_names == ("water_or_land", "ship")


@pytest.mark.parametrize("flips", [[], ["--flips"]])
def test_evaluate_prints_and_writes_what_the_map_scores(trained, tmp_path, capsys, flips) -> None:
    base = ["--checkpoint", trained.checkpoint, "--input", trained.scene.image, *flips]
    json_path = tmp_path / "scores.json"
    assert call(["evaluate", *base, "--labels", trained.scene.labels, "--json", json_path]) == 0
    assert "ship" in capsys.readouterr().out
    scores = json.loads(json_path.read_text())
    assert [c["name"] for c in scores["classes"]] == ["water_or_land", "ship"]

    from perf_vit.labels import open_labels

    assert call(["predict", *base, "--output", tmp_path / "map.tif"]) == 0
    source, result = open_source(trained.scene.image), open_source(tmp_path / "map.tif")
    truth = open_labels(trained.scene.labels, source, classes=["water_or_land", "ship"]).read(source.extent)
    mapped = result.read(result.extent)
    keep = mapped.valid
    for index, entry in enumerate(scores["classes"]):
        predicted, expected = mapped.pixels[0][keep] == index, truth[keep] == index
        union = (predicted | expected).sum()
        assert entry["iou"] == pytest.approx((predicted & expected).sum() / union, abs=1e-6)
        assert entry["num_pixels"] == expected.sum()


def test_curves_and_confusion_lie_beside_the_scores(trained, tmp_path) -> None:
    args = ["--checkpoint", trained.checkpoint, "--input", trained.scene.image, "--labels", trained.scene.labels]
    assert call(["evaluate", *args, "--json", tmp_path / "s.json"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert [sum(row) for row in scores["confusion"]] == [row["num_pixels"] for row in scores["classes"]]
    assert 0 < scores["auroc"]["ship"] <= 1
    assert 0 < scores["average_precision"]["ship"] <= 1
    for name in ("s.png", "s_confusion.png"):
        assert (tmp_path / name).stat().st_size > 3000


def test_options_of_detectors_are_refused_for_maps(trained, capsys) -> None:
    args = ["--checkpoint", trained.checkpoint, "--input", trained.scene.image, "--labels", trained.scene.labels]
    assert call(["evaluate", *args, "--label-format", "coco"]) == 2
    assert "--label-format is not for a segmentation model" in capsys.readouterr().err


def test_python_api_maps_with_the_contract_of_the_readme(trained, tmp_path) -> None:
    model = perf_vit.load(trained.checkpoint)
    source = perf_vit.open(trained.scene.image)
    result = perf_vit.predict(model, source, tmp_path / "map.tif", window_size=96, overlap=32)
    assert open_source(result.out).size == source.size


def test_a_checkpoint_works_after_it_was_moved(trained, tmp_path) -> None:
    moved = shutil.copy(trained.checkpoint, tmp_path / "model.ckpt")
    args = ["--checkpoint", moved, "--input", trained.scene.image, "--output", tmp_path / "map.tif"]
    assert call(["predict", *args]) == 0


def test_version_and_help() -> None:
    done = subprocess.run([sys.executable, "-m", "perf_vit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"perf-vit {perf_vit.__version__}"
    assert call(["train", "--help"]) == 0
