"""tools/benchmarks/segmentation_peers.py: other networks learn from a config's tiles and are scored as ours are."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import typer
import yaml

import perf_vit
from perf_vit.conversion import save_converted
from perf_vit.transforms import Normalizer

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("segmentation_peers")


@pytest.fixture
def config(make_scene, tmp_path) -> tuple[Path, Path, Path]:
    """A scene with bright squares, and a config that trains on it in tiles of 70 px."""
    mask = np.zeros((1, 100, 110), np.uint8)
    mask[:, 10:40, 20:60], mask[:, 60:90, 70:100] = 1, 1
    pixels = np.random.default_rng(0).integers(1, 60, (3, 100, 110), dtype=np.uint8) + 150 * mask
    image, labels = make_scene(pixels=pixels), make_scene(pixels=mask, nodata=None)
    part = {"image": str(image), "labels": str(labels)}
    data = {"train": part, "val": part, "classes": ["ground", "house"], "tile_px": 70, "tiles_per_epoch": 4}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"out": "x", "data": {**data, "batch_size": 4}, "optim": {"loss": {"dice": 1.0}}}))
    return path, image, labels


@pytest.mark.slow
def test_a_unet_learns_bright_squares_within_its_time_and_every_pixel_is_scored(tool, config, tmp_path, capsys) -> None:
    path, image, labels = config
    out = tmp_path / "scores.json"
    tool.main(str(path), "unet-resnet18", image, labels, cpu_seconds=3, out=out, region=None, backbone=None)
    scores = {each["name"]: each for each in json.loads(out.read_text())["classes"]}
    assert scores["house"]["iou"] > 0.6
    assert "tiles of 64 px" in capsys.readouterr().out


def test_a_linear_layer_learns_on_a_frozen_softmax_model(tool, config, tmp_path) -> None:
    path, image, labels = config
    folder, out = tmp_path / "vit", tmp_path / "scores.json"
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=48, depth=2, num_heads=2)
    save_converted(perf_vit.linearize(vit), folder)
    overrides = ["data.tile_px=64", "model.out_indices=[1]"]
    tool.main(str(path), "linear", image, labels, overrides, cpu_seconds=2, out=out, region=None, backbone=folder)
    assert json.loads(out.read_text())["classes"][1]["iou"] > 0.4


def test_only_the_linear_layer_is_trained(tool, tmp_path) -> None:
    folder = tmp_path / "vit"
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=48, depth=2, num_heads=2)
    save_converted(perf_vit.linearize(vit), folder)
    data = SimpleNamespace(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
    run = SimpleNamespace(model=SimpleNamespace(out_indices=[0, 1]))
    model = tool.build("linear", data, run, folder)
    trained = {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"head"}
    with pytest.raises(typer.BadParameter, match="--backbone"):
        tool.build("linear", data, run, None)
