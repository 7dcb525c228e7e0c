"""The Python calls make what the command line makes: maps, runs, objects, scores."""

import csv
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from command_line import SMALL, call, train_args
from small_models import save_segmenter, save_small_detector

import perf_vit
from perf_vit.data import make_ship_scene
from perf_vit.errors import OutputError


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_ship_scene(tmp_path_factory.mktemp("scene"), seed=0, size_px=192, num_targets=10)


def assert_equal_maps(first: Path, second: Path) -> None:
    with rasterio.open(first) as one, rasterio.open(second) as two:
        assert np.array_equal(one.read(), two.read(), equal_nan=True)
        assert (one.transform, str(one.nodata), one.tags()) == (two.transform, str(two.nodata), two.tags())


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (
            ["--kind", "probabilities", "--flips", "--window-size", "48", "--overlap", "8"],
            {"kind": "probabilities", "flips": True, "window_size": 48, "overlap": 8},
        ),
    ],
)
def test_maps_are_equal(scene, tmp_path, flags, options) -> None:
    checkpoint = save_segmenter(tmp_path / "model.ckpt", num_bands=4)
    files = ["--input", scene.image, "--output", tmp_path / "command.tif"]
    assert call(["predict", "--checkpoint", checkpoint, *files, *flags]) == 0
    result = perf_vit.predict(perf_vit.load(checkpoint), scene.image, tmp_path / "python.tif", **options)
    assert (result.made, result.out) == (True, tmp_path / "python.tif")
    assert_equal_maps(tmp_path / "command.tif", tmp_path / "python.tif")


def test_objects_are_equal(tmp_path, make_scene) -> None:
    checkpoint, image = save_small_detector(tmp_path / "model.ckpt"), make_scene(dtype="uint8")
    flags = ["--score-threshold", "0.01"]
    files = ["--input", image, "--output", tmp_path / "command.gpkg"]
    assert call(["predict", "--checkpoint", checkpoint, *files, *flags]) == 0
    perf_vit.predict(checkpoint, image, tmp_path / "python.gpkg", score_threshold=0.01)
    one, two = (geopandas.read_file(tmp_path / f"{name}.gpkg") for name in ("command", "python"))
    assert len(one) > 0
    assert one.equals(two)


def test_training_runs_are_equal(scene, tmp_path) -> None:
    assert call(train_args(scene, tmp_path / "command")) == 0
    overrides = {f"data.{part}.{key}": getattr(scene, key) for part in ("train", "val") for key in ("image", "labels")}
    small = {
        "data.tile_px": 64,
        "data.tiles_per_epoch": 8,
        "data.batch_size": 4,
        "model.backbone_kwargs": {"depth": 2, "attn_kwargs": {"num_features": 32}},
        "model.out_indices": [0, 1],
        "model.head_kwargs": {"channels": [8, 8, 16, 16]},
        "trainer.max_epochs": 2,
        "trainer.report": False,
    }
    assert len(small) == len(SMALL)
    run = perf_vit.train("segmentation/demo", {**overrides, **small}, out=tmp_path / "python", progress=False)
    assert run.folder == tmp_path / "python"
    first, second = (
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "command", run.folder)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with (tmp_path / "command" / "metrics.csv").open(newline="") as file:
        expected = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    timed = {key for key in expected[0] if "second" in key or "time" in key}
    for row, other in zip(run.metrics, expected, strict=True):
        assert {key: value for key, value in row.items() if key not in timed} == {
            key: value for key, value in other.items() if key not in timed
        }
    assert run.plot().size[0] > 300
    assert type(run.load()) is type(perf_vit.load(run.folder))


def test_scores_are_equal(scene, tmp_path) -> None:
    checkpoint = save_segmenter(tmp_path / "model.ckpt", "ship", num_bands=4)
    files = ["--input", scene.image, "--labels", scene.labels, "--json", tmp_path / "command.json"]
    assert call(["evaluate", "--checkpoint", checkpoint, *files]) == 0
    found = perf_vit.evaluate(checkpoint, scene.image, scene.labels, progress=False)
    assert found.to_json(tmp_path / "python.json").read_bytes() == (tmp_path / "command.json").read_bytes()
    assert [row["name"] for row in found.table] == ["rest", "ship"]
    assert "scene.tif against" in str(found)
    pictures = found.plot(tmp_path / "python.png")
    for write, name in ((found.to_json, "python.json"), (found.plot, "python.png"), (found.report, "command.html")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(OutputError, match="exists already; choose another output, or replace it with"):
            write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "photo_confusion.png").touch()
    with pytest.raises(OutputError, match=r"photo_confusion\.png exists already"):
        found.plot(tmp_path / "photo.png")
    assert found.plot(tmp_path / "photo.png", overwrite=True)[1].stat().st_size > 0
    assert [path.read_bytes() for path in pictures] == [
        (tmp_path / f"command{ending}.png").read_bytes() for ending in ("", "_confusion")
    ]
