import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from lively import sharpened
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import perf_vit
from perf_vit.conversion import load_converted, load_softmax
from perf_vit.conversion.linearize import converted_layers
from perf_vit.conversion.weights import create_with_weights, read_weights
from perf_vit.errors import CheckpointError, OutputError
from perf_vit.layers import redraw_projections
from perf_vit.layers.mixer import MIXERS
from perf_vit.models import (
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    checkpoint_metadata,
    load_segmenter,
)
from perf_vit.transforms import Normalizer

NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")
SIZE = 112
OPTIONS = {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4, "num_clusters": 8}


def build(name: str = NAMES[0], **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    narrow = {"embed_dim": 96, "num_heads": 3} if "dinov3" in name else {}
    model = timm.create_model(name, **{"depth": 3, "img_size": SIZE, "num_classes": 5, **narrow, **kwargs})
    return sharpened(model.eval())


def images(channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path) -> Path:
    model = perf_vit.linearize(build(), **OPTIONS)
    return perf_vit.save_converted(model, tmp_path / "saved")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_saved_model_comes_back_as_it_was(name: str, tmp_path) -> None:
    model = build(name)
    per_layer = {0: {"mixer": "softmax"}, 1: {"mixer": "performer", "seed": 7}, 2: {"window_size": 2}}
    converted = perf_vit.linearize(model, per_layer=per_layer, **OPTIONS)
    redraw_projections(converted, 3)
    folder = perf_vit.save_converted(converted, tmp_path / "deep" / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    loaded = load_converted(folder)
    assert {i: x.options for i, x in converted_layers(loaded).items()} == {
        i: x.options for i, x in converted_layers(converted).items()
    }
    assert not loaded.training
    assert torch.equal(loaded(images()), converted(images()))
    # timm's own loader takes the folder for the softmax model.
    softmax = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(softmax(images()), model(images()))
    assert torch.equal(load_softmax(folder).eval()(images()), model(images()))


@pytest.mark.parametrize(
    ("mixer", "options", "per_layer"),
    [
        ("clustered", {}, {}),
        ("clustered", {"num_clusters": 7}, {1: {"mixer": "performer"}, 2: {"num_sinks": 4}}),
        ("performer", {"seed": 3}, {0: {"mixer": "softmax"}, 2: {"mixer": "clustered", "num_clusters": 9}}),
    ],
)
def test_every_option_is_saved_so_that_defaults_may_change(mixer, options, per_layer, tmp_path) -> None:
    model = perf_vit.linearize(build(), mixer, per_layer=per_layer, **options)
    folder = perf_vit.save_converted(model, tmp_path / "saved")
    saved = json.loads((folder / "config.json").read_text())["perf_vit"]["conversion"]
    assert set(saved["options"]) == set(MIXERS[mixer].options_type.names())
    for index, own in saved["per_layer"].items():
        assert set(own) == {"mixer", *MIXERS[own["mixer"]].options_type.names()}, index
    assert set(saved["per_layer"]) == {str(index) for index in per_layer}
    assert torch.equal(load_converted(folder)(images()), model(images()))


@torch.no_grad()
def test_convolutions_of_the_values_are_saved(tmp_path) -> None:
    model = perf_vit.linearize(build(), local_enhancement=True, max_exact_tokens=0, num_sinks=4, num_clusters=9)
    for block in model.blocks:
        block.attn.local_enhancement.weight.normal_(generator=torch.Generator().manual_seed(0))
    folder = perf_vit.save_converted(model, tmp_path / "saved")
    assert torch.equal(load_converted(folder)(images()), model(images()))
    cut = load_converted(folder, features_only=True, out_indices=[0])
    features = model.forward_intermediates(images(), indices=[0], intermediates_only=True)
    torch.testing.assert_close(cut(images())[0], features[0])
    (folder / "local_enhancement.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"local_enhancement.safetensors"):
        load_converted(folder)


def test_a_model_cut_before_its_layer_of_features_loads(tmp_path) -> None:
    model = perf_vit.linearize(build(), per_layer={2: {"mixer": "performer", "num_features": 32}})
    folder = perf_vit.save_converted(model, tmp_path / "saved")
    cut = load_converted(folder, features_only=True, out_indices=[0])
    assert cut(images())[0].shape[0] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "performer"}, "window_size is an option of mixer='clustered', got mixer='performer'"),
        ({"mixer": "longformer"}, "mixer must be one of clustered, .*, softmax, .*got 'longformer'"),
        (None, "it has no mixer, as conversions of other versions"),
    ],
)
def test_a_conversion_that_this_version_cannot_make_is_one_line(saved, change, message) -> None:
    config = json.loads((saved / "config.json").read_text())
    conversion = config["perf_vit"]["conversion"]
    if change is None:
        conversion["attention"] = conversion.pop("mixer")
    else:
        conversion.update(change)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"invalid conversion: {message}.*convert the model again"):
        load_converted(saved)


@torch.no_grad()
def test_a_model_whose_size_and_classifier_changed_is_saved_as_it_is(tmp_path) -> None:
    model = perf_vit.linearize(build(), **OPTIONS)
    model.reset_classifier(0)
    model.set_input_size(img_size=(64, 160))
    loaded = load_converted(perf_vit.save_converted(model, tmp_path / "saved"))
    x = torch.randn(1, 3, 64, 160)
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_a_saved_model_is_loaded_for_other_sizes_bands_and_as_features(saved) -> None:
    larger = load_converted(saved, img_size=160, num_classes=2)
    assert larger(images(size=160)).shape == (2, 2)
    features = load_converted(saved, features_only=True, out_indices=(0, 1), in_chans=5, dynamic_img_size=True)
    assert [x.shape for x in features(images(5, 64))] == [(2, 192, 4, 4)] * 2
    # Blocks past the last one that is asked for are gone, their options with them.
    assert len(features.model.blocks) == 2
    whole = load_converted(saved)
    expected = whole.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
    features = load_converted(saved, features_only=True, out_indices=(0, 1))
    for x, y in zip(features(images()), expected, strict=True):
        assert torch.equal(x, y)


def test_a_folder_is_overwritten_only_when_told_and_never_with_other_things_in_it(saved) -> None:
    model = perf_vit.linearize(build(), "performer", num_features=32)
    before = (saved / "config.json").read_bytes()
    with pytest.raises(OutputError, match=r"already holds a model; .* replace it with `overwrite=True`"):
        perf_vit.save_converted(model, saved)
    assert (saved / "config.json").read_bytes() == before
    perf_vit.save_converted(model, saved, overwrite=True)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert load_converted(saved).conversion.mixer == "performer"
    (saved / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds diary\.txt, which is not part of a saved model"):
        perf_vit.save_converted(model, saved, overwrite=True)
    with pytest.raises(OutputError, match="it is a file; choose a folder"):
        perf_vit.save_converted(model, saved / "diary.txt", overwrite=True)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")], ids=["os", "st"]
)
def test_an_interrupted_save_leaves_the_old_model_and_nothing_else(saved, monkeypatch, error) -> None:
    def fail(*_, **__) -> None:
        raise error

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("perf_vit.conversion.save.save_file", fail)
    with pytest.raises(OutputError, match=r"can't save a model in .*: No space left on device"):
        perf_vit.save_converted(perf_vit.linearize(build(), **OPTIONS), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_what_cannot_be_saved_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected a model from perf_vit\.linearize, got VisionTransformer"):
        perf_vit.save_converted(build(), tmp_path / "a")
    own = timm.models.VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"that timm\.create_model made, got VisionTransformer without a timm name"):
        perf_vit.save_converted(perf_vit.linearize(own), tmp_path / "a")
    changed = build()
    changed.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"norm\.bias of this model differs from timm"):
        perf_vit.save_converted(perf_vit.linearize(changed), tmp_path / "a")
    with_object = build(norm_layer=torch.nn.LayerNorm)
    with pytest.raises(ValueError, match="a saved model: norm_layer must be a number, a word"):
        perf_vit.save_converted(perf_vit.linearize(with_object), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def _without_conversion(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["perf_vit"]
    (folder / "config.json").write_text(json.dumps(config))


def _of_another_architecture(folder: Path) -> None:
    save_file(build(embed_dim=96, num_heads=3, depth=2).state_dict(), folder / "model.safetensors")


def _without_one_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["blocks.0.attn.proj.bias"]
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no config.json in"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 99), "as weights: "),
        (lambda folder: (folder / "config.json").write_text("{"), "as JSON: "),
        (lambda folder: (folder / "config.json").write_text("[1]"), "has no architecture"),
        (
            lambda folder: (folder / "config.json").write_text('{"architecture": "nonet"}'),
            "needs a timm with nonet",
        ),
        (_without_conversion, "has no conversion"),
        (_of_another_architecture, "doesn't fit vit_tiny_patch16_224: missing blocks.2."),
        (_without_one_tensor, "blocks.0.attn.proj.bias"),
    ],
)
@pytest.mark.parametrize("kwargs", [{}, {"features_only": True, "out_indices": (0, 1)}])
def test_a_damaged_folder_is_one_line(saved, damage, message, kwargs) -> None:
    damage(saved)
    if kwargs and damage is _of_another_architecture:
        message = "mis-shaped"
    with pytest.raises(CheckpointError) as error:
        load_converted(saved, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_say_what_is_missing_unexpected_and_mis_shaped() -> None:
    weights = {**build(embed_dim=96, num_heads=3, depth=2).state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        create_with_weights(NAMES[0], weights, "w.pth", {"num_classes": 5}, depth=3, img_size=SIZE, num_classes=5)
    message = str(error.value)
    assert message.startswith("w.pth doesn't fit vit_tiny_patch16_224: missing blocks.2.")
    assert "and 10 more; unexpected extra; mis-shaped " in message
    assert "cls_token (expected [1, 1, 192], got [1, 1, 96])" in message
    assert message.endswith("pass the name of its model")


@torch.no_grad()
def test_weights_come_from_what_training_scripts_write(tmp_path) -> None:
    model = build()
    state = {f"module.{name}": value.half() for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pth")
    loaded = create_with_weights(
        NAMES[0], read_weights(tmp_path / "w.pth"), "w.pth", {"num_classes": 5}, depth=3, img_size=160, num_classes=5
    )
    assert loaded.patch_embed.proj.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight, rtol=1e-3, atol=1e-3)
    assert "state_dict" not in loaded.pretrained_cfg


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "must hold a state dict, names and tensors, got list"), ({}, "holds no tensors")],
)
def test_a_file_without_weights_is_refused(content, message, tmp_path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "w.pth")


@torch.no_grad()
def test_a_folder_is_a_backbone_and_the_checkpoint_does_without_it(saved, tmp_path) -> None:
    config = SegmentationModelConfig(backbone=str(saved), out_indices=[0, 2], head_kwargs={"channels": [8, 8, 8, 8]})
    spec = SegmentationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 5, (1.0,) * 5), tile_px=64)
    model = build_segmenter(config, spec).eval()
    weight = build().blocks[1].attn.qkv.weight
    assert torch.equal(model.backbone.model.blocks[1].attn.qkv.weight, weight)
    assert model(images(5, 64)).shape == (2, 2, 64, 64)
    # As training writes it; then the folder goes.
    checkpoint = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "perf_vit": checkpoint_metadata(config, model),
    }
    torch.save(checkpoint, tmp_path / "best.ckpt")
    shutil.rmtree(saved)
    loaded = load_segmenter(tmp_path / "best.ckpt")
    assert torch.equal(loaded(images(5, 64)), model(images(5, 64)))


def test_a_folder_without_a_converted_model_is_no_backbone(tmp_path) -> None:
    spec = SegmentationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
    with pytest.raises(CheckpointError, match=r"no config\.json in"):
        build_segmenter(SegmentationModelConfig(backbone=str(tmp_path)), spec)


@torch.no_grad()
def test_patches_that_no_head_can_double_are_resampled(tmp_path) -> None:
    model = build("vit_small_patch14_dinov2", embed_dim=96, num_heads=3, num_classes=0)
    folder = perf_vit.save_converted(perf_vit.linearize(model, **OPTIONS), tmp_path / "saved")
    options = {"out_indices": [0, 2], "head_kwargs": {"channels": [8, 8, 8, 8]}}
    config = SegmentationModelConfig(backbone=str(folder), backbone_kwargs={"patch_size": 16}, **options)
    spec = SegmentationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
    segmenter = build_segmenter(config, spec).eval()
    assert segmenter(images(size=96)).shape == (2, 2, 96, 96)
    assert segmenter.backbone.model.patch_embed.proj.weight.shape[-2:] == (16, 16)
