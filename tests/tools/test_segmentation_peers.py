"""tools/benchmarks/segmentation_peers.py: other networks learn from a config's tiles and are scored as ours are."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import typer
import yaml

import perf_vit
from perf_vit.conversion import save_converted
from perf_vit.data import SegmentationDataConfig, SegmentationSplitConfig
from perf_vit.models import SegmentationModelConfig
from perf_vit.tasks import SegmentationOptimConfig, TrainerConfig
from perf_vit.tasks.optim import parameter_groups
from perf_vit.transforms import Normalizer
from perf_vit.workflows.run_config import SegmentationRun

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
# typer's defaults are known to typer only.
UNSET = {"region": None, "backbone": None, "weights": None}


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


@pytest.fixture
def folder(tmp_path) -> Path:
    """A converted ViT of two blocks."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=48, depth=2, num_heads=2)
    return save_converted(perf_vit.linearize(vit), tmp_path / "vit")


def run_of(backbone: Path | str, **data) -> SegmentationRun:
    """A run with a linear head on two blocks, of which the last is trained."""
    model = SegmentationModelConfig(backbone=str(backbone), out_indices=[0, 1], head="linear", trainable_blocks=1)
    part = SegmentationSplitConfig(image="unused", labels="unused")
    return SegmentationRun(
        task="segmentation",
        out="unused",
        data=SegmentationDataConfig(train=part, val=part, classes=["a", "b"], **data),
        model=model,
        optim=SegmentationOptimConfig(backbone_lr_scale=0.1),
        trainer=TrainerConfig(),
    )


def data_of(tile_px: int, bands: int = 3) -> SimpleNamespace:
    return SimpleNamespace(classes=("a", "b"), normalizer=Normalizer((0.0,) * bands, (1.0,) * bands), tile_px=tile_px)


@pytest.mark.slow
def test_a_unet_learns_bright_squares_within_its_time_and_every_pixel_is_scored(tool, config, tmp_path, capsys) -> None:
    path, image, labels = config
    out = tmp_path / "scores.json"
    tool.main(str(path), "unet-resnet18", image, labels, cpu_seconds=3, out=out, **UNSET)
    written = json.loads(out.read_text())
    assert {each["name"]: each for each in written["classes"]}["house"]["iou"] > 0.6
    assert written["training"]["tile_px"] == 64
    assert 3 <= written["training"]["cpu_seconds"] < 10


def test_a_linear_layer_learns_on_a_frozen_softmax_model(tool, config, folder, tmp_path) -> None:
    path, image, labels = config
    out = tmp_path / "scores.json"
    overrides = ["data.tile_px=64", "model.out_indices=[1]"]
    tool.main(str(path), "linear", image, labels, overrides, cpu_seconds=2, out=out, **{**UNSET, "backbone": folder})
    assert json.loads(out.read_text())["classes"][1]["iou"] > 0.4


def test_only_the_linear_layer_is_trained(tool, folder) -> None:
    model = tool.build("linear", data_of(64), run_of(folder))
    trained = {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"head"}


def test_softmax_is_the_network_of_the_config_with_other_attention(tool, folder) -> None:
    run = run_of(folder)
    ours, peer = (tool.build(name, data_of(64), run) for name in ("config", "softmax"))
    kinds = {type(each).__module__ for each in peer.modules() if "ttention" in type(each).__name__}
    assert kinds == {"timm.layers.attention"}
    assert any(type(each).__module__.startswith("perf_vit.") for each in ours.backbone.modules())
    peer.head.load_state_dict(ours.head.state_dict())
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # A grid of 4 x 4 is attended to exactly.
    torch.testing.assert_close(ours.eval()(image), peer.eval()(image), atol=1e-4, rtol=1e-4)
    names = [[name for name, each in model.named_parameters() if each.requires_grad] for model in (ours, peer)]
    assert names[0] == names[1]
    assert not any("blocks.0" in name for name in names[0])


def test_an_encoder_gets_the_weights_of_a_file_with_other_names_and_a_smaller_rate(tool, tmp_path) -> None:
    stored = timm.create_model("tf_efficientnet_lite0")
    path = tmp_path / "encoder.pth"
    torch.save({f"_{number}": value for number, value in enumerate(stored.state_dict().values())}, path)
    run = run_of("unused", tile_px=70, mean=[1.0] * 4, std=[1.0] * 4)
    tool.prepare(run, "unet-efficientnet-lite0", 1e-3)
    assert (run.data.tile_px, run.data.mean, run.data.std) == (64, [127.5] * 4, [127.5] * 4)
    model = tool.build("unet-efficientnet-lite0", data_of(64, bands=4), run, weights=path)
    encoder = model.head.unet.encoder.model
    assert encoder.conv_stem.weight.shape == (32, 4, 3, 3)
    assert torch.equal(encoder.blocks[2][0].conv_dw.weight, stored.blocks[2][0].conv_dw.weight)
    groups = parameter_groups(model, run.optim, tool.pretrained_layers(model, "unet-efficientnet-lite0"))
    scales = {id(each): group["lr_scale"] for group in groups for each in group["params"]}
    assert scales[id(encoder.conv_stem.weight)] == 0.1
    assert scales[id(model.head.unet.segmentation_head[0].weight)] == 1


def test_wrong_networks_and_weights_are_one_line(tool, tmp_path) -> None:
    run, data = run_of("unused"), data_of(64)
    with pytest.raises(typer.BadParameter, match="needs --weights"):
        tool.build("unet-efficientnet-lite0", data, run)
    with pytest.raises(typer.BadParameter, match="one of config, softmax, linear, unet-resnet18"):
        tool.build("unet", data, run)
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(typer.BadParameter, match="must hold the 296 tensors"):
        tool.weights_in_order(tmp_path / "a.pth", "tf_efficientnet_lite0")
