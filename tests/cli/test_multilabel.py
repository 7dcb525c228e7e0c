"""Classes that don't exclude each other, from labels to maps."""

import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import SMALL, call
from PIL import Image
from shapely import box

from perf_vit.models import load_segmenter

CLASSES = ["red", "green", "blue", "bright"]
PROFILE = {"driver": "GTiff", "height": 128, "width": 128, "crs": "EPSG:32622", "dtype": "uint8"}
PLACE = Affine(2, 0, 650_010, 0, -2, 9_480_000)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Cells of 32 px in which each band is high or low by itself."""
    folder = tmp_path_factory.mktemp("multilabel")
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 2, (3, 4, 4))
    truth = cells.repeat(32, 1).repeat(32, 2)
    layers = np.concatenate([truth, truth.sum(0, keepdims=True) > 1]).astype(np.uint8)
    with rasterio.open(folder / "scene.tif", "w", count=3, transform=PLACE, **PROFILE) as dataset:
        dataset.write(rng.normal(60 + 80 * truth, 8).clip(1, 255).astype(np.uint8))
    with rasterio.open(folder / "layers.tif", "w", count=4, transform=PLACE, **PROFILE) as dataset:
        dataset.write(layers)
    corners = [(k, PLACE @ (32 * c, 32 * r + 32), PLACE @ (32 * c + 32, 32 * r)) for k, r, c in np.argwhere(cells)]
    frame = gpd.GeoDataFrame(
        {"kind": [CLASSES[k] for k, _, _ in corners]},
        geometry=[box(*low, *high) for _, low, high in corners],
        crs="EPSG:32622",
    )
    frame.to_file(folder / "polygons.gpkg")
    return folder


def train(scene, out, labels: str, *extra: str) -> int:
    files = [f"data.{part}.image={scene / 'scene.tif'}" for part in ("train", "val")]
    files += [f"data.{part}.labels={scene / labels}" for part in ("train", "val")]
    options = [
        "data.multilabel=true",
        "data.background=none",
        f"data.classes=[{','.join(CLASSES)}]",
        "optim.loss={ce: 1, dice: 1}",
    ]
    return call(["train", "configs/segmentation/demo.yaml", *files, f"out={out}", *SMALL, *options, *extra])


@pytest.fixture(scope="module")
def trained(scene):
    longer = ["trainer.max_epochs=4", "data.tiles_per_epoch=40", "optim.lr=0.005", "data.augment.scale=[0.9,1.1]"]
    assert train(scene, scene / "run", "layers.tif", *longer) == 0
    return scene / "run" / "checkpoints" / "last.ckpt"


def predict(trained, scene, out, *extra: str) -> int:
    return call(["predict", "--checkpoint", trained, "--input", scene / "scene.tif", "--output", out, *extra])


def read(path):
    with rasterio.open(path) as dataset:
        assert dataset.descriptions == tuple(CLASSES)
        return dataset.read(), dataset.nodata, dataset.scales


def test_training_learns_them_and_evaluation_reads_both_kinds_of_labels_alike(scene, trained, tmp_path) -> None:
    assert load_segmenter(trained).spec.multilabel
    scores = {}
    for labels in ("layers.tif", "polygons.gpkg"):
        args = ["--checkpoint", trained, "--input", scene / "scene.tif", "--labels", scene / labels]
        if labels == "polygons.gpkg":
            # The way of reading polygons is part of a checkpoint.
            assert train(scene, tmp_path / "run", labels, "data.attribute=kind", "trainer.max_epochs=1") == 0
            args[1] = tmp_path / "run" / "checkpoints" / "last.ckpt"
        assert call(["evaluate", *args, "--json", tmp_path / "scores.json", "--overwrite"]) == 0
        scores[labels] = json.loads((tmp_path / "scores.json").read_text())
    pixels = {name: [entry["num_pixels"] for entry in each["classes"]] for name, each in scores.items()}
    # No polygon is of the class "bright".
    assert pixels["polygons.gpkg"] == [*pixels["layers.tif"][:3], 0]
    assert scores["layers.tif"]["mean"]["iou"] > 0.7
    assert all(area > 0.8 for area in scores["layers.tif"]["average_precision"].values())
    assert scores["polygons.gpkg"]["average_precision"]["bright"] is None
    assert "confusion" not in scores["layers.tif"]
    assert Image.open(tmp_path / "scores.png").size[0] > 200
    assert not (tmp_path / "scores_confusion.png").exists()


def test_maps_have_a_band_a_class_and_the_threshold_decides(scene, trained, tmp_path) -> None:
    assert predict(trained, scene, tmp_path / "p.tif", "--kind", "probabilities") == 0
    assert predict(trained, scene, tmp_path / "q.tif", "--kind", "probabilities-uint8") == 0
    assert predict(trained, scene, tmp_path / "c.tif") == 0
    assert predict(trained, scene, tmp_path / "sure.tif", "--score-threshold", "0.9") == 0
    probabilities = read(tmp_path / "p.tif")[0]
    assert probabilities.min() >= 0
    assert probabilities.sum(0).max() > 1.5
    steps, nodata, scales = read(tmp_path / "q.tif")
    np.testing.assert_allclose(steps * scales[0], probabilities, atol=0.003)
    for name, threshold in (("c", 0.5), ("sure", 0.9)):
        labels, nodata, _ = read(tmp_path / f"{name}.tif")
        assert nodata == 255
        clear = np.abs(probabilities - threshold) > 1e-4
        np.testing.assert_array_equal(labels[clear], (probabilities > threshold)[clear])
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5


def test_one_class_that_is_there_or_not_is_enough(scene, tmp_path) -> None:
    # The same polygons, without their kinds.
    options = ["data.classes=[any]", "trainer.max_epochs=1"]
    assert train(scene, tmp_path / "run", "polygons.gpkg", *options) == 0
    assert predict(tmp_path / "run" / "checkpoints" / "last.ckpt", scene, tmp_path / "map.tif") == 0
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.count == 1
        assert set(np.unique(dataset.read())) <= {0, 1}


def test_what_does_not_go_with_them_is_one_line(scene, trained, tmp_path, capsys) -> None:
    assert train(scene, tmp_path / "run", "layers.tif", "optim.class_weights=balanced") == 2
    assert "balanced is for classes that exclude each other" in capsys.readouterr().err
    assert predict(trained, scene, tmp_path / "map.tif", "--polygons", "gpkg") == 2
    assert "--polygons are of classes that exclude each other" in capsys.readouterr().err
    assert predict(trained, scene, tmp_path / "map.tif", "--score-threshold", "1.5") == 2
    assert "must lie between 0 and 1, got 1.5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
