"""`model.patch_size`: pretrained ViTs with patches of another size."""

import shutil

import pytest
import timm
import torch
from torch.nn import functional as F

import perf_vit
from perf_vit.errors import ConfigError
from perf_vit.models import DetectionModelConfig, DetectionSpec, build_detector, checkpoint_metadata, load_detector
from perf_vit.models.backbone import BackboneConfig, build_backbone, feature_specs
from perf_vit.transforms import Normalizer

SIZE, PATCH = 56, 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted ViT with patches of 14 px, made for images of 56 px."""
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": SIZE, "num_classes": 0, "init_values": 1.0}
    model = timm.create_model("vit_small_patch14_dinov2", **small)
    linear = perf_vit.linearize(model, max_exact_tokens=0, num_clusters=4, window_size=4, num_sinks=2)
    return perf_vit.save_converted(linear, tmp_path_factory.mktemp("model") / "saved")


def backbone(folder, patch_size, tile_px=SIZE, **changes):
    config = BackboneConfig(backbone=str(folder), patch_size=patch_size, **changes)
    return build_backbone(config, [0, 1], 3, tile_px)[0].eval()


def image_of(side: int) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_same_patch_size_changes_nothing(folder) -> None:
    for ours, theirs in zip(
        backbone(folder, PATCH)(image_of(SIZE)), backbone(folder, None)(image_of(SIZE)), strict=True
    ):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_larger_patches_see_enlarged_patches_as_they_saw_those_before(folder) -> None:
    rows = SIZE // PATCH
    image = image_of(SIZE)
    patches = F.unfold(image, PATCH, stride=PATCH).reshape(3, PATCH, PATCH, -1).permute(3, 0, 1, 2)
    larger = F.interpolate(patches, (28, 28), mode="bicubic", antialias=True)
    enlarged = F.fold(larger.permute(1, 2, 3, 0).reshape(1, -1, rows * rows), 28 * rows, 28, stride=28)
    for ours, theirs in zip(
        backbone(folder, 28, tile_px=28 * rows)(enlarged), backbone(folder, None)(image), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [4, 8, 16])
def test_maps_have_the_stride_of_the_patches(folder, size) -> None:
    made = backbone(folder, size, tile_px=64)
    assert [spec.stride for spec in feature_specs(made)] == [size, size]
    maps = made(image_of(64))
    assert [tuple(each.shape[-2:]) for each in maps] == [(64 // size, 64 // size)] * 2
    assert all(each.isfinite().all() for each in maps)


@torch.no_grad()
def test_smaller_patches_resemble_the_larger_ones_of_the_enlarged_image(folder) -> None:
    # A smooth image: finer detail than its pixels show can't be in the patches of the enlarged one.
    image = F.interpolate(image_of(8), (56, 56), mode="bicubic")
    ours = backbone(folder, 7, tile_px=56)(image)[0]
    theirs = backbone(folder, None, tile_px=112)(F.interpolate(image, (112, 112), mode="bicubic"))[0]
    shuffled = theirs.flip(2, 3)
    assert F.cosine_similarity(ours, theirs).mean() > 0.9 > F.cosine_similarity(ours, shuffled).mean()


@torch.no_grad()
def test_a_detector_with_resampled_patches_is_loaded_without_the_folder(folder, tmp_path) -> None:
    copied = shutil.copytree(folder, tmp_path / "saved")
    config = DetectionModelConfig(
        backbone=str(copied),
        patch_size=8,
        out_indices=[1],
        reduce=2,
        strides=[8, 16],
        channels=64,
        head_kwargs={"num_convs": 1},
    )
    spec = DetectionSpec(classes=("a",), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
    model = build_detector(config, spec).eval()
    checkpoint = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "perf_vit": checkpoint_metadata(config, model),
    }
    torch.save(checkpoint, tmp_path / "best.ckpt")
    shutil.rmtree(copied)
    loaded = load_detector(tmp_path / "best.ckpt").eval()
    assert loaded.backbone.model.patch_embed.patch_size == (8, 8)
    maps, expected = (each.backbone(image_of(64)) for each in (loaded, model))
    assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 0}, r"model.patch_size must be from 1 to the 56 px of a tile.*, got 0"),
        ({"patch_size": 57}, r"model.patch_size must be from 1 to the 56 px of a tile.*, got 57"),
        ({"patch_size": 8, "backbone_kwargs": {"patch_size": 8}}, r"are the same; leave one of them out"),
        ({"patch_size": 8, "backbone": "resnet18"}, r"model.patch_size is for vision transformers, and resnet18 has"),
    ],
)
def test_a_patch_size_that_does_not_fit_gets_one_clear_line(changes, message) -> None:
    config = BackboneConfig(**{"backbone": "performer_vit_tiny_patch16_224", **changes})
    with pytest.raises(ConfigError, match=message) as error:
        build_backbone(config, None, 3, SIZE)
    assert "\n" not in str(error.value)
