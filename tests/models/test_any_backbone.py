"""Backbones of any family: their maps, heads, tile sizes and weights."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from perf_vit.conversion import load_softmax
from perf_vit.errors import CheckpointError, ConfigError, OptionError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.models import (
    CHECKPOINT_KEY,
    ClassificationModelConfig,
    ClassificationSpec,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    SlideClassificationModelConfig,
    build_classifier,
    build_detector,
    build_segmenter,
    check_not_random,
    checkpoint_metadata,
    load_segmenter,
)
from perf_vit.models.backbone import BackboneConfig, build_backbone, default_indices, map_strides
from perf_vit.models.valid_tokens import forward_maps
from perf_vit.transforms import Normalizer

VIT = {"depth": 3, "embed_dim": 32, "num_heads": 2}
SPEC = SegmentationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
OF_IMAGES = ClassificationSpec(
    classes=SPEC.classes, normalizer=SPEC.normalizer, tile_px=SPEC.tile_px, kind="single_label"
)
SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN = {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 2, 2, 2]}


@pytest.mark.parametrize(
    ("backbone", "kwargs", "indices", "head"),
    [
        ("vit_tiny_patch16_224", VIT, [0, 1, 2], "FullResolutionHead"),
        ("performer_vit_tiny_patch16_224", {**VIT, "depth": 1}, [0], "FullResolutionHead"),
        ("eva02_tiny_patch14_224", {**VIT, "patch_size": 16}, [0, 1, 2], "FullResolutionHead"),
        ("resnet10t", {}, [1, 2, 3, 4], "UPerNetHead"),
        ("convnext_atto", {}, [0, 1, 2, 3], "UPerNetHead"),
        ("efficientnet_b0", {}, [1, 2, 3, 4], "UPerNetHead"),
        (SWIN, SMALL_SWIN, [0, 1, 2, 3], "UPerNetHead"),
        (
            "swinv2_cr_tiny_224",
            {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 2, 2, 2]},
            None,
            "UPerNetHead",
        ),
        ("hct_base", {}, [0, 1, 2, 3], "UPerNetHead"),
        ("mambaout_femto", {}, [0, 1, 2, 3], "UPerNetHead"),
    ],
)
def test_maps_and_head_follow_from_the_backbone(backbone: str, kwargs: dict, indices, head: str) -> None:
    config = SegmentationModelConfig(backbone=backbone, backbone_kwargs=kwargs)
    if indices is not None:
        assert default_indices(map_strides(config, 64)) == indices
    torch.manual_seed(0)
    model = build_segmenter(config, SPEC)
    assert type(model.head).__name__ == head
    image = torch.randn(2, 3, 64, 64)
    logits = model(image)
    assert logits.shape == (2, 2, 64, 64)
    channels = model.backbone.feature_info.channels()
    assert [each.shape[1] for each in forward_maps(model.backbone, image, None)] == channels
    logits.sum().backward()


def test_blocks_of_a_plain_vit_are_evenly_spaced() -> None:
    assert default_indices([16] * 12) == [2, 5, 8, 11]
    assert default_indices([14] * 24) == [5, 11, 17, 23]
    assert default_indices([16] * 2) == [0, 1]
    assert default_indices([2, 4, 4, 8, 16, 32, 64]) == [2, 3, 4, 5]


def test_looking_at_the_maps_draws_no_random_number() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    map_strides(SegmentationModelConfig(backbone="resnet10t"), 64)
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_with_channels_last_are_turned() -> None:
    config = SegmentationModelConfig(backbone=SWIN, backbone_kwargs=SMALL_SWIN)
    model = build_segmenter(config, SPEC).eval()
    image = torch.randn(1, 3, 64, 96)
    maps = forward_maps(model.backbone, image, None)
    assert [tuple(each.shape) for each in maps] == [(1, 24, 16, 24), (1, 48, 8, 12), (1, 96, 4, 6), (1, 192, 2, 3)]
    assert torch.equal(maps[0], model.backbone(image)[0].permute(0, 3, 1, 2))


def test_a_detector_takes_a_swin() -> None:
    spec = DetectionSpec(classes=("a",), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
    config = DetectionModelConfig(backbone=SWIN, backbone_kwargs=SMALL_SWIN, strides=[4, 8, 16], channels=64)
    assert len(build_detector(config, spec).eval()(torch.randn(1, 3, 70, 64))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "resnet10t", "head": "full_resolution"},
            "a head for pyramids: upernet, segformer, dpt or linear",
        ),
        ({"backbone": "resnet10t", "head": "upernet", "out_indices": [3, 2]}, "leave model.out_indices out"),
        (
            {"backbone": "resnet10t", "out_indices": [2, 5]},
            r"must be from 0 to 4, as resnet10t has maps of strides \[2, 4",
        ),
        ({"backbone": "vit_tiny_patch16_224", "backbone_kwargs": VIT, "out_indices": [2, 5, 8, 11]}, "from 0 to 2, as"),
        ({"backbone": "resnet5"}, "timm has no model resnet5, nor is it a folder; did you mean resnet50"),
        ({"backbone": "local-dir:nowhere"}, "there is no folder nowhere; check the path"),
        ({"weights": "x.pth", "pretrained": True}, "model.weights and model.pretrained both give weights"),
    ],
)
def test_what_does_not_fit_is_answered_with_what_does(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmenter(SegmentationModelConfig(**changes), SPEC)


def vit(num_classes: int = 5, seed: int = 7, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, img_size=64, **{**VIT, **kwargs})


FROM_FILE = SegmentationModelConfig(backbone="vit_tiny_patch16_224", backbone_kwargs=VIT, head="linear")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_are_read_from_a_file(ending: str, tmp_path: Path) -> None:
    given, path = vit(), tmp_path / f"vit.{ending}"
    if ending == "pth":
        torch.save({"state_dict": given.state_dict()}, path)
    else:
        save_file(given.state_dict(), path)
    model = build_segmenter(replace(FROM_FILE, weights=str(path)), SPEC)
    for name in ("patch_embed.proj.weight", "blocks.2.mlp.fc2.bias", "pos_embed"):
        assert torch.equal(model.backbone.model.state_dict()[name], given.state_dict()[name]), name


def test_weights_of_a_convolutional_network_are_read_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = timm.create_model("resnet10t", num_classes=7)
    save_file(given.state_dict(), tmp_path / "net.safetensors")
    model = build_segmenter(
        SegmentationModelConfig(backbone="resnet10t", weights=str(tmp_path / "net.safetensors")), SPEC
    )
    found = model.backbone.state_dict()
    assert torch.equal(found["layer4.0.conv1.weight"], given.state_dict()["layer4.0.conv1.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    save_file(vit(embed_dim=48, num_heads=3).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"vit\.safetensors doesn't fit vit_tiny_patch16_224: mis-shaped"):
        build_segmenter(replace(FROM_FILE, weights=str(path)), SPEC)
    state = vit().state_dict()
    del state["blocks.1.attn.qkv.weight"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.attn\.qkv\.weight"):
        build_segmenter(replace(FROM_FILE, weights=str(path)), SPEC)
    with pytest.raises(CheckpointError, match="no weights file nowhere"):
        build_segmenter(replace(FROM_FILE, weights="nowhere.pth"), SPEC)


def hub_folder(folder: Path) -> torch.nn.Module:
    """A model as on timm's hub: config.json and model.safetensors."""
    given = vit()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(given.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "num_classes": 5, "classifier": "head", "first_conv": "patch_embed.proj"}
    content = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": VIT, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(content))
    return given


def saved(model: torch.nn.Module, config: SegmentationModelConfig, path: Path) -> Path:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: checkpoint_metadata(config, model)}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_in_the_format_of_the_hub_is_a_backbone(prefix: str, tmp_path: Path) -> None:
    given = hub_folder(tmp_path / "hub")
    config = SegmentationModelConfig(backbone=f"{prefix}{tmp_path / 'hub'}", head="linear")
    model = build_segmenter(config, SPEC).eval()
    assert torch.equal(model.backbone.model.blocks[2].mlp.fc1.weight, given.blocks[2].mlp.fc1.weight)
    # The checkpoint needs the folder no longer.
    path = saved(model, config, tmp_path / "last.ckpt")
    for file in (tmp_path / "hub").iterdir():
        file.unlink()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_segmenter(path)(image), model(image))


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_weights_of_a_folder_that_lack_a_block_are_refused(task: str, tmp_path: Path) -> None:
    given = hub_folder(tmp_path)
    kept = {name: value for name, value in given.state_dict().items() if not name.startswith("blocks.2.")}
    build, config, spec = {
        "segmentation": (build_segmenter, SegmentationModelConfig(backbone=str(tmp_path), head="linear"), SPEC),
        "classification": (build_classifier, ClassificationModelConfig(backbone=str(tmp_path)), OF_IMAGES),
    }[task]
    build(config, spec)
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"doesn't fit vit_tiny_patch16_224: missing blocks\.2\..* and \d+ more"):
        build(config, spec)


@pytest.mark.parametrize("name", ["repvit_m0_9", "shvit_s1"])
@pytest.mark.parametrize("from_file", [False, True], ids=["folder", "file"])
def test_a_classifier_of_several_layers_is_left_out(name: str, from_file: bool, tmp_path: Path) -> None:
    given = timm.create_model(name, num_classes=5)
    timm.models.save_for_hf(given, tmp_path, safe_serialization=True)
    path = tmp_path / "model.safetensors"
    file = BackboneConfig(backbone=name, weights=str(path))
    config = file if from_file else BackboneConfig(backbone=str(tmp_path))
    found = build_backbone(config, (0, 1), 3, 64)[0].state_dict()
    weight = next(key for key in found if key.startswith("stages_1.") and found[key].ndim == 4)
    assert torch.equal(found[weight], given.state_dict()[weight.replace("stages_", "stages.")])
    if not from_file:
        load_softmax(tmp_path, num_classes=0)
    save_file({key: value for key, value in given.state_dict().items() if not key.startswith("stages.1.")}, path)
    with pytest.raises(CheckpointError, match=rf"doesn't fit {name}: missing stages\.1\."):
        build_backbone(config, (0, 1), 3, 64)


def test_a_folder_of_an_older_timm_may_have_its_pool_outside_of_the_arguments(tmp_path: Path) -> None:
    given = timm.create_model("test_vit", num_classes=5, global_pool="avg")
    timm.models.save_for_hf(given, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = given.fc_norm.weight.data.normal_()
    save_file(given.state_dict(), tmp_path / "model.safetensors")
    for options in ({}, {"num_classes": 0}):
        assert torch.equal(load_softmax(tmp_path, **options).fc_norm.weight, expected)
    build_backbone(BackboneConfig(backbone=str(tmp_path)), (1, 3), 3, 160)


def test_a_model_of_the_hub_is_a_backbone(tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "models--someone--vit" / "snapshots" / "abc"
    given = hub_folder(snapshot)
    (tmp_path / "models--someone--vit" / "refs").mkdir()
    (tmp_path / "models--someone--vit" / "refs" / "main").write_text("abc")
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    config = SegmentationModelConfig(backbone="hf-hub:someone/vit", head="linear")
    model = build_segmenter(config, SPEC)
    assert torch.equal(model.backbone.model.blocks[0].attn.qkv.weight, given.blocks[0].attn.qkv.weight)
    with pytest.raises(ConfigError, match=r"hf-hub:someone/else can't be fetched: .*; check name and network"):
        build_segmenter(replace(config, backbone="hf-hub:someone/else"), SPEC)


def test_arguments_of_a_folder_can_not_load_other_files(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["model_args"]["checkpoint_path"] = "/etc/passwd"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        build_segmenter(SegmentationModelConfig(backbone=f"local-dir:{tmp_path}"), SPEC)


@pytest.mark.parametrize("changes", [{"freeze_backbone": True}, {"trainable_blocks": 1}, {"lora": {"rank": 2}}])
def test_random_weights_are_not_frozen(changes: dict, tmp_path: Path) -> None:
    config = SegmentationModelConfig(backbone="vit_tiny_patch16_224", **changes)
    with pytest.raises(ConfigError, match=f"model.{next(iter(changes))} freezes weights that would be random: give"):
        check_not_random(config)
    for given in ({"pretrained": True}, {"weights": "x.pth"}, {"backbone": str(tmp_path)}):
        check_not_random(replace(config, **given))
    check_not_random(replace(config, freeze_backbone=False, trainable_blocks=None, lora=None))


def test_windows_of_another_size_than_the_only_one_are_refused() -> None:
    kwargs = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    only = build_segmenter(SegmentationModelConfig(backbone="cait_xxs24_224", backbone_kwargs=kwargs), SPEC).eval()
    predictor = SegmentationPredictor(only, SegmentationPredictOptions(window_size=96))
    with pytest.raises(OptionError, match="window_size must be 64, as the backbone takes no other size, got 96"):
        predictor.grid()
    assert only(torch.randn(1, 3, 64, 64)).shape[-2:] == (64, 64)
    assert SegmentationPredictor(only, SegmentationPredictOptions()).grid()["window_size"] == 64
    for backbone, small in (("vit_tiny_patch16_224", VIT), (SWIN, SMALL_SWIN), ("resnet10t", {})):
        config = SegmentationModelConfig(backbone=backbone, backbone_kwargs=small)
        found = SegmentationPredictor(build_segmenter(config, SPEC), SegmentationPredictOptions(window_size=96))
        assert found.grid()["window_size"] == 96


def test_a_random_encoder_of_slides_is_refused() -> None:
    with pytest.raises(ConfigError, match="the encoder, which is not trained, would be random"):
        check_not_random(SlideClassificationModelConfig())
    check_not_random(SlideClassificationModelConfig(pretrained=True))
